"""Tickets: which of two operations on a slot is the newer, when they finish out of order.

A store takes its ticket (a sequence number) at admission; compressing and waiting for room are
awaits in between. The rule: an operation does not flip a slot that a *newer finished* one has
flipped; it is acknowledged all the same, since it is as if it had happened just before. (Not "a
newer admitted one": that one may still fail, and then the older store must have happened.)
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
        """Per space: the newest ticket that flipped a slot while it had operations open."""

    def begin(self, space: int, slots: Sequence[int]) -> None:
        """Opens an operation on distinct slots; must be ended."""
        self._open[space].update(slots)

    def end(self, space: int, slots: Sequence[int]) -> None:
        counts, flipped = self._open[space], self._flipped[space]
        for slot in slots:
            left = counts[slot] - 1
            if left > 0:
                counts[slot] = left
            else:
                counts.pop(slot, None)
                flipped.pop(slot, None)

    def newest(self, space: int, slots: Sequence[int]) -> list[int]:
        """The ticket that last flipped each slot while it had operations open; 0 = none."""
        flipped = self._flipped[space]
        if not flipped:
            return [0] * len(slots)
        return [flipped.get(slot, 0) for slot in slots]

    def winners(self, space: int, slots: Sequence[int], ticket: int) -> Mask | None:
        """Which slots no newer operation has flipped; None = all."""
        if not self._flipped[space]:
            return None
        newest = np.array(self.newest(space, slots), np.uint64)
        won = newest < ticket
        return None if won.all() else won

    def flip(self, space: int, slots: U64, ticket: int) -> None:
        """Notes that an operation flipped these slots."""
        counts = self._open.get(space)
        if not counts:
            return
        flipped = self._flipped[space]
        for slot in slots.tolist():
            if slot in counts and flipped.get(slot, 0) < ticket:
                flipped[slot] = ticket

    def forget_space(self, space: int) -> None:
        self._open.pop(space, None)
        self._flipped.pop(space, None)
