"""Which segments are cleaned."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vswap.tiers.victims import below, cost_benefit


def test_empty_and_old_go_first() -> None:
    live = np.array([50, 50, 10, 100])
    stored = np.array([100, 100, 100, 100])
    age = np.array([1.0, 100.0, 1.0, 1000.0])
    assert cost_benefit(live, stored, age).tolist() == [1, 2, 0, 3]


@given(st.lists(st.tuples(st.integers(0, 100), st.just(100)), max_size=60), st.floats(0.1, 0.99))
def test_rewriting_the_picked_reaches_the_target_and_no_more(
    segments: list[tuple[int, int]], target: float
) -> None:
    live = np.array([s[0] for s in segments], np.int64)
    stored = np.array([s[1] for s in segments], np.int64)
    picked = below(live, stored, target)
    after = stored[~picked].sum() + live[picked].sum()
    if stored.sum():
        assert live.sum() >= target * after - 1e-6 or picked.all()
    if picked.any():
        least = live[picked].max()
        fewer = picked.copy()
        fewer[np.flatnonzero(picked & (live == least))[0]] = False
        assert live.sum() < target * (stored[~fewer].sum() + live[fewer].sum()) + 1e-6
