"""Choosers: where a record that leaves its place may go.

A chooser answers a tag per record, first tier first, within three bounds: what the space allows,
the space's limit in that tier, and the tier's room less what other evacuations have staged for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vswap.node.evacuator import STAY, Chooser, Evacuator
from vswap.node.ledger import by_space
from vswap.node.spaces import Spaces
from vswap.node.tier import Tier
from vswap.tiers.record import I64, U8, Mask, Records

HOT = 2
"""Loads since the last second chance that keep a record in its tier."""


class Choosers:
    """Makes choosers over the shard's spaces. Event loop only."""

    def __init__(self, spaces: Spaces, evacuator: Evacuator) -> None:
        self._spaces = spaces
        self._evacuator = evacuator

    def first_fit(
        self,
        candidates: Callable[[], Sequence[Tier]],
        *,
        second_chance: bool = False,
    ) -> Chooser:
        """The first candidate that may and can take the record; else it stays.

        ``second_chance`` rewrites hot records in their own tier, once per two loads.
        """

        def choose(tier: Tier, records: Records) -> U8:
            targets = np.zeros(len(records), np.uint8)
            open_ = np.ones(len(records), np.bool_)
            if second_chance and tier.room(compacting=True) > 2 * tier.backend.segment_bytes:
                hot = self._hot(records)
                targets[hot] = tier.tag
                open_ &= ~hot
            for target in candidates():
                if not open_.any():
                    break
                if target is tier or not target.writable:
                    continue
                room = target.room() - self._evacuator.promised[target.tag]
                if room < target.backend.segment_bytes:
                    # Less than a segment is not worth asking for, and may be gone by the write.
                    continue
                fits = self._fits(target, records, open_, room)
                targets[fits] = target.tag
                open_ &= ~fits
            return targets

        return choose

    def rewrite(self) -> Chooser:
        """Everything back into its own tier: compaction."""

        def choose(tier: Tier, records: Records) -> U8:
            return np.full(len(records), tier.tag, np.uint8)

        return choose

    def within(self, chooser: Chooser, budget: Callable[[], int]) -> Chooser:
        """Only as many bytes as ``budget`` says at that moment; the rest stays."""

        def choose(tier: Tier, records: Records) -> U8:
            targets = chooser(tier, records)
            cost: I64 = np.where(targets != STAY, records.cost, 0)
            targets[np.cumsum(cost) - cost >= budget()] = STAY
            return targets

        return choose

    def _hot(self, records: Records) -> Mask:
        hot = np.zeros(len(records), np.bool_)
        for number, index in by_space(records.space):
            space = self._spaces.by_number.get(number)
            if space is None:
                continue
            slots = records.slot[index].astype(np.uint64)
            hot[index] = space.table.heat(slots) >= HOT
            space.table.cool(slots)
        return hot

    def _fits(self, target: Tier, records: Records, open_: Mask, room: int) -> Mask:
        fits = np.zeros(len(records), np.bool_)
        cost = records.cost
        for number, index in by_space(records.space):
            space = self._spaces.by_number.get(number)
            if space is None or not space.limits.allows(target.name):
                continue
            most = space.limits.tier_max_bytes.get(target.name)
            own = room
            if most is not None:
                staged = self._evacuator.promised_to.get((number, target.tag), 0)
                own = min(room, most - int(space.bytes_by_tag[target.tag]) - staged)
            wanted = open_[index]
            fits[index] = wanted & (np.cumsum(np.where(wanted, cost[index], 0)) <= own)
        taken = np.where(fits, cost, 0)
        return fits & (np.cumsum(taken) <= room)
