"""Logs: where records of a tier are appended.

Both kinds answer :class:`Placed`: entries that say where the records lie, not yet in any table. The
segments are pinned until :meth:`settle`, so that nothing is deleted between its acknowledgement
and the flip; what no flip took is dead on arrival.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from vswap.node import entry
from vswap.node.handles import DELETING, OPEN, SEALED, WRITING, Handles
from vswap.node.reaper import Reaper
from vswap.node.tier import Tier, TierState
from vswap.tiers import ram
from vswap.tiers.backend import Read
from vswap.tiers.record import HEADER_BYTES, ROW_BYTES, U8, U64, Records, concatenate, cut
from vswap.tiers.segment import build, segment_size
from vswap.wire.errors import OutcomeUnknown, OutOfTiers, PageCorrupt, VswapError

STORES, MOVED = 0, 1
"""The two open blocks of a RAM log: what clients store, and what survived an evacuation."""

_TRANSFERS = 3
"""Writes in flight per tier. One in flight halves the speed of a drain; more gain nothing."""


@dataclass(slots=True)
class Placed:
    """Where records lie now: one entry each, and the segments that hold them."""

    words: U64
    segments: list[int] = field(default_factory=list)


class RamLog:
    """Appends to blocks of RAM in place; synchronous."""

    def __init__(self, tier: Tier, arena: ram.RamBackend, handles: Handles, reaper: Reaper) -> None:
        self._tier = tier
        self._arena = arena
        self._handles = handles
        self._reaper = reaper
        self._heads: list[int | None] = [None, None]
        self._now = tier._clock

    def is_head(self, handle: int) -> bool:
        return handle in self._heads

    def seal(self) -> None:
        """Closes the open blocks, so that they can be moved too; the next store opens others."""
        heads, self._heads = self._heads, [None, None]
        for head in heads:
            if head is not None:
                self._reaper.consider(head)

    def _blocks(self, stream: int) -> int:
        reserve = self._tier.reserve_bytes // self._arena.block_bytes if stream == STORES else 0
        return self._arena.free_blocks - reserve

    def _head_room(self, stream: int) -> int:
        head = self._heads[stream]
        if head is None:
            return 0
        row = self._handles.rows[head]
        used = int(row["payload"]) + int(row["records"]) * ROW_BYTES
        return self._arena.block_bytes - used

    def place(self, records: Records, stream: int) -> Placed:
        """Appends; all or nothing. Raises OutOfTiers when the tier or shared memory is full."""
        cost = records.cost
        runs = cut(cost, self._head_room(stream), self._arena.block_bytes)
        placed, places = self._open(runs, stream, lambda: int(cost.sum()))
        for run, handle in places:
            placed.words[run] = self._append(handle, records.take(run))
        return placed

    def place_raw(
        self, pages: U8, space: int, slots: U64, sums: U64, meta: int
    ) -> tuple[Placed, list[tuple[int, int]]]:
        """:meth:`place` for pages (n, page_bytes) as they are, of one space and one store; ``sums``
        (n,) are portable. Also answers how many went to each segment: (handle, pages)."""
        n, page_bytes = pages.shape
        size = page_bytes + HEADER_BYTES
        cost = size + ROW_BYTES
        end = min(n, self._head_room(STORES) // cost)
        runs, most = [slice(0, end)], self._arena.block_bytes // cost
        while end < n:
            runs.append(slice(end, end := min(n, end + most)))
        placed, places = self._open(runs, STORES, lambda: n * cost)
        for run, handle in places:
            row = self._handles.rows[handle]
            payload, count = int(row["payload"]), int(row["records"])
            loc = ram.append_raw(
                self._arena.view(int(row["block"])), pages[run], space=space, slots=slots[run],
                sums=sums[run], meta=meta, payload=payload, count=count,
                own=self._handles.salts[handle],
            )  # fmt: skip
            row["payload"] = payload + len(loc) * size
            row["records"] = count + len(loc)
            loc |= np.uint64(self._tier.tag << 60 | handle << 32)
            placed.words[run] = loc
        return placed, [(handle, run.stop - run.start) for run, handle in places]

    def _open(
        self, runs: list[slice], stream: int, need: Callable[[], int]
    ) -> tuple[Placed, list[tuple[slice, int]]]:
        """Open blocks for runs of records, the first one's being open already. Pins them."""
        if len(runs) - 1 > self._blocks(stream):
            raise OutOfTiers(f"tier {self._tier.name} is full", tier=self._tier.name, need=need())
        fresh: list[int] = []
        try:
            while len(fresh) < len(runs) - 1:
                fresh.append(self._new_block())
        except OutOfTiers:
            for opened in fresh:
                self._reaper.unpin(opened)
            raise
        head = self._heads[stream]
        heads = fresh if head is None else [head, *fresh]
        if head is not None:
            self._handles.pins[head] += 1
        self._heads[stream] = heads[-1]
        placed = Placed(np.empty(runs[-1].stop, np.uint64), heads)
        used = runs[1:] if head is None else runs
        return placed, [(r, h) for r, h in zip(used, heads, strict=True) if r.stop > r.start]

    def settle(self, placed: Placed) -> None:
        for handle in placed.segments:
            self._reaper.unpin(handle)

    def _new_block(self) -> int:
        handle = self._handles.create(self._tier.tag, OPEN, self._now())
        name = self._tier.segment_name(handle)
        try:
            block = self._arena.allocate(name)
        except OutOfTiers as error:
            self._handles.recycle(handle)
            if self._arena.free_blocks:
                # Shared memory is smaller than the tiers' capacities: live within what there is.
                self._tier.limit_bytes = self._tier.stored_bytes
                self._tier.error = error.message
            raise
        row = self._handles.rows[handle]
        row["block"], row["stored"] = block, self._arena.block_bytes
        self._tier.segments[handle] = None
        self._tier.charge(self._arena.block_bytes)
        self._handles.pins[handle] += 1
        return handle

    def _append(self, handle: int, records: Records) -> U64:
        row = self._handles.rows[handle]
        own = self._handles.salts[handle]
        payload, count = int(row["payload"]), int(row["records"])
        loc = ram.append(
            self._arena.view(int(row["block"])), records, payload=payload, count=count, own=own
        )
        row["payload"] = payload + int(records.size.sum())
        row["records"] = count + len(records)
        return entry.tier_words(self._tier.tag, handle, loc)


