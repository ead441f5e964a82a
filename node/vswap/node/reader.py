"""Reading records by their entries, wherever they lie.

A record in RAM is viewed in place. Of other tiers the ranges are sorted, neighbours coalesced, and
all tiers read in parallel. The caller has pinned the segments.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vswap.node import entry
from vswap.node.handles import Handles
from vswap.node.spaces import Space
from vswap.node.tier import Tier
from vswap.node.tiers import Tiers
from vswap.tiers.backend import Buffer, Read
from vswap.tiers.record import I64, U64, Records, loc_offset, read_records
from vswap.wire.errors import PageLost, TierUnavailable, VswapError


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
        self, tier: Tier, space: Space, slots: U64, words: U64, index: I64
    ) -> Found:
        """Fetches records from a backend in as few ranges as make sense."""
        order = np.argsort(words, kind="stable")
        slots, words, index = slots[order], words[order], index[order]
        handles, offset = entry.handles(words), loc_offset(entry.lows(words))
        size = entry.sizes(words)
        end = offset + size
        new = np.ones(len(words), np.bool_)
        new[1:] = (handles[1:] != handles[:-1]) | (offset[1:] > end[:-1] + tier.backend.gap_bytes)
        first = np.flatnonzero(new)
        last = np.append(first[1:], len(words)) - 1
        names = {h: tier.segment_name(h) for h in np.unique(handles).tolist()}
        reads = [
            Read(names[h], a, b - a)
            for h, a, b in zip(
                handles[first].tolist(), offset[first].tolist(), end[last].tolist(), strict=True
            )
        ]
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
            gone = TierUnavailable(f"tier {tier.name} is not reachable: {tier.error}")
            return [gone] * len(reads)
        results = await tier.backend.get(reads)
        broken = next(
            (r for r in results if isinstance(r, VswapError) and not isinstance(r, PageLost)), None
        )
        if broken is not None:
            tier.failed(broken)
        else:
            tier.succeeded()
        return results

    async def segment(self, tier: Tier, handle: int) -> Buffer:
        """A whole sealed segment. Raises what the backend says."""
        name = tier.segment_name(handle)
        stored = int(self._handles.rows["stored"][handle])
        [data] = await self._fetch(tier, [Read(name, 0, stored)])
        if isinstance(data, VswapError):
            raise data
        return data
