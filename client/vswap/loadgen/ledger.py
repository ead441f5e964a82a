"""What a client must find in each of its slots, and the check of what it found.

Each slot counts its versions: every store, successful or not, is a new one. A page is right if its
version lies between ``floor`` and ``latest``. Between certain operations both are equal. An
operation whose outcome is unknown widens the range until the next certain one:

====================  =============  ============  ==========
after                 floor          latest        may be free
====================  =============  ============  ==========
nothing               1              0             yes
store v               v              v             no
store v, unknown      (as before)    v             (as before)
free of v             v + 1          v             yes
free, unknown         (as before)    (as before)   yes
====================  =============  ============  ==========
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vswap.loadgen.content import Content

SHOWN_WRONGS = 16

Slots = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Wrong:
    """A page that should not have been there."""

    slot: int
    expected: str
    found: str

    def __str__(self) -> str:
        return f"slot {self.slot}: expected {self.expected}, found {self.found}"


class Ledger:
    """The slots [first, first + count) of one client. Not thread-safe; one operation per slot."""

    def __init__(self, first: int, count: int, content: Content) -> None:
        self.first = first
        self.count = count
        self.content = content
        self._floor = np.ones(count, np.uint32)
        self._latest = np.zeros(count, np.uint32)
        self._may_be_free = np.ones(count, np.bool_)

    # -------------------------------------------------------------- what is there

    def held(self, slots: Slots) -> Slots:
        """Those of the slots that certainly hold a page."""
        return slots[~self._may_be_free[self._at(slots)]]

    def all_held(self) -> Slots:
        return self._slots(~self._may_be_free)

    def all_free(self) -> Slots:
        """Slots that certainly hold nothing."""
        return self._slots(self._floor > self._latest)

    def all_doubtful(self) -> Slots:
        """Slots that may hold a page or nothing."""
        return self._slots(self._may_be_free & (self._floor <= self._latest))

    # -------------------------------------------------------------- what is done

    def storing(self, slots: Slots) -> NDArray[np.uint8]:
        """A store begins, its outcome unknown until `stored` or `refused`: the pages to store."""
        at = self._at(slots)
        self._latest[at] += 1
        return self.content.pages(slots, self._latest[at])

    def stored(self, slots: Slots) -> None:
        at = self._at(slots)
        self._floor[at] = self._latest[at]
        self._may_be_free[at] = False

    def refused(self, slots: Slots) -> None:
        """The store that began has certainly written nothing."""
        self._latest[self._at(slots)] -= 1

    def freeing(self, slots: Slots) -> None:
        """A free of slots that are held begins."""
        self._may_be_free[self._at(slots)] = True

    def freed(self, slots: Slots) -> None:
        at = self._at(slots)
        self._floor[at] = self._latest[at] + 1

    def not_freed(self, slots: Slots) -> None:
        """The free that began has certainly freed nothing."""
        self._may_be_free[self._at(slots)] = False

    # -------------------------------------------------------------- the check

    def check(self, slots: Slots, pages: NDArray[np.uint8]) -> list[Wrong]:
        """What is wrong with loaded pages (n, page_bytes) of slots (n,); usually nothing.

        The slots must be held or doubtful.
        """
        at = self._at(slots)
        expected = self.content.pages(slots, self._latest[at])
        # Whole words and one pass: this check is most of what a reading client does.
        if np.array_equal(expected.view(np.uint64), pages.view(np.uint64)):
            return []
        bad = np.flatnonzero((expected.view(np.uint64) != pages.view(np.uint64)).any(axis=1))
        wrongs = [self._judge(int(slots[row]), pages[row]) for row in bad]
        return [wrong for wrong in wrongs if wrong is not None]

    def _judge(self, slot: int, page: NDArray[np.uint8]) -> Wrong | None:
        at = slot - self.first
        versions = np.arange(self._floor[at], self._latest[at] + 1, dtype=np.uint32)
        allowed = self.content.pages(np.full(len(versions), slot, np.uint64), versions)
        if (allowed == page).all(axis=1).any():
            return None
        expected = f"version {versions[0]}" if len(versions) == 1 else f"one of {versions.tolist()}"
        return Wrong(slot, expected, self.content.describe(slot, page))

    def _at(self, slots: Slots) -> NDArray[np.int64]:
        return slots.astype(np.int64) - self.first

    def _slots(self, chosen: NDArray[np.bool_]) -> Slots:
        return (np.flatnonzero(chosen) + self.first).astype(np.uint64)
