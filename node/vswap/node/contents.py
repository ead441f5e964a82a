"""Reading whole segments, everything verified: what the mover and the scrub begin with.

A segment whose hash is right is taken as it is. Of any other nothing is believed: the tables tell
which records lie there, and each is read as a load reads it, again, and from wherever else its tier
has it. What no reading gives right is set aside, so that it holds up nothing else. What did not
come at all (of a torn segment), or what a server may have right that is away, stays where it is.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import numpy as np
import structlog

from vswap.node import entry
from vswap.node.handles import Handles
from vswap.node.ledger import Ledger
from vswap.node.lost import pages_in
from vswap.node.reader import READS, Reader
from vswap.node.spaces import Space
from vswap.node.tier import Tier
from vswap.tiers import ram
from vswap.tiers.record import U32, U64, Mask, Records, concatenate
from vswap.tiers.segment import parse
from vswap.wire.errors import PageCorrupt, PageLost, TierUnavailable

TURN_RECORDS = 64
"""Records copied or hashed in one turn of the loop: 2 MiB in one piece cost neighbours 1 ms."""

logger = structlog.get_logger("vswap.node.contents")


@dataclass(frozen=True, slots=True)
class Contents:
    """Verified records of a segment, dead ones perhaps among them."""

    records: Records
    loc: U32
    missing: int = 0
    """Live records whose bytes the backend does not have."""
    doubtful: TierUnavailable | None = None
    """Live records failed, while servers are away that may have them right."""


class ContentsReader:
    """Event loop only. The caller has pinned the segment."""

    def __init__(self, handles: Handles, ledger: Ledger, reader: Reader) -> None:
        self._handles = handles
        self._ledger = ledger
        self._reader = reader

    async def read(self, tier: Tier, handle: int, *, thorough: bool = False) -> Contents:
        """Raises PageLost where the backend has nothing of the segment; TierUnavailable.

        ``thorough``: reads record by record what is not available as a whole. That is slow.
        """
        if tier.ram is not None:
            return await self._in_ram(tier, tier.ram, handle)
        outages = tier.redundant.outages if tier.redundant is not None else 0
        away: TierUnavailable | None = None
        try:
            for _ in range(READS):
                data = await self._reader.segment(tier, handle)
                try:
                    return Contents(*parse(data, tier.segment_name(handle)))
                except PageCorrupt:
                    continue
        except PageLost:
            if not await self._reader.exists(tier, handle):
                raise
        except TierUnavailable as error:
            # Where no server was asked, none would be for its records.
            if not thorough or not tier.opened or "retry_after_s" in error.fields:
                raise
            away = error
        good, bad, missing = await self._by_the_tables(tier, handle, away)
        backend = tier.redundant
        if away or (backend is not None and (backend.down or backend.outages > outages)):
            left = missing + self._live(tier, handle, bad)
            return Contents(*good, doubtful=(away or _doubt(tier, left)) if left else None)
        self._set_aside(tier, handle, *bad)
        return Contents(*good, missing=missing)

    async def _in_ram(self, tier: Tier, arena: ram.RamBackend, handle: int) -> Contents:
        row = self._handles.rows[handle]
        found = ram.read_block(
            arena.view(int(row["block"])), int(row["records"]), tier.segment_name(handle)
        )
        if self._live(tier, handle, found) < self._handles.live_records[handle]:
            parts = [_NOTHING]
            async for space, slots, words in pages_in(tier, [handle], self._ledger):
                there = self._reader.in_ram(tier, space, slots, words, np.arange(len(slots)))
                parts.append((there.records, entry.lows(words)))
            found = _joined(parts)
        records, loc = found
        ok = await self._valid(records)
        if not ok.all():
            self._set_aside(tier, handle, records.take(~ok), loc[~ok])
            records, loc = records.take(ok), loc[ok]
        return Contents(records, loc)

    async def _by_the_tables(
        self, tier: Tier, handle: int, known: TierUnavailable | None
    ) -> tuple[_Found, _Found, int]:
        """What the tables say lies in a segment, read record by record: what is right, what came
        and is not, and how many did not come. Looks at every table, so it is slow.

        Raises TierUnavailable, unless that much is ``known``: then it takes what comes."""
        good, bad, missing = [_NOTHING], [_NOTHING], 0
        async for space, slots, words in pages_in(tier, [handle], self._ledger):
            left = np.arange(len(slots))
            for reads in range(READS):
                found = await self._reader.in_backend(
                    tier, space, slots[left], words[left], left, apart=reads > 0
                )
                away = [e for _, e in found.failed if not isinstance(e, PageLost | PageCorrupt)]
                if away and known is None:
                    raise away[0]
                ok = await self._valid(found.records)
                good.append((found.records.take(ok), entry.lows(words[found.index[ok]])))
                left = np.setdiff1d(left, found.index[ok])
                if not len(left):
                    break
            else:
                # Servers that are away are not asked again, record by record.
                some = left if known is None else np.intersect1d(left, found.index)
                healed, still = await self._elsewhere(tier, space, slots, words, some)
                good.append(healed)
                left = np.union1d(np.setdiff1d(left, some), still)
                wrong = np.isin(found.index, left) & ~ok
                bad.append((found.records.take(wrong), entry.lows(words[found.index[wrong]])))
                missing += len(left) - int(wrong.sum())
        return _joined(good), _joined(bad), missing

    async def _elsewhere(
        self, tier: Tier, space: Space, slots: U64, words: U64, left: np.ndarray
    ) -> tuple[_Found, np.ndarray]:
        """Records from what else their tier has of them, and which ones are then left."""
        found, healed = await self._reader.elsewhere(tier, space.number, slots[left], words[left])
        if found is None:
            return _NOTHING, left
        return (found, entry.lows(words[left[healed]])), left[~healed]

    async def _valid(self, records: Records) -> Mask:
        parts = []
        for start in range(0, len(records), TURN_RECORDS):
            parts.append(records.take(slice(start, start + TURN_RECORDS)).valid())
            await asyncio.sleep(0)
        return np.concatenate(parts) if parts else np.zeros(0, np.bool_)

    def _live(self, tier: Tier, handle: int, found: _Found) -> int:
        return int(np.count_nonzero(self._ledger.live(found[0], tier.tag, handle, found[1])))

    def _set_aside(self, tier: Tier, handle: int, bad: Records, loc: U32) -> None:
        """Says in the entries of damaged records that they are."""
        live = self._ledger.live(bad, tier.tag, handle, loc)
        if live.any():
            bad, loc = bad.take(live), loc[live]
            old = entry.tier_words(tier.tag, handle, loc)
            poison = np.full(len(bad), entry.poison_word(tier.tag, entry.POISON_CORRUPT))
            moved = self._ledger.flip_where(bad, old, poison)
            tier.quarantined += int(moved.sum())
            logger.error("records failed their check", tier=tier.name, records=int(moved.sum()))


_Found = tuple[Records, U32]
"""Records of a segment, and their locs."""

_NOTHING: _Found = (
    Records(*(np.zeros(0, t) for t in ("u1", "i8", "i8", "u4", "u4", "u8", "u8"))),
    np.zeros(0, np.uint32),
)


def _joined(parts: list[_Found]) -> _Found:
    return concatenate([records for records, _ in parts]), np.concatenate([loc for _, loc in parts])


def _doubt(tier: Tier, records: int) -> TierUnavailable:
    return TierUnavailable(
        f"{records} records failed their check, and servers of tier {tier.name} are away that may "
        "have them right", tier=tier.name,
    )  # fmt: skip
