"""The check: tables, books, rows, blocks of RAM and backends' listings held against each other.

While the node works. What lies in its memory is compared within one turn, in which all of it must
agree; the tables are counted over many turns, but exactly (:mod:`vswap.node.recount`). So what is
reported is wrong. Nothing is changed, and no page is read: whether bytes are good is for the scrub.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import numpy as np

from vswap.node import entry
from vswap.node.differences import Checked, some
from vswap.node.handles import DELETING, FREE, OPEN, SEALED, STATE_BITS, WRITING, Handles
from vswap.node.ledger import Ledger
from vswap.node.listings import Listings
from vswap.node.reaper import Reaper
from vswap.node.recount import Recount
from vswap.node.spaces import Space
from vswap.node.tier import Tier, TierState
from vswap.node.tiers import Tiers
from vswap.tiers.ram import RamBackend
from vswap.tiers.record import I64, ROW_BYTES, U64, Mask, loc_offset


class Checker:
    """Event loop only; several checks may run at once."""

    def __init__(self, handles: Handles, ledger: Ledger, tiers: Tiers, reaper: Reaper) -> None:
        self._handles = handles
        self._ledger = ledger
        self._tiers = tiers
        self._reaper = reaper
        self._listings = Listings(handles, ledger, reaper)

    async def check(self, seen: Checked, *, deep: bool = False) -> Checked:
        """One check of everything; ``seen`` tells how far it is. ``deep`` reads the directories of
        segments on backends too: one range of each."""
        await self._tables(seen)
        self._rows(seen)
        for tier in self._tiers:
            await asyncio.sleep(0)
            self._tier(tier, seen)
            if tier.ram is not None:
                self._blocks(tier, tier.ram, seen)
            else:
                await self._listings.compare(tier, seen)
            if deep or tier.ram is not None:
                await self._listings.directories(tier, seen)
        return seen

    # ---------------------------------------------------------------- tables and books

    async def _tables(self, seen: Checked) -> None:
        recount = Recount(self._ledger)
        async with aclosing(recount.run()) as steps:
            async for space, chunk, slots, words in steps:
                self._entries(space, slots, words, seen)
                if space.table.counted(chunk) != len(slots):
                    detail = f"chunk {chunk} counts {space.table.counted(chunk)} slots in use"
                    seen.differ("table", space.name, f"{detail}, and has {len(slots)}")
                seen.slots += len(slots)
            # In the turn in which the count ended.
            self._books(recount, seen)
        for space in self._ledger.spaces:
            if space.number in self._ledger.spaces.by_number:
                for chunk in space.table.astray().tolist():
                    seen.differ("table", space.name, f"chunk {chunk} has entries, and counts none")
            await asyncio.sleep(0)

    def _entries(self, space: Space, slots: U64, words: U64, seen: Checked) -> None:
        def differ(bad: Mask, detail: str) -> None:
            if bad.any():
                seen.differ("entry", space.name, f"{some('slots', slots[bad])} {detail}")

        differ(slots >= space.max_slots, "beyond the space's maximum")
        rows, tags = self._handles.rows, entry.tags(words)
        in_tier = (tags >= entry.FIRST_TIER) & (tags <= entry.LAST_TIER)
        slots, words, tags = slots[in_tier], words[in_tier], tags[in_tier]
        known = np.isin(tags, [tier.tag for tier in self._tiers])
        differ(~known, "in a tier that this node does not have")
        handles = entry.handles(words)
        handles[handles >= self._handles.allocated] = 0
        readable = np.isin(self._handles.states(handles), (OPEN, SEALED))
        readable &= (rows["tag"][handles] == tags) & (handles == entry.handles(words))
        differ(known & ~readable, "in a segment that cannot be read")
        end = loc_offset(entry.lows(words)) + entry.sizes(words)
        differ(readable & (end > rows["payload"][handles]), "beyond their segment's records")

    def _books(self, recount: Recount, seen: Checked) -> None:
        ledger, none = self._ledger, np.zeros(entry.TAGS, np.int64)
        for space in ledger.spaces:
            for what, kept, counted in (
                ("pages", space.pages_by_tag, recount.pages[space.number]),
                ("bytes", space.bytes_by_tag, recount.bytes[space.number]),
            ):
                self._account(space.name, what, kept, counted, seen)
        for what, kept, counted in (
            ("pages", ledger.pages_by_tag, sum(recount.pages.values(), none)),
            ("bytes", ledger.bytes_by_tag, sum(recount.bytes.values(), none)),
            ("page bytes", ledger.logical_by_tag, recount.logical_by_tag),
            ("lost pages", ledger.lost_by_tag, recount.lost_by_tag),
        ):
            self._account("node", what, kept, counted, seen)
        handles, count = self._handles, len(recount.live_records)
        for what, kept, counted in (
            ("live records", handles.live_records, recount.live_records),
            ("live bytes", handles.live_bytes, recount.live_bytes),
        ):
            for handle in np.flatnonzero(kept[:count] != counted).tolist():
                detail = f"{counted[handle]} {what}, the books say {kept[handle]}"
                seen.differ("books", "node", f"segment {handles.serial(handle):x}: {detail}")

    def _account(self, where: str, what: str, kept: I64, counted: I64, seen: Checked) -> None:
        names = {tier.tag: tier.name for tier in self._tiers} | {entry.FILL: "fill"}
        for tag in np.flatnonzero(kept != counted).tolist():
            detail = f"{counted[tag]} {what} of {names.get(tag, f'tag {tag}')}"
            seen.differ("books", where, f"{detail}, the books say {kept[tag]}")

    # ---------------------------------------------------------------- rows, tiers, blocks

    def _rows(self, seen: Checked) -> None:
        handles = self._handles
        every = np.arange(handles.allocated)
        spare = np.bincount(handles.spare(), minlength=len(every))
        wrong = np.flatnonzero(spare != (handles.states(every) == FREE))
        if len(wrong):
            seen.differ("handles", "node", f"{some('handles', wrong)} in use and spare, or neither")
        unpinned = np.flatnonzero(handles.pins < 0)
        if len(unpinned):
            seen.differ("row", "node", f"{some('handles', unpinned)} unpinned twice")
        used = handles.in_use()
        serials: U64 = handles.rows["word"][used] >> np.uint64(STATE_BITS)
        if len(np.unique(serials)) < len(used) or (serials >= handles.next_serial()).any():
            seen.differ("row", "node", "a serial is used twice, or was never taken")
        stranger = ~np.isin(handles.rows["tag"][used], [tier.tag for tier in self._tiers])
        if stranger.any():
            seen.differ("row", "node", f"{some('handles', used[stranger])} of no tier of this node")

    def _tier(self, tier: Tier, seen: Checked) -> None:
        handles = self._handles
        used = handles.in_use()
        own = used[handles.rows["tag"][used] == tier.tag]

        def differ(kind: str, bad: I64, detail: str) -> None:
            for handle in bad.tolist():
                seen.differ(kind, tier.name, f"segment {handles.serial(handle):x} {detail}")

        known = np.fromiter(tier.segments, np.int64, len(tier.segments))
        differ("tier", np.setdiff1d(own, known), "has a row, and the tier does not know it")
        differ("tier", np.setdiff1d(known, own), "is known to the tier, and has no row")
        stored = int(handles.rows["stored"][own].sum())
        if stored != tier.stored_bytes:
            detail = f"segments of {stored} bytes, the books say {tier.stored_bytes}"
            seen.differ("tier", tier.name, detail)
        if not tier.local and tier.state is TierState.ACTIVE and stored > tier.limit_bytes:
            seen.differ("grant", tier.name, f"{stored} bytes stored, {tier.limit_bytes} granted")
        states = handles.states(own)
        fitting = (OPEN,) if tier.ram is not None else (WRITING, SEALED, DELETING)
        differ("row", own[~np.isin(states, fitting)], "is in a state that it cannot be in")
        dead = (handles.live_records[own] == 0) & (handles.pins[own] == 0) & (states != WRITING)
        for handle in own[dead].tolist():
            if not self._reaper.will_delete(handle) and not self._reaper.is_head(handle):
                differ("row", np.array([handle]), "is dead, and nobody deletes it")
        seen.segments += len(own)

    def _blocks(self, tier: Tier, arena: RamBackend, seen: Checked) -> None:
        owners, unowned = arena.owners(), arena.unowned()
        taken = np.bincount([*owners.values(), *unowned], minlength=arena.blocks)
        for block in np.flatnonzero(taken != 1).tolist():
            who = [f"segment {name.serial:x}" for name, owned in owners.items() if owned == block]
            who += ["the free ones"] * unowned.count(block)
            seen.differ("block", tier.name, f"block {block} is of {' and '.join(who) or 'nobody'}")
        names = {tier.segment_name(handle): handle for handle in tier.segments}
        for name in owners.keys() - names.keys():
            seen.differ("block", tier.name, f"segment {name.serial:x} has a block, and no row")
        for name, handle in names.items():
            row = self._handles.rows[handle]
            if owners.get(name) != int(row["block"]):
                detail = f"is in block {owners.get(name)}, its row says {row['block']}"
                seen.differ("block", tier.name, f"segment {name.serial:x} {detail}")
            if int(row["payload"]) + int(row["records"]) * ROW_BYTES > arena.block_bytes:
                seen.differ("block", tier.name, f"segment {name.serial:x} is longer than a block")
