"""Promotion: pages that are loaded again and again from a slow tier move to the fastest one.

Off the read path: the pager hands over what it has just read and verified; a bounded queue takes it
or drops it; the flip is the same compare-and-set as in every other move.
"""

from __future__ import annotations

import asyncio
from collections import Counter

import numpy as np

from vswap.node import entry
from vswap.node.codecs import Codecs
from vswap.node.handles import Handles
from vswap.node.ledger import Ledger
from vswap.node.log import MOVED
from vswap.node.reader import Found, Reader
from vswap.node.reaper import Reaper
from vswap.node.spaces import Space
from vswap.node.tier import Tier
from vswap.node.tiers import Tiers
from vswap.tiers.record import U64, Records
from vswap.wire.errors import VswapError

HOT_LOADS = 3
"""Loads of a page from a slow tier that make it hot."""

_QUEUE_BATCHES = 64
_QUEUE_BYTES = 4 * 2**20
"""Of records that wait: what is hot beyond that is loaded, and offered, again."""
_MOST_FULL = 0.95


class Promoter:
    """Event loop only. Run :meth:`run` as a task."""

    def __init__(
        self, handles: Handles, ledger: Ledger, tiers: Tiers, codecs: Codecs, reader: Reader,
        reaper: Reaper,
    ) -> None:  # fmt: skip
        self._handles = handles
        self._reader = reader
        self._reaper = reaper
        self._ledger = ledger
        self._tiers = tiers
        self._codecs = codecs
        self._queue: asyncio.Queue[tuple[Space, Records, U64]] = asyncio.Queue(_QUEUE_BATCHES)
        self.queued_bytes = 0
        """Memory of records that wait for promotion, or are being promoted."""
        self.counters: Counter[str] = Counter()

    def offer(self, space: Space, slots: U64, words: U64, found: Found) -> None:
        """Called by the pager after a load from a tier that is not RAM. Cheap; may do nothing.

        What is queued keeps its segments pinned: a handle that was recycled meanwhile could make
        an old entry look like the slot's present one. Records are copied: the load's buffer has
        all the pages of its batch, cold ones too.
        """
        if self._queue.full() or space.deleted:
            return
        # The load has awaited since it looked: only slots that still say so have heat to read.
        index, first = np.unique(found.index, return_index=True)
        here = np.flatnonzero(space.table.get(slots[index]) == words[index])
        hot = here[space.table.heat(slots[index[here]]) >= HOT_LOADS]
        if not len(hot) or self._target(space) is None:
            return
        chosen = words[index[hot]]
        distinct, keep = np.unique(chosen, return_index=True)
        records = found.records.take(first[hot][keep])
        fits = np.cumsum(records.size) <= _QUEUE_BYTES - self.queued_bytes
        if not fits.any():
            return
        records, distinct = records.take(fits).copy(), distinct[fits]
        self._handles.pins[np.unique(entry.handles(distinct))] += 1
        self.queued_bytes += records.blob.nbytes
        self._queue.put_nowait((space, records, distinct))

    def _target(self, space: Space) -> Tier | None:
        for tier in self._tiers.ranked:
            if (
                tier.ram is not None
                and tier.writable
                and space.limits.allows(tier.name)
                and tier.name not in space.limits.tier_max_bytes
                and tier.fullness < min(tier.spec.high, _MOST_FULL)
            ):
                return tier
        return None

    async def bring(self, space: Space, slots: U64) -> None:
        """Moves pages to RAM now, however often they were loaded: what a caller who knows better
        asks for. As far as there is room; what cannot be read or moved stays where it is."""
        words = space.table.get(slots)
        tags = entry.tags(words)
        stored = np.unique(tags[(tags >= entry.FIRST_TIER) & (tags <= entry.LAST_TIER)])
        slow = [tier for tier in map(self._tiers.by_tag, stored.tolist()) if tier.ram is None]
        # All of them now: while one tier is read, what lies in the others may die.
        pinned = np.unique(entry.handles(words[np.isin(tags, [tier.tag for tier in slow])]))
        self._handles.pins[pinned] += 1
        try:
            for tier in slow:
                if self._target(space) is None:
                    break
                some, old = slots[tags == tier.tag], words[tags == tier.tag]
                found = await self._reader.in_backend(tier, space, some, old, np.arange(len(some)))
                ok = found.records.valid()
                await self._promote(space, found.records.take(ok), old[found.index[ok]])
        finally:
            self._reaper.unpin_many(pinned)

    async def run(self) -> None:
        """Promotes what was offered, for ever."""
        while True:
            space, records, words = await self._queue.get()
            try:
                await self._promote(space, records, words)
            finally:
                self.queued_bytes -= records.blob.nbytes
                self._reaper.unpin_many(np.unique(entry.handles(words)))

    async def _promote(self, space: Space, records: Records, words: U64) -> None:
        target = self._target(space)
        if target is None or space.deleted or not len(records):
            return
        try:
            ready = await self._codecs.transcode(records, target.codec)
            placed = self._tiers.ram_log(target).place(ready, MOVED)
        except VswapError:
            self.counters["promotions_without_room"] += 1
            return
        moved = self._ledger.flip_where(ready, words, placed.words)
        self._tiers.ram_log(target).settle(placed)
        self.counters["promoted_pages"] += int(moved.sum())
