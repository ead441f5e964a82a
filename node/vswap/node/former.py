"""What earlier shards of this node left on its own tiers.

A node that begins anew was another shard before, and nobody but it knows that shard. So its uuid is
noted before its state is erased, as the name of an empty file, and is forgotten once nothing of it
is left. Segments of any other shard stay: they may be of a node that lives.
"""

from __future__ import annotations

import asyncio
from uuid import UUID

import structlog

from vswap.node.handles import FORMER
from vswap.node.tier import NO_CLUSTER, Tier
from vswap.node.tiers import Tiers
from vswap.tiers.backend import SegmentName, prefix
from vswap.tiers.region import Region
from vswap.wire.errors import TierUnavailable, VswapError

_AGAIN_S = 1.0
_BATCH = 256

logger = structlog.get_logger("vswap.node.former")


def noted(region: Region) -> list[UUID]:
    return [UUID(p.name.removeprefix(FORMER)) for p in region.directory.glob(f"{FORMER}*")]


async def delete_former(region: Region, tiers: Tiers, *, own: UUID, late_s: float) -> None:
    """Deletes what is left of the shards that are noted; tries until every own tier is clear.

    Cancelled or killed it begins again in the next life. ``late_s``: so long a write that a killed
    process had begun may still land.
    """
    told = ""
    while former := [shard for shard in noted(region) if shard != own]:
        try:
            found = await _delete(tiers, former)
            await asyncio.sleep(late_s)
            found += await _delete(tiers, former)
        except VswapError as error:
            if error.message != told:
                told = error.message
                logger.warning("segments of this node's earlier state stay for now", reason=told)
            await asyncio.sleep(_AGAIN_S)
            continue
        for shard in former:
            region.remove(f"{FORMER}{shard}")
        logger.info("deleted what this node's earlier state left on its own tiers", segments=found)


async def _delete(tiers: Tiers, shards: list[UUID]) -> int:
    found = 0
    for tier in [tier for tier in tiers if tier.local and tier.ram is None]:
        if not tier.opened:
            raise TierUnavailable(f"tier {tier.name} is not open yet")
        for shard in shards:
            names = await _names(tier, shard)
            found += len(names)
            for start in range(0, len(names), _BATCH):
                await tier.backend.delete(names[start : start + _BATCH])
        if tier.redundant is not None:
            # Nobody would look again at what a server that is away keeps.
            tier.redundant.check_all_up()
    return found


async def _names(tier: Tier, shard: UUID) -> list[SegmentName]:
    listed = [item.key async for item in tier.backend.list(prefix(NO_CLUSTER, shard))]
    return [name for key in listed if (name := SegmentName.parse(key)) is not None]
