"""A few rounds of ``make chaos``: real processes, killed under load, and at every crash point."""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos.__main__ import run, run_points
from chaos.points import POINTS


@pytest.mark.parametrize(
    ("victim", "redundancy"),
    [("node", "mirror:2"), ("coordinator", "none"), ("redis", "mirror:2"), ("redis", "rs:4+2")],
)
def test_kills_lose_nothing(victim: str, redundancy: str, tmp_path: Path) -> None:
    assert run(victim, redundancy, rounds=1, seed=11, root=tmp_path)


@pytest.mark.timeout(300)
def test_a_kill_at_any_crash_point_loses_nothing(tmp_path: Path) -> None:
    assert run_points(POINTS, seed=11, root=tmp_path, at_once=12)
