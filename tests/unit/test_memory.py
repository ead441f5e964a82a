"""What a page costs a node beyond its record; the full-size measurement is in ``make bench``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_memory_per_page_and_of_an_empty_space() -> None:
    """In a process of its own, since a slope needs a quiet heap."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "memory", "--quick"],
        cwd=ROOT, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
