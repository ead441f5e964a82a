"""The page of a slot in a version: the same every time, without being kept anywhere.

A page is a base page chosen by a hash of (seed, slot, version), stamped in its first 16 bytes with
slot, version and run. So a page of another slot, an older version, or another run's page is
recognised for what it is. A share of pages are fill pages: one 32-bit word, from the same hash.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vswap.wire.errors import InvalidRequest

_STAMP = np.dtype([("slot", "<u8"), ("version", "<u4"), ("run", "<u4")])


@dataclass(frozen=True, slots=True)
class Content:
    """Content of all pages of one run.

    ``base`` is an array (m, page_bytes) of uint8 (see `vswap.loadgen.corpus`), ``fill`` the share
    of fill pages, ``run`` a number that tells pages of this run and target from others.
    """

    base: NDArray[np.uint8]
    fill: float
    seed: int
    run: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.fill <= 1:
            raise InvalidRequest(f"the share of fill pages must be 0 to 1, got {self.fill}")

    @property
    def page_bytes(self) -> int:
        return int(self.base.shape[1])

    def pages(self, slots: NDArray[np.uint64], versions: NDArray[np.uint32]) -> NDArray[np.uint8]:
        """Pages (n, page_bytes) of slots (n,) in versions (n,); about 1 us a page."""
        mixed = self._mix(slots, versions)
        pages: NDArray[np.uint8] = self.base[mixed % np.uint64(len(self.base))]
        stamps = pages[:, : _STAMP.itemsize].view(_STAMP)[:, 0]
        stamps["slot"], stamps["version"], stamps["run"] = slots, versions, self.run
        filled = self.is_fill(mixed)
        words = (mixed[filled] & np.uint64(0xFFFFFFFF)).astype(np.uint32)
        pages.view(np.uint32)[filled] = words[:, None]
        return pages

    def is_fill(self, mixed: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which of these hashes stand for fill pages."""
        return (mixed >> np.uint64(40)) < np.uint64(self.fill * 2**24)

    def describe(self, slot: int, page: NDArray[np.uint8]) -> str:
        """What a page that was not expected at ``slot`` is, for a report."""
        words = page.view(np.uint32)
        if (words == words[0]).all():
            return f"a fill page of {int(words[0]):#010x}"
        stamp = page[: _STAMP.itemsize].view(_STAMP)[0]
        if int(stamp["run"]) != self.run:
            return "bytes of no page of this run"
        if int(stamp["slot"]) != slot:
            return f"the page of slot {int(stamp['slot'])}, version {int(stamp['version'])}"
        whole = self.pages(np.array([slot], np.uint64), np.array([stamp["version"]], np.uint32))
        damage = "" if (whole[0] == page).all() else ", damaged"
        return f"version {int(stamp['version'])} of this slot{damage}"

    def _mix(self, slots: NDArray[np.uint64], versions: NDArray[np.uint32]) -> NDArray[np.uint64]:
        # The finaliser of splitmix64 over a weighted sum.
        start = (self.seed * 0x9E3779B97F4A7C15 + self.run * 0xD1B54A32D192ED03) & (2**64 - 1)
        mixed = slots * np.uint64(0xBF58476D1CE4E5B9) + np.uint64(start)
        mixed += versions.astype(np.uint64) * np.uint64(0x94D049BB133111EB)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))
