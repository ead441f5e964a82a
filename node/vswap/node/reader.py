"""Reading records by their entries, wherever they lie.

A record in RAM is viewed in place. Of other tiers the ranges are sorted, neighbours coalesced, and
all tiers read in parallel. The caller has pinned the segments.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import numpy as np

from vswap.node import entry
from vswap.node.handles import DAMAGED, Handles
from vswap.node.spaces import Space
from vswap.node.tier import Tier
from vswap.node.tiers import Tiers
from vswap.tiers.backend import Buffer, Read
from vswap.tiers.record import (
    HEADER_BYTES,
    I64,
    U64,
    Mask,
    Records,
    concatenate,
    loc_offset,
    read_records,
)
from vswap.wire.errors import PageLost, TierUnavailable, VswapError

READS = 3
"""So often is read what fails its check: a bad transfer is not a bad copy."""


@dataclass(slots=True)
class Found:
    """Records of one tier. ``index`` says which of the asked slots they are."""

    tier: Tier
    index: I64
    records: Records
    failed: list[tuple[I64, VswapError]]
    """Slots (as indices) whose bytes did not come, and why."""


class Reader:
    """Event loop only."""

    def __init__(self, handles: Handles, tiers: Tiers) -> None:
        self._handles = handles
        self._tiers = tiers

    def in_ram(self, tier: Tier, space: Space, slots: U64, words: U64, index: I64) -> Found:
        """Views records in RAM; no await, no copy."""
        arena = tier.ram
        assert arena is not None
        handles = entry.handles(words)
        rows = self._handles.rows
        start = rows["block"][handles].astype(np.int64) * arena.block_bytes
        records = read_records(
            arena.memory,
            start + loc_offset(entry.lows(words)),
            entry.sizes(words),
            np.full(len(words), space.number, np.uint32),
            slots.astype(np.uint32),
            self._handles.salts[handles],
        )
        return Found(tier, index, records, [])

    async def in_backend(
        self, tier: Tier, space: Space, slots: U64, words: U64, index: I64, *, apart: bool = False
    ) -> Found:
        """Fetches records from a backend in as few ranges as make sense; ``apart``: one by one, so
        that what is not there fails alone."""
        order = np.argsort(words, kind="stable")
        slots, words, index = slots[order], words[order], index[order]
        handles, offset = entry.handles(words), loc_offset(entry.lows(words))
        size = entry.sizes(words)
        end = offset + size
        new = np.ones(len(words), np.bool_)
        if not apart:
            new[1:] = (handles[1:] != handles[:-1]) | (
                offset[1:] > end[:-1] + tier.backend.gap_bytes
            )
        first = np.flatnonzero(new)
        last = np.append(first[1:], len(words)) - 1
        names = {h: tier.segment_name(h) for h in np.unique(handles).tolist()}
        reads = [
            Read(names[h], a, b - a, whole)
            for h, a, b, whole in zip(
                handles[first].tolist(), offset[first].tolist(), end[last].tolist(),
                self._handles.rows["stored"][handles[first]].tolist(), strict=True,
            )
        ]  # fmt: skip
        results = await self._fetch(tier, reads)
        run = np.cumsum(new) - 1
        failed: list[tuple[I64, VswapError]] = []
        good = np.ones(len(words), np.bool_)
        base, parts = np.zeros(len(reads), np.int64), []
        position = 0
        for i, result in enumerate(results):
            if isinstance(result, VswapError):
                failed.append((index[run == i], result))
                good[run == i] = False
                continue
            base[i] = position - reads[i].offset
            parts.append(result)
            position += len(result)
        records = read_records(
            np.frombuffer(b"".join(parts), np.uint8),
            (offset + base[run])[good],
            size[good],
            np.full(int(good.sum()), space.number, np.uint32),
            slots[good].astype(np.uint32),
            self._handles.salts[handles[good]],
        )
        return Found(tier, index[good], records, failed)

    async def _fetch(
        self, tier: Tier, reads: list[Read]
    ) -> list[bytes | bytearray | memoryview | VswapError]:
        if not tier.opened:
            # Of a node that was just started: to its clients that is a pause, not an error.
            await asyncio.wait([tier.tried])
        if not tier.opened:
            gone = TierUnavailable(f"tier {tier.name} is not reachable: {tier.error}")
            return [gone] * len(reads)
        results = await tier.backend.get(reads)
        broken = next(
            (r for r in results if isinstance(r, VswapError) and not isinstance(r, PageLost)), None
        )
        if broken is not None:
            # Of a redundant tier some segments may be out of reach, while it serves all others.
            if tier.redundant is None or not tier.redundant.usable:
                tier.failed(broken)
        else:
            tier.succeeded()
        return results

    async def elsewhere(
        self, tier: Tier, space: int, slots: U64, words: U64
    ) -> tuple[Records | None, Mask]:
        """Records that failed their check, from what else their tier has of them: another copy, or
        what other servers give. Which of them that found, and their records, verified."""
        found = np.zeros(len(words), np.bool_)
        parts = []
        for i, slot in enumerate(slots.tolist()):
            record = await self._another(tier, space, slot, words[i : i + 1])
            if record is not None:
                parts.append(record)
                found[i] = True
                self._handles.rows["lacking"][entry.handles(words[i])] |= DAMAGED
        return concatenate(parts) if parts else None, found

    async def _another(self, tier: Tier, space: int, slot: int, word: U64) -> Records | None:
        handle = int(entry.handles(word)[0])
        offset, size = loc_offset(entry.lows(word)), entry.sizes(word)
        whole = int(self._handles.rows["stored"][handle])
        read = Read(tier.segment_name(handle), int(offset[0]), int(size[0]), whole)
        async for data in tier.backend.alternatives(read):
            record = read_records(
                np.frombuffer(data, np.uint8), offset - offset, size,
                np.array([space], np.uint32), np.array([slot], np.uint32),
                self._handles.salts[handle : handle + 1],
            )  # fmt: skip
            if record.valid().all():
                return record
        return None

    async def segment(self, tier: Tier, handle: int) -> Buffer:
        """A whole sealed segment. Raises what the backend says."""
        name = tier.segment_name(handle)
        stored = int(self._handles.rows["stored"][handle])
        [data] = await self._fetch(tier, [Read(name, 0, stored, stored)])
        if isinstance(data, VswapError):
            raise data
        return data

    async def exists(self, tier: Tier, handle: int) -> bool:
        """Whether the backend has anything of a sealed segment. Raises what the backend says."""
        stored = int(self._handles.rows["stored"][handle])
        for _ in range(READS):
            [data] = await self._fetch(
                tier, [Read(tier.segment_name(handle), 0, HEADER_BYTES, stored)]
            )
            if not isinstance(data, VswapError):
                return True
            if not isinstance(data, PageLost):
                raise data
        return False