class SegmentLog:
    """Writes whole segments to a backend; several in flight, all or nothing per call."""

    def __init__(self, tier: Tier, handles: Handles, reaper: Reaper) -> None:
        self._tier = tier
        self._handles = handles
        self._reaper = reaper
        self._transfers = asyncio.Semaphore(_TRANSFERS)
        self._now = tier._clock

    def is_head(self, handle: int) -> bool:
        return False

    async def place(self, parts: Sequence[Records], *, compacting: bool) -> Placed:
        """Seals records into as few segments as hold them and waits for the backend's ack.

        ``compacting``: the records come from this same tier, so its reserve may be used. Raises
        OutOfTiers (no room or grant; nothing was written), TierUnavailable or OutcomeUnknown (what
        was written is deleted in the background).
        """
        room = self._tier.segment_bytes
        segments = [parts]
        if segment_size(parts) > self._tier.backend.segment_bytes:
            records = concatenate(parts)
            runs = cut(records.cost, room, room)
            segments = [[records.take(run)] for run in runs if run.stop > run.start]
        need = sum(map(segment_size, segments))
        if need > self._tier.room(compacting=compacting):
            raise OutOfTiers(
                f"tier {self._tier.name} has no room for {need} bytes", tier=self._tier.name,
                need=need, room=self._tier.room(compacting=compacting),
            )  # fmt: skip
        if self._tier.state is not TierState.ACTIVE:
            # In the turn in which the write counts as begun: what was chosen or encoded before a
            # drain must not arrive after this node said that nothing will.
            raise OutOfTiers(f"tier {self._tier.name} takes no pages", tier=self._tier.name)
        self._tier.writing += 1
        writes = [asyncio.ensure_future(self._write(segment)) for segment in segments]
        try:
            done = await asyncio.gather(*writes, return_exceptions=True)
        except asyncio.CancelledError:
            for write in writes:
                write.add_done_callback(self._abandon)
            raise
        finally:
            self._tier.writing -= 1
        failures = [result for result in done if isinstance(result, BaseException)]
        written = [result for result in done if not isinstance(result, BaseException)]
        if failures:
            for _, handle in written:
                self._reaper.unpin(handle)
            raise failures[0]
        return Placed(np.concatenate([w for w, _ in written]), [handle for _, handle in written])

    def settle(self, placed: Placed) -> None:
        for handle in placed.segments:
            self._reaper.unpin(handle)

    def _abandon(self, write: asyncio.Future[tuple[U64, int]]) -> None:
        """A write whose caller is gone: nothing will ever point at it."""
        if not write.cancelled() and write.exception() is None:
            self._reaper.unpin(write.result()[1])

    async def _write(self, parts: Sequence[Records]) -> tuple[U64, int]:
        stored = segment_size(parts)
        handle = self._handles.create(self._tier.tag, WRITING, self._now(), stored=stored)
        self._handles.pins[handle] += 1
        self._tier.segments[handle] = None
        self._tier.charge(stored)
        name = self._tier.segment_name(handle)
        try:
            async with self._transfers:
                built = build(parts, name)
                await self._tier.backend.put(name, built.data.data)
                if self._tier.spec.verify_writes:
                    await self._read_back(handle, built.data.data)
        except BaseException as error:
            # The write may have happened, and may still happen: the serial is burnt.
            self._handles.set_state(handle, DELETING)
            self._handles.pins[handle] -= 1
            self._reaper.delete_later(handle)
            if isinstance(error, VswapError):
                self._tier.failed(error)
            raise
        self._tier.succeeded()
        row = self._handles.rows[handle]
        row["payload"], row["records"] = built.payload_bytes, len(built.loc)
        self._handles.set_state(handle, SEALED)
        return entry.tier_words(self._tier.tag, handle, built.loc), handle

    async def _read_back(self, handle: int, data: memoryview) -> None:
        read = Read(self._tier.segment_name(handle), 0, len(data))
        [got] = await self._tier.backend.get([read])
        if isinstance(got, VswapError):
            raise OutcomeUnknown(f"tier {self._tier.name}: read-back failed: {got}")
        if got != data:
            raise PageCorrupt(f"tier {self._tier.name} did not keep what it acknowledged")
