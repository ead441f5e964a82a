"""A space as a disk: an array of bytes in which every slot is there, and the empty ones are zero.

Ranges need not be aligned to pages: parts of pages are read, changed and written as if in one
moment. Frontends that speak of offsets rather than slots are built on this.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from weakref import WeakValueDictionary

import numpy as np

from vswap.node import entry
from vswap.node.pager import Pager
from vswap.node.promote import Promoter
from vswap.node.readahead import ReadAhead
from vswap.node.spaces import Space
from vswap.tiers.backend import Buffer
from vswap.tiers.record import U8, U32, U64
from vswap.wire.errors import UnknownSpace

_STEP_SLOTS = 8192
"""Slots that are freed, filled or looked up in one turn: about 1 ms."""
CACHE_PAGES = 256
"""Pages that are brought into the fast tier at once."""
_MAX_EXTENTS = 8192
MAX_EXTENTS_BYTES = 8 * _MAX_EXTENTS
"""Of one answer to :meth:`Device.extents`, per question."""

HOLE = 1
ZERO = 2


def allocation(words: U64) -> U32:
    """HOLE and ZERO bits of entries."""
    free = words == 0
    zero = free | (words == entry.ZERO_WORD)
    bits: U32 = free.astype(np.uint32) * HOLE + zero.astype(np.uint32) * ZERO
    return bits


def tier(words: U64) -> U32:
    """Tags of entries: 0 free, 1 fill, 2 to 14 a tier, 15 poisoned."""
    return entry.tags(words).astype(np.uint32)


def _never() -> bool:
    return False


class Device:
    """One space's disk. Event loop only; all methods may run concurrently.

    Offsets and lengths are bytes; the caller keeps them inside ``size_bytes``. Errors are the
    pager's.
    """

    def __init__(self, pager: Pager, promoter: Promoter, ahead: ReadAhead, space: Space) -> None:
        self._pager = pager
        self._promoter = promoter
        self._ahead = ahead
        self.space = space
        self._shift = space.page_shift
        self._mask = space.page_bytes - 1
        self._edits: WeakValueDictionary[int, asyncio.Lock] = WeakValueDictionary()

    @property
    def size_bytes(self) -> int:
        return self.space.max_slots * self.space.page_bytes

    def slots(self, offset: int, length: int) -> U64:
        """The slots that a range touches."""
        return np.arange(offset >> self._shift, (offset + length + self._mask) >> self._shift,
                         dtype=np.uint64)  # fmt: skip

    def flush(self) -> None:
        """Only asks whether the space is there: what was acknowledged is where a load finds it,
        whatever dies but the host, and nothing that could be flushed outlives that. Raises
        UnknownSpace."""
        self._check()

    def _check(self) -> None:
        if self.space.deleted:
            raise UnknownSpace(f"space {self.space.name!r} was deleted", space=self.space.name)

    def inner(self, offset: int, length: int) -> tuple[int, int]:
        """First and end slot of the whole pages in a range; end <= first where there is none."""
        return (offset + self._mask) >> self._shift, (offset + length) >> self._shift

    # ---------------------------------------------------------------- read

    def peek(self, slots: U64) -> list[Buffer | None]:
        """See :meth:`Pager.peek`."""
        return self._pager.peek(self.space, slots)

    def fill_in(self, slots: U64, pages: list[Buffer | None]) -> bool:
        """Tries what was read ahead for a read that :meth:`peek` could not answer whole, and reads
        on where it is part of a stream. True = all pages are there now."""
        found = self._ahead.fill_in(slots, pages)
        self._ahead.watch(int(slots[0]), len(slots))
        return found

    async def read_slots(self, slots: U64) -> U8:
        """Pages (n, page_bytes); slots may repeat."""
        return await self._ahead.read(slots)

    async def read(self, offset: int, length: int) -> memoryview:
        """A range; reads on where it is part of a stream."""
        slots = self.slots(offset, length)
        self._check()
        self._ahead.watch(int(slots[0]), len(slots))
        # Where a range ends inside a page, the next one begins there.
        ends_inside = bool((offset + length) & self._mask)
        pages = await self._ahead.read(slots, keep_last=ends_inside)
        start = offset & self._mask
        return pages.reshape(-1).data[start : start + length]

    async def cache(self, offset: int, length: int) -> None:
        """Brings pages into the fast tier, as far as there is room."""
        end = (offset + length + self._mask) >> self._shift
        for start in range(offset >> self._shift, end, _STEP_SLOTS):
            self._check()
            slots = np.arange(start, min(start + _STEP_SLOTS, end), dtype=np.uint64)
            # An empty disk is large: only slots that hold something are looked at more than once.
            slots = slots[self.space.table.get(slots) != 0]
            for first in range(0, len(slots), CACHE_PAGES):
                await self._promoter.bring(self.space, slots[first : first + CACHE_PAGES])
                await asyncio.sleep(0)
            await asyncio.sleep(0)

    # ---------------------------------------------------------------- write

    def write_now(self, slots: U64, pages: U8, hashes: U64 | None = None) -> bool:
        """See :meth:`Pager.store_now`."""
        return self._pager.store_now(self.space, slots, pages, hashes)

    def window(self) -> U8 | None:
        """See :meth:`Pager.window`."""
        return self._pager.window(self.space)

    async def write_slots(self, slots: U64, pages: U8) -> None:
        """Whole pages; all or nothing. Of a slot that occurs twice the last page counts."""
        await self._pager.store(self.space, slots, pages)

    async def edit(self, slot: int, edits: Sequence[tuple[int, Buffer]]) -> None:
        """Writes parts of one page: (byte in the page, bytes), in order.

        Edits of a slot queue, since each would make the others begin again.
        """

        def apply(pages: U8) -> None:
            page = pages[0].data
            for start, data in edits:
                page[start : start + len(data)] = data

        lock = self._edits.get(slot)
        if lock is None:
            lock = self._edits[slot] = asyncio.Lock()
        async with lock:
            await self._pager.update(self.space, np.array([slot], np.uint64), apply)

    async def zero(
        self, offset: int, length: int, *, hole: bool, stop: Callable[[], bool] = _never
    ) -> None:
        """Zeros a range. ``hole`` frees the slots of whole pages; else they hold a page of zeros,
        which takes no more room than its entry.

        Each step counts as newer than all that was stored before it, so it ends as soon as
        ``stop`` says that nobody waits for it any more.
        """
        await self._zero_edges(offset, length, stop)
        first, end = self.inner(offset, length)
        for start in range(first, end, _STEP_SLOTS):
            if stop():
                return
            slots = np.arange(start, min(start + _STEP_SLOTS, end), dtype=np.uint64)
            if hole:
                await self._pager.free(self.space, slots)
            else:
                await self._pager.fill(self.space, slots)
            await asyncio.sleep(0)

    async def _zero_edges(self, offset: int, length: int, stop: Callable[[], bool]) -> None:
        end, position = offset + length, offset
        while position < end and not stop():
            start = position & self._mask
            size = min(self._mask + 1 - start, end - position)
            if size <= self._mask:
                await self.edit(position >> self._shift, [(start, bytes(size))])
                position += size
            else:
                # On to the page that the range ends in, if it ends inside one.
                position = max(end & ~self._mask, position + size)

    async def trim(self, offset: int, length: int, *, stop: Callable[[], bool] = _never) -> None:
        """Frees the slots of whole pages in a range; the rest is left as it is. ``stop`` as in
        :meth:`zero`."""
        first, end = self.inner(offset, length)
        if first < end:
            await self.zero(
                first << self._shift, (end - first) << self._shift, hole=True, stop=stop
            )

    # ---------------------------------------------------------------- extents

    async def extents(
        self, offset: int, length: int, of: Sequence[Callable[[U64], U32]], *, one: bool
    ) -> list[tuple[U32, U32]]:
        """(lengths in bytes, states) for each question: :func:`allocation`, :func:`tier`.

        At most 8192 extents each, so the answer may end before the range does.
        """
        self._check()
        first = offset >> self._shift
        slots = (offset + length + self._mask >> self._shift) - first
        runs: list[list[tuple[U64, U32]]] = [[] for _ in of]
        for start in range(0, slots, _STEP_SLOTS):
            if start and not start % (8 * _STEP_SLOTS):
                await asyncio.sleep(0)
                self._check()
            count = min(_STEP_SLOTS, slots - start)
            where = np.arange(first + start, first + start + count, dtype=np.uint64)
            words = self.space.table.get(where)
            for i, question in enumerate(of):
                states = question(words)
                fresh = not runs[i] or states[0] != runs[i][-1][1][-1]
                begin = np.flatnonzero(np.append(fresh, states[1:] != states[:-1]))
                if len(begin):
                    runs[i].append((begin.astype(np.uint64) + np.uint64(start), states[begin]))
            if all(_count(parts) > (1 if one else _MAX_EXTENTS) for parts in runs):
                slots = start + count
                break
        skew = offset & self._mask
        whole = min(length, (slots << self._shift) - skew)
        return [_lengths(parts, self._shift, skew, whole, 1 if one else _MAX_EXTENTS)
                for parts in runs]  # fmt: skip


def _count(parts: list[tuple[U64, U32]]) -> int:
    return sum(len(begin) for begin, _ in parts)


def _lengths(
    parts: list[tuple[U64, U32]], shift: int, skew: int, whole: int, most: int
) -> tuple[U32, U32]:
    """Extents in bytes from runs in slots."""
    begin = np.concatenate([b for b, _ in parts])
    states = np.concatenate([s for _, s in parts])
    edges = np.append((begin << np.uint64(shift)).astype(np.int64) - skew, whole)
    edges[0] = 0
    return np.diff(edges)[:most].astype(np.uint32), states[:most]
