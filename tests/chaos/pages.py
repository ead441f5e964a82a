"""Pages that say which slot and version they are, and of which every byte is known."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Page = NDArray[np.uint8]

_rng = np.random.default_rng(7)
_NOISE = _rng.integers(0, 256, (64, 4096), np.uint8)
_NOISE[::2, 512:] = 0
"""Half of them compress."""


def make(slot: int, version: int) -> Page:
    """Every fifth version is a fill page."""
    if version % 5 == 0:
        return np.full(1024, version, np.uint32).view(np.uint8)
    page: Page = _NOISE[(slot * 31 + version) % 64].copy()
    page[:16].view(np.uint64)[:] = slot, version
    return page


def many(versions: Mapping[int, int | None]) -> Page:
    """Pages of slots, each of its version (not None)."""
    return np.stack([make(slot, version or 0) for slot, version in versions.items()])


def version_of(slot: int, page: Page) -> int:
    """Raises AssertionError for anything that was never stored in that slot."""
    words = page.view(np.uint32)
    fill = bool((words[:4] == words[0]).all())
    version = int(words[0]) if fill else int(page[8:16].view(np.uint64)[0])
    assert (page == make(slot, version)).all(), f"slot {slot} holds bytes that nobody stored"
    return version
