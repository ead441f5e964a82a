"""A few rounds of ``make chaos`` with a kernel that swaps on the node all the while."""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos.__main__ import run
from swapping import missing

pytestmark = [pytest.mark.live, pytest.mark.timeout(600)]


@pytest.mark.parametrize(
    ("victim", "redundancy"),
    [("node", "mirror:2"), ("coordinator", "none"), ("redis", "mirror:2"), ("redis", "rs:4+2")],
)
def test_kills_lose_nothing_that_a_kernel_swapped(
    victim: str, redundancy: str, tmp_path: Path
) -> None:
    assert not missing()
    assert run(victim, redundancy, rounds=2, seed=12, root=tmp_path, swap=True)
