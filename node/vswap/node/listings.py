"""What backends have, held against what the shard's rows say they have.

A listing takes its time. It is held against what was so before it began and still is so after it
ended, so that no segment that comes or goes meanwhile counts as a difference.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from uuid import UUID

import numpy as np

from vswap.node.differences import Checked
from vswap.node.handles import OPEN, SEALED, STATE_BITS, Handles
from vswap.node.ledger import Ledger
from vswap.node.reaper import Reaper
from vswap.node.tier import Tier
from vswap.tiers.backend import Backend, Read, SegmentName, prefix
from vswap.tiers.ram import read_directory
from vswap.tiers.record import U64
from vswap.tiers.segment import Directory, parse_directory
from vswap.wire.errors import PageCorrupt, PageLost, VswapError

_TURN = 256


class Listings:
    """Event loop only."""

    def __init__(self, handles: Handles, ledger: Ledger, reaper: Reaper) -> None:
        self._handles = handles
        self._ledger = ledger
        self._reaper = reaper

    async def compare(self, tier: Tier, seen: Checked) -> None:
        """Lists a tier's backend; of a redundant one every server."""
        if not tier.opened:
            seen.skipped.append(f"{tier.name}: {tier.error or 'not open yet'}")
        elif tier.redundant is None:
            await self._server(tier, None, tier.name, tier.backend, seen)
        else:
            for place, member in enumerate(tier.redundant.members):
                if member.up:
                    await self._server(tier, place, member.label, member.backend, seen)
                else:
                    seen.skipped.append(f"{tier.name}: {member.label}: {member.error}")

    async def _server(
        self, tier: Tier, place: int | None, where: str, backend: Backend, seen: Checked
    ) -> None:
        """``place``: of a server of a redundant tier; it need not have what its rows note."""
        handles, own = self._handles, tier.segment_name(0)
        before = np.fromiter(tier.segments, np.int64, len(tier.segments))
        before = before[handles.states(before) == SEALED]
        words: U64 = handles.rows["word"][before].copy()
        # Of all tiers: two of them may lie on one server. What is deleted from here on is no stray,
        # nor is a serial that is taken from here on.
        rows: U64 = handles.rows["word"][handles.in_use()]
        known, next_serial = rows >> np.uint64(STATE_BITS), handles.next_serial()
        listed: dict[int, int] = {}
        others: Counter[UUID] = Counter()
        # On its own tiers nobody else looks at what earlier lives may have left.
        where_to = prefix(own.cluster, None if tier.local else own.shard)
        try:
            async for item in backend.list(where_to):
                name = SegmentName.parse(item.key)
                if name is None:
                    continue
                if name.shard != own.shard:
                    others[name.shard] += 1
                else:
                    listed[name.serial] = item.bytes
        except VswapError as error:
            seen.skipped.append(f"{tier.name}: {error}")
            return
        seen.others += [
            f"{where}: {segments} segments below {prefix(own.cluster, shard)}"
            for shard, segments in others.items()
        ]
        seen.listed += len(listed)
        serials = np.fromiter(listed, np.uint64, len(listed))
        stray = ~np.isin(serials, known) & (serials < next_serial)
        for serial in serials[stray].tolist():
            seen.differ("stray", where, f"segment {serial:x} of {listed[serial]} bytes")
        for start in range(0, len(before), _TURN):
            turn = slice(start, start + _TURN)
            same = handles.rows["word"][before[turn]] == words[turn]
            for handle in before[turn][same].tolist():
                self._segment(tier, handle, place, where, listed, seen)
            await asyncio.sleep(0)

    def _segment(
        self, tier: Tier, handle: int, place: int | None, where: str, listed: dict[int, int],
        seen: Checked,
    ) -> None:  # fmt: skip
        row, name = self._handles.rows[handle], tier.segment_name(handle)
        length = int(row["stored"])
        if place is not None and tier.redundant is not None:
            if int(row["lacking"]) >> place & 1:
                return
            length = tier.redundant.part_bytes(name, place, length)
        found = listed.get(name.serial)
        if found is None:
            pages = int(self._handles.live_records[handle])
            seen.differ("missing", where, f"segment {name.serial:x} of {pages} pages")
        elif found != length:
            detail = f"has {found} bytes, its row says {length}"
            seen.differ("length", where, f"segment {name.serial:x} {detail}")

    async def directories(self, tier: Tier, seen: Checked) -> None:
        """Whether each segment's directory knows every page that is live in it: a move goes by it,
        and would leave the others behind."""
        handles = self._handles
        for handle in list(tier.segments):
            await asyncio.sleep(0)
            if handle not in tier.segments or not handles.live_records[handle]:
                continue
            if handles.state(handle) not in (OPEN, SEALED):
                continue
            where = f"segment {handles.serial(handle):x}"
            handles.pins[handle] += 1
            try:
                directory = await self._directory(tier, handle)
                # In the turn in which it was read, where it may still grow.
                known = self._ledger.live(directory, tier.tag, handle, directory.loc).sum()
                more = int(handles.live_records[handle] - known)
                if more:
                    seen.differ("directory", tier.name, f"{where} lacks {more} live pages")
            except PageLost:
                # The listing told.
                continue
            except PageCorrupt as error:
                seen.differ("directory", tier.name, error.message)
            except VswapError as error:
                seen.skipped.append(f"{tier.name}: {error}")
                return
            finally:
                self._reaper.unpin(handle)

    async def _directory(self, tier: Tier, handle: int) -> Directory:
        row, name = self._handles.rows[handle], tier.segment_name(handle)
        if tier.ram is not None:
            return read_directory(tier.ram.view(int(row["block"])), int(row["records"]))
        start, stored = int(row["payload"]), int(row["stored"])
        [got] = await tier.backend.get([Read(name, start, stored - start, stored)])
        if isinstance(got, VswapError):
            raise got
        return parse_directory(got, name, start)
