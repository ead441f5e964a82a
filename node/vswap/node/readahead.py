"""Read-ahead: pages of slower tiers that a sequential reader is about to ask for.

Requests are watched, and find pages in a small cache if they came in time; for those that are being
read just then they wait, so that nothing is read twice. A page is kept together with the entry it
was read by. Segments are immutable and serials never used twice, so it is right as long as the
slot's entry and that segment's serial are the same, and nothing needs to be told when slots are
stored, freed or moved.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from vswap.node import entry
from vswap.node.handles import Handles
from vswap.node.pager import Pager
from vswap.node.spaces import Space
from vswap.node.tiers import Tiers
from vswap.tiers.backend import Buffer
from vswap.tiers.record import U8, U64, Mask
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
        self._tasks: dict[asyncio.Task[None], range] = {}
        """What is being read, and the slots."""

    def fill_in(self, slots: U64, pages: list[Buffer | None]) -> bool:
        """Puts pages that were read ahead in the place of all Nones, or of none: False. Slots are
        distinct."""
        missing = [i for i, page in enumerate(pages) if page is None]
        found = self._find(slots[missing])
        if len(found) < len(missing):
            return False
        for i, at in enumerate(missing):
            pages[at] = found[i]
        self._use(slots[missing].tolist())
        return True

    async def read(self, slots: U64, *, keep_last: bool = False) -> U8:
        """As :meth:`Pager.read`, of which only what was not read ahead is asked for.

        ``keep_last``: the last page will be asked for again.
        """
        coming = [
            task for task, part in self._tasks.items()
            if np.count_nonzero((slots >= part.start) & (slots < part.stop))
        ]  # fmt: skip
        if coming:
            await asyncio.wait(coming)
        found = self._find(slots)
        if not found:
            return await self._pager.read(self._space, slots)
        used = set(slots[list(found)].tolist())
        if keep_last:
            used.discard(int(slots[-1]))
        self._use(used)
        pages = np.empty((len(slots), self._space.page_bytes), np.uint8)
        for i, page in found.items():
            pages[i] = np.frombuffer(page, np.uint8)
        rest = np.setdiff1d(np.arange(len(slots)), list(found), assume_unique=True)
        if len(rest):
            pages[rest] = await self._pager.read(self._space, slots[rest])
        return pages

    def _find(self, slots: U64) -> dict[int, Buffer]:
        """The pages that were read ahead and still are what their slots hold, by their index."""
        if self._space.deleted:
            return {}
        kept = [i for i, slot in enumerate(slots.tolist()) if slot in self._pages]
        if not kept:
            return {}
        found = {}
        some = slots[kept]
        now = self._space.table.get(some).tolist()
        for i, slot, entry_now in zip(kept, some.tolist(), now, strict=True):
            page = self._pages.get(slot)
            if page is None:
                continue
            word, serial, data = page
            if entry_now == word and self._serial(word) == serial:
                found[i] = data
            else:
                del self._pages[slot]
                self._counters["readahead_wasted"] += 1
        return found

    def _use(self, slots: Iterable[int]) -> None:
        """These pages were asked for: they are not kept for another time."""
        for slot in slots:
            del self._pages[slot]
            self._counters["readahead_used"] += 1

    def _serial(self, word: int) -> int:
        return self._handles.serial((word >> 32) & (entry.MAX_HANDLES - 1))

    # ---------------------------------------------------------------- watching

    def watch(self, first: int, count: int) -> None:
        """Told of a read of ``count`` slots from ``first``; starts to read ahead of a stream."""
        stream = next((s for s in self._streams if abs(first - s.next) <= _SLACK_SLOTS), None)
        if stream is None:
            if self._any_slow(range(first, first + count)):
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
        part = range(
            max(stream.ahead, stream.next), min(stream.next + window, self._space.max_slots)
        )
        # A request that is longer reads as much at once by itself.
        if window < count or len(part) < window // 2:
            return
        stream.ahead = part.stop
        if self._any_slow(part):
            task = asyncio.get_running_loop().create_task(self._read(part))
            self._tasks[task] = part
            task.add_done_callback(self._tasks.pop)

    def _any_slow(self, part: range) -> bool:
        slots = np.arange(part.start, part.stop, dtype=np.uint64)
        return bool(self._slow(self._space.table.get(slots)).any())

    def _slow(self, words: U64) -> Mask:
        """Which entries point into tiers that are not RAM."""
        tags = entry.tags(words)
        slow = np.zeros(entry.TAGS, np.bool_)
        for tier in self._tiers.ranked:
            slow[tier.tag] = tier.ram is None
        return slow[tags]

    async def _read(self, part: range) -> None:
        if self._space.deleted:
            return
        slots = np.arange(part.start, part.stop, dtype=np.uint64)
        words = self._space.table.get(slots)
        slow = self._slow(words)
        slots, words = slots[slow], words[slow]
        if not len(slots):
            return
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
