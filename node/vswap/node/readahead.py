"""Read-ahead: pages of slower tiers that a sequential reader is about to ask for.

Off the request path: requests are only watched, and find their page in a small cache if it came in
time. A page is kept together with the entry it was read by. Segments are immutable and serials
never used twice, so it is right as long as the slot's entry and that segment's serial are the same,
and nothing needs to be told when slots are stored, freed or moved.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from dataclasses import dataclass

import numpy as np

from vswap.node import entry
from vswap.node.handles import Handles
from vswap.node.pager import Pager
from vswap.node.spaces import Space
from vswap.node.tiers import Tiers
from vswap.tiers.backend import Buffer
from vswap.tiers.record import U64
from vswap.wire.errors import VswapError

_STREAMS = 16
_SLACK_SLOTS = 256
"""Requests of one stream may overtake each other by so much."""
_SURE_SLOTS = 16
"""Slots in a row that make a stream."""
_WINDOW_SLOTS = 256
_CACHE_BYTES = 4 * 2**20
_TASKS = 2


@dataclass(slots=True)
class _Stream:
    next: int
    """The slot after the last one that was asked for."""
    run: int
    """How many were asked for in a row."""
    ahead: int
    """Up to where pages have been read."""


class ReadAhead:
    """Of one space. Event loop only. Holds 4 MiB of pages at most.

    Counts ``readahead_pages`` (read), ``readahead_used`` (asked for in time) and
    ``readahead_wasted`` (changed, or pushed out, before anybody asked).
    """

    def __init__(
        self, pager: Pager, handles: Handles, tiers: Tiers, space: Space, counters: Counter[str]
    ) -> None:
        self._pager = pager
        self._handles = handles
        self._tiers = tiers
        self._space = space
        self._counters = counters
        self._streams: list[_Stream] = []
        self._pages: OrderedDict[int, tuple[int, int, Buffer]] = OrderedDict()
        """Slot to entry, serial and page."""
        self._most_pages = _CACHE_BYTES // space.page_bytes
        self._tasks: set[asyncio.Task[None]] = set()

    def fill_in(self, slots: U64, pages: list[Buffer | None]) -> bool:
        """Puts pages that were read ahead in the place of all Nones, or of none: False."""
        missing = [i for i, page in enumerate(pages) if page is None]
        if not all(self._valid(int(slots[i])) for i in missing):
            return False
        for i in missing:
            pages[i] = self._pages.pop(int(slots[i]))[2]
        self._counters["readahead_used"] += len(missing)
        return True

    def _valid(self, slot: int) -> bool:
        kept = self._pages.get(slot)
        if kept is None:
            return False
        word, serial, _ = kept
        [now] = self._space.table.get(np.array([slot], np.uint64)).tolist()
        if now == word and self._serial(word) == serial:
            return True
        del self._pages[slot]
        self._counters["readahead_wasted"] += 1
        return False

    def _serial(self, word: int) -> int:
        return self._handles.serial((word >> 32) & (entry.MAX_HANDLES - 1))

    # ---------------------------------------------------------------- watching

    def watch(self, first: int, count: int) -> None:
        """Told of a read of ``count`` slots from ``first``; starts to read ahead of a stream."""
        stream = next((s for s in self._streams if abs(first - s.next) <= _SLACK_SLOTS), None)
        if stream is None:
            self._streams.append(_Stream(first + count, count, first + count))
            del self._streams[:-_STREAMS]
            return
        if first + count <= stream.next:
            return
        stream.run += count
        stream.next = first + count
        if stream.run < _SURE_SLOTS + count or len(self._tasks) >= _TASKS:
            return
        window = min(max(stream.run, 2 * count), _WINDOW_SLOTS, self._most_pages // 2)
        start = max(stream.ahead, stream.next)
        end = min(stream.next + window, self._space.max_slots)
        if end - start < window // 2:
            return
        stream.ahead = end
        slots = np.arange(start, end, dtype=np.uint64)
        words = self._space.table.get(slots)
        slow = self._slow(words)
        if slow.any():
            task = asyncio.get_running_loop().create_task(self._read(slots[slow], words[slow]))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _slow(self, words: U64) -> np.ndarray:
        """Which entries point into tiers that are not RAM."""
        tags = entry.tags(words)
        slow = np.zeros(entry.TAGS, np.bool_)
        for tier in self._tiers.ranked:
            slow[tier.tag] = tier.ram is None
        return slow[tags]

    async def _read(self, slots: U64, words: U64) -> None:
        serials = [self._serial(word) for word in words.tolist()]
        try:
            # It looks the entries up in this same turn, so these are the pages they stand for.
            pages = await self._pager.read(self._space, slots)
        except VswapError:
            # Whoever asks for them will be told.
            return
        self._counters["readahead_pages"] += len(slots)
        for i, (slot, word, serial) in enumerate(
            zip(slots.tolist(), words.tolist(), serials, strict=True)
        ):
            if self._pages.pop(slot, None) is not None:
                self._counters["readahead_wasted"] += 1
            # Of its own: a view would hold the whole batch in memory.
            self._pages[slot] = (word, serial, pages[i].tobytes())
        while len(self._pages) > self._most_pages:
            self._pages.popitem(last=False)
            self._counters["readahead_wasted"] += 1
