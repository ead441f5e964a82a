"""The sweep: deletes what the shard left on a backend without knowing.

A write that timed out may land after its deletion. So each shard lists its own prefix now and then,
and deletes serials that it has used and that are in no row. What it should find there and does not
is noted as missing. Other shards' segments are none of its business.
"""

from __future__ import annotations

from vswap.node.handles import Handles
from vswap.node.lost import note_missing, sealed
from vswap.node.tier import Tier
from vswap.tiers.backend import SegmentName, prefix


class Sweeper:
    """Event loop only."""

    def __init__(self, handles: Handles) -> None:
        self._handles = handles
        self.swept = 0

    async def sweep(self, tier: Tier) -> int:
        """Deletes the shard's strays on a tier; returns how many. Raises what the backend says."""
        if tier.ram is not None or tier.fenced:
            return 0
        # A serial taken from here on is not a stray even if it shows up in the listing.
        next_serial = self._handles.next_serial()
        before = sealed(tier, self._handles)
        strays: list[SegmentName] = []
        names = tier.segment_name(0)
        async for listed in tier.backend.list(prefix(names.cluster, names.shard)):
            name = SegmentName.parse(listed.key)
            if name is not None and name.serial < next_serial:
                strays.append(name)
        if tier.redundant is None:
            note_missing(tier, before, {name.serial for name in strays}, self._handles)
        # Of all tiers: two of them may lie on one backend, and a serial is unique in the shard.
        known = {self._handles.serial(handle) for handle in self._handles.in_use().tolist()}
        strays = [name for name in strays if name.serial not in known]
        if strays:
            await tier.backend.delete(strays)
            self.swept += len(strays)
        return len(strays)
