"""The swap tables counted again, a chunk a turn, while they are being changed.

What is counted is exact at the moment in which the count ends, however busy the shard is: a change
of a slot whose chunk was counted is counted behind it, and what lies ahead will be met as it is.
It shares no arithmetic with the ledger's books, which it is there to be held against.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator

import numpy as np

from vswap.node import entry
from vswap.node.ledger import Ledger
from vswap.node.spaces import Space
from vswap.node.table import CHUNK_SLOTS
from vswap.tiers.record import I64, ROW_BYTES, U64


def _by_tag() -> I64:
    return np.zeros(entry.TAGS, np.int64)


class Recount:
    """One count. Event loop only; several may run at once."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._at = (0, 0)
        """Everything below is counted: (space number, slot)."""
        self.live_records: I64 = np.zeros(0, np.int64)
        self.live_bytes: I64 = np.zeros(0, np.int64)
        """Per handle; what points beyond the handles is left out."""
        self.pages: defaultdict[int, I64] = defaultdict(_by_tag)
        self.bytes: defaultdict[int, I64] = defaultdict(_by_tag)
        """Per space number, by tag."""
        self.logical_by_tag = _by_tag()
        self.lost_by_tag = _by_tag()

    async def run(self) -> AsyncGenerator[tuple[Space, int, U64, U64]]:
        """Counts chunk by chunk, and yields each in the turn in which it is counted: the space, the
        chunk, its slots in use and their entries. The next one is counted in another turn; the last
        step ends without one. Close it (``aclosing``): until then changes are followed.
        """
        self._ledger.watchers.append(self._changed)
        try:
            while (step := self._next()) is not None:
                space, chunk = step
                slots, words = space.table.scan(chunk)
                self._at = (space.number, (chunk + 1) * CHUNK_SLOTS)
                self._count(space, words, +1)
                yield space, chunk, slots, words
                await asyncio.sleep(0)
        finally:
            self._ledger.watchers.remove(self._changed)

    def _next(self) -> tuple[Space, int] | None:
        """The first chunk that is not counted: spaces and chunks come and go between turns."""
        spaces = self._ledger.spaces.by_number
        while True:
            number, slot = self._at
            space = spaces.get(number)
            if space is not None:
                chunks = space.table.chunks()
                ahead = chunks[np.searchsorted(chunks, slot // CHUNK_SLOTS) :]
                if len(ahead):
                    return space, int(ahead[0])
            later = [other for other in spaces if other > number]
            if not later:
                return None
            self._at = (min(later), 0)

    def _changed(self, space: Space, slots: U64, old: U64, words: U64) -> None:
        number, slot = self._at
        if space.number > number:
            return
        behind = slots < (slot if space.number == number else space.max_slots)
        self._count(space, old[behind], -1)
        self._count(space, words[behind], +1)

    def _count(self, space: Space, words: U64, sign: int) -> None:
        words = words[words != 0]
        tags = entry.tags(words)
        pages = np.bincount(tags, minlength=entry.TAGS) * sign
        self.pages[space.number] += pages
        self.logical_by_tag += pages * space.page_bytes
        poisoned = words[tags == entry.POISON]
        lost = poisoned[entry.lows(poisoned) == entry.POISON_LOST]
        np.add.at(self.lost_by_tag, entry.handles(lost) % entry.TAGS, sign)
        in_tier = (tags >= entry.FIRST_TIER) & (tags <= entry.LAST_TIER)
        words, tags = words[in_tier], tags[in_tier]
        cost = (entry.sizes(words) + ROW_BYTES) * sign
        np.add.at(self.bytes[space.number], tags, cost)
        self._grow()
        handles = entry.handles(words)
        known = handles < len(self.live_records)
        np.add.at(self.live_records, handles[known], sign)
        np.add.at(self.live_bytes, handles[known], cost[known])

    def _grow(self) -> None:
        more = len(self._ledger.handles.live_records) - len(self.live_records)
        if more > 0:
            self.live_records = np.concatenate((self.live_records, np.zeros(more, np.int64)))
            self.live_bytes = np.concatenate((self.live_bytes, np.zeros(more, np.int64)))
