"""Tickets: which of two operations on a slot is the newer, when they finish out of order.

A store takes its ticket (a sequence number) at admission; compressing and waiting for room are
awaits in between. The rule: an operation does not flip a slot that a *newer finished* one has
flipped; it is acknowledged all the same, since it is as if it had happened just before. (Not "a
newer admitted one": that one may still fail, and then the older store must have happened.)

An edit changes what it found there, so it comes right after that: an older operation under way,
which it did not see, still wins over it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from vswap.tiers.record import U64, Mask


class Tickets:
    """Remembers flips of slots that have operations open. Memory: O(slots in flight)."""

    def __init__(self) -> None:
        self._open: defaultdict[int, Counter[int]] = defaultdict(Counter)
        """Per space: how many open operations each slot has."""
        self._flipped: defaultdict[int, dict[int, int]] = defaultdict(dict)
        """Per space: the newest ticket that flipped a slot while it had operations open; edits have
        the one of what they found."""
        self._last: defaultdict[int, dict[int, int]] = defaultdict(dict)
        """Per space: whose flip of such a slot was the last, edits with their own ticket."""

    def begin(self, space: int, slots: Sequence[int]) -> None:
        """Opens an operation on distinct slots; must be ended."""
        self._open[space].update(slots)

    def end(self, space: int, slots: Sequence[int]) -> None:
        counts, flipped, last = self._open[space], self._flipped[space], self._last[space]
        for slot in slots:
            left = counts[slot] - 1
            if left > 0:
                counts[slot] = left
            else:
                counts.pop(slot, None)
                flipped.pop(slot, None)
                last.pop(slot, None)

    def newest(self, space: int, slots: Sequence[int]) -> list[int]:
        """The ticket that last flipped each slot while it had operations open; 0 = none."""
        last = self._last[space]
        if not last:
            return [0] * len(slots)
        return [last.get(slot, 0) for slot in slots]

    def winners(self, space: int, slots: Sequence[int], ticket: int) -> Mask | None:
        """Which slots no newer operation has flipped; None = all."""
        flipped = self._flipped[space]
        if not flipped:
            return None
        newest = np.array([flipped.get(slot, 0) for slot in slots], np.uint64)
        won = newest < ticket
        return None if won.all() else won

    def flip(self, space: int, slots: U64, ticket: int, *, edit: bool = False) -> None:
        """Notes that an operation, perhaps an ``edit``, flipped these slots."""
        counts = self._open.get(space)
        if not counts:
            return
        flipped, last = self._flipped[space], self._last[space]
        for slot in slots.tolist():
            if slot in counts:
                last[slot] = ticket
                if not edit:
                    flipped[slot] = ticket

    def forget_space(self, space: int) -> None:
        self._open.pop(space, None)
        self._flipped.pop(space, None)
        self._last.pop(space, None)
