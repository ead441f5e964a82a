"""Logs: where records of a tier are appended.

Both kinds answer :class:`Placed`: entries that say where the records lie, not yet in any table. The
segments are pinned until :meth:`settle`, so that nothing is deleted between its acknowledgement
and the flip; what no flip took is dead on arrival.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from vswap.node import entry
from vswap.node.handles import DELETING, OPEN, SEALED, WRITING, Handles
from vswap.node.reaper import Reaper
from vswap.node.tier import Tier, TierState
from vswap.tiers import ram
from vswap.tiers.backend import Buffer, Read
from vswap.tiers.record import (
    HEADER_BYTES,
    ROW_BYTES,
    U8,
    U64,
    Records,
    concatenate,
    cut,
    hashes,
    identity,
    join,
    sizes,
)
from vswap.tiers.segment import build, segment_size
from vswap.wire.errors import OutcomeUnknown, OutOfTiers, TierUnavailable, VswapError

STORES, MOVED = 0, 1
"""The two open blocks of a RAM log: what clients store, and what survived an evacuation."""

_PADDING_SHIFT, _CODEC_SHIFT = np.uint64(8), np.uint64(12)
"""Of a record's meta."""

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
        used = int(self._handles.payloads[head]) + int(self._handles.counts[head]) * ROW_BYTES
        return self._arena.block_bytes - used

    def place(self, records: Records, stream: int) -> Placed:
        """Appends; all or nothing. Raises OutOfTiers when the tier or shared memory is full."""
        cost = records.cost
        total = int(cost.sum())
        head = self._heads[stream]
        if head is not None and total <= self._head_room(stream):
            self._handles.pins[head] += 1
            return Placed(self._append(head, records), [head])
        runs = cut(cost, self._head_room(stream), self._arena.block_bytes)
        placed, places = self._open(runs, stream, lambda: total)
        for run, handle in places:
            placed.words[run] = self._append(handle, records.take(run))
        return placed

    def window(self, page_bytes: int) -> U8:
        """Where the next pages that are stored as they are will lie: (n, record bytes), n > 0, the
        pages behind their headers. Nobody reads them before :meth:`place_raw` counts them, and
        anything else that is placed overwrites them.

        Raises OutOfTiers when the tier or shared memory is full.
        """
        size = page_bytes + HEADER_BYTES
        head = self._heads[STORES]
        if head is None or self._head_room(STORES) < size + ROW_BYTES:
            if not self._blocks(STORES) > 0:
                raise OutOfTiers(f"tier {self._tier.name} is full", tier=self._tier.name)
            fresh = self._new_block()
            self._heads[STORES] = fresh
            self._handles.pins[fresh] -= 1
            if head is not None:
                self._reaper.consider(head)
            head = fresh
        block = self._view(head)
        most = self._head_room(STORES) // (size + ROW_BYTES)
        return ram.places_raw(block, size, int(self._handles.payloads[head]), most)

    def place_raw(
        self, pages: U8 | None, page_bytes: int, space: int, slots: U64, sums: U64, meta: int
    ) -> tuple[Placed, list[tuple[int, int, int]]]:
        """:meth:`place` for pages (n, page_bytes) as they are, of one space and one store; None =
        they lie in the :meth:`window`. ``sums`` (n,) are portable.

        Also answers how much went to each segment: (handle, pages, bytes with directory rows).
        """
        n, size = len(slots), page_bytes + HEADER_BYTES
        cost = size + ROW_BYTES
        end = min(n, self._head_room(STORES) // cost)
        runs, most = [slice(0, end)], self._arena.block_bytes // cost
        while end < n:
            runs.append(slice(end, end := min(n, end + most)))
        placed, places = self._open(runs, STORES, lambda: n * cost)
        payloads, counts = self._handles.payloads, self._handles.counts
        for run, handle in places:
            payload, count = int(payloads[handle]), int(counts[handle])
            loc = ram.append_raw(
                self._view(handle), None if pages is None else pages[run],
                space=space, slots=slots[run], sums=sums[run], meta=meta, size=size,
                payload=payload, count=count, own=self._handles.salts[handle],
            )  # fmt: skip
            payloads[handle] = payload + len(loc) * size
            counts[handle] = count + len(loc)
            loc |= np.uint64(self._tier.tag << 60 | handle << 32)
            placed.words[run] = loc
        shares = [(handle, run.stop - run.start) for run, handle in places]
        return placed, [(handle, share, share * cost) for handle, share in shares]

    def place_encoded(
        self, encoded: Sequence[Buffer], ids: U8, space: int, slots: U64, meta: int
    ) -> tuple[Placed, list[tuple[int, int, int]]]:
        """:meth:`place` for freshly encoded pages of one space and one store; ``meta`` is that of a
        raw page. Answers as :meth:`place_raw`."""
        size, padding = sizes(encoded)
        cost = size + ROW_BYTES
        total, room = int(cost.sum()), self._head_room(STORES)
        runs = [slice(0, len(cost))]
        if total > room:
            runs = cut(cost, room, self._arena.block_bytes)
        metas = padding.view(np.uint64) << _PADDING_SHIFT
        metas |= ids.astype(np.uint64) << _CODEC_SHIFT
        metas |= np.uint64(meta)
        sums = identity(space, slots, metas)
        sums ^= hashes(encoded)
        placed, places = self._open(runs, STORES, lambda: total)
        payloads, counts = self._handles.payloads, self._handles.counts
        amounts = []
        for run, handle in places:
            payload, count = int(payloads[handle]), int(counts[handle])
            data = join(encoded[run], padding[run])
            words = ram.append_encoded(
                self._view(handle), data, size[run], space=space,
                slots=slots[run], sums=sums[run], meta=metas[run],
                payload=payload, count=count, own=self._handles.salts[handle],
            )  # fmt: skip
            payloads[handle] = payload + len(data)
            counts[handle] = count + len(words)
            words |= np.uint64(self._tier.tag << 60 | handle << 32)
            placed.words[run] = words
            amounts.append((handle, len(words), len(data) + len(words) * ROW_BYTES))
        return placed, amounts

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

    def _view(self, handle: int) -> U8:
        return self._arena.view(int(self._handles.blocks[handle]))

    def _append(self, handle: int, records: Records) -> U64:
        payloads, counts = self._handles.payloads, self._handles.counts
        payload, count = int(payloads[handle]), int(counts[handle])
        loc = ram.append(
            self._view(handle), records, payload=payload, count=count,
            own=self._handles.salts[handle],
        )  # fmt: skip
        payloads[handle] = payload + int(records.size.sum())
        counts[handle] = count + len(records)
        return entry.tier_words(self._tier.tag, handle, loc)


class SegmentLog:
    """Writes whole segments to a backend; several in flight, all or nothing per call."""

    def __init__(self, tier: Tier, handles: Handles, reaper: Reaper) -> None:
        self._tier = tier
        self._handles = handles
        self._reaper = reaper
        self._transfers = asyncio.Semaphore(_TRANSFERS)
        self._sent: set[int] = set()
        """Handles of writes that the backend was asked for."""
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
        stripes = self._tier.backend.stripes
        need = sum(segment_size(segment, stripes) for segment in segments)
        if need > self._tier.room(compacting=compacting):
            raise OutOfTiers(
                f"tier {self._tier.name} has no room for {need} bytes", tier=self._tier.name,
                need=need, room=self._tier.room(compacting=compacting),
            )  # fmt: skip
        if self._tier.state is not TierState.ACTIVE:
            # In the turn in which the write counts as begun: what was chosen or encoded before a
            # drain must not arrive after this node said that nothing will.
            raise OutOfTiers(f"tier {self._tier.name} takes no pages", tier=self._tier.name)
        # All of them in this turn, in which there is room.
        begun = self._begin([segment_size(segment, stripes) for segment in segments])
        self._tier.writing += 1
        writes = [
            asyncio.ensure_future(self._write(handle, segment))
            for handle, segment in zip(begun, segments, strict=True)
        ]
        for handle, write in zip(begun, writes, strict=True):
            # Not in the task itself: one that is cancelled before its first step runs no finally.
            write.add_done_callback(partial(self._wrote, handle))
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

    def _begin(self, sizes: Sequence[int]) -> list[int]:
        """Handles of new segments, pinned and charged for."""
        begun: list[int] = []
        try:
            for stored in sizes:
                handle = self._handles.create(self._tier.tag, WRITING, self._now(), stored=stored)
                self._handles.pins[handle] += 1
                self._tier.segments[handle] = None
                self._tier.charge(stored)
                begun.append(handle)
        except VswapError:
            for handle in begun:
                self._give_up(handle, may_land=False)
            raise
        return begun

    def _wrote(self, handle: int, write: asyncio.Future[tuple[U64, int]]) -> None:
        error = asyncio.CancelledError() if write.cancelled() else write.exception()
        sent = handle in self._sent
        self._sent.discard(handle)
        if error is not None:
            # The write may have happened, and may still happen: the serial is burnt.
            refused = isinstance(error, VswapError) and not isinstance(error, OutcomeUnknown)
            self._give_up(handle, may_land=sent and not refused)
            if isinstance(error, VswapError):
                self._tier.failed(error)

    def _give_up(self, handle: int, *, may_land: bool) -> None:
        self._handles.set_state(handle, DELETING)
        self._handles.pins[handle] -= 1
        self._reaper.delete_later(handle, may_land=may_land)

    async def _write(self, handle: int, parts: Sequence[Records]) -> tuple[U64, int]:
        name = self._tier.segment_name(handle)
        async with self._transfers:
            built = build(parts, name, self._tier.backend.stripes)
            self._sent.add(handle)
            await self._tier.backend.put(name, built.data.data)
            if self._tier.spec.verify_writes:
                await self._read_back(handle, built.data.data)
        self._tier.succeeded()
        row = self._handles.rows[handle]
        if row["lacking"]:
            self._reaper.stored_in_part(handle)
        row["payload"], row["records"] = built.payload_bytes, len(built.loc)
        self._handles.set_state(handle, SEALED)
        return entry.tier_words(self._tier.tag, handle, built.loc), handle

    async def _read_back(self, handle: int, data: memoryview) -> None:
        read = Read(self._tier.segment_name(handle), 0, len(data), len(data))
        [got] = await self._tier.backend.get([read])
        if isinstance(got, VswapError):
            raise OutcomeUnknown(f"tier {self._tier.name}: read-back failed: {got}")
        if got != data:
            # To the caller it is as if nothing had been written: the tier is passed over.
            raise TierUnavailable(f"tier {self._tier.name} did not keep what it acknowledged")
