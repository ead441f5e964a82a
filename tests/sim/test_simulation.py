"""A short run of the simulation, and whether it finds the bugs that are planted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sim.mutants import MUTANTS

FIRST = {"delete-before-flip": "120", "skip-compare": "300", "stale-checksum": "200"}
"""Where to begin, to save time: a bug that takes more seeds than others."""
TESTS = Path(__file__).parents[1]


def simulate(*arguments: str) -> str:
    """Runs ``python -m sim``; returns what it says. Fails where it does."""
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-m", "sim", *arguments], env=environ, text=True, capture_output=True
    )
    assert not done.returncode, done.stdout + done.stderr
    return done.stdout


def test_every_promise_is_kept() -> None:
    assert "40 seeds, 0 failed" in simulate("--seeds", "40")


def test_a_seed_replays_exactly() -> None:
    # One with kills, restarts and jobs; the others before it leave other memory behind.
    alone = simulate("--seed", "41")
    assert "trace" in alone
    among_others = simulate("--first", "40", "--seeds", "2", "--jobs", "1", "--traces")
    assert alone.splitlines()[-1] in among_others


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_planted_bug_is_found(mutant: str) -> None:
    """Ends with the first seed that finds it; most take a dozen."""
    assert "found" in simulate("--mutant", mutant, "--first", FIRST.get(mutant, "0"))
