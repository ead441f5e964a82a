"""What earlier shards of this node left on its own tiers.

A node that begins anew was another shard before, and nobody but it knows that shard. So its uuid is
noted before its state is erased, as the name of an empty file, and is forgotten once nothing of it
is left. Segments of any other shard stay: they may be of a node that lives.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
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
    found = []
    for path in region.directory.glob(f"{FORMER}*"):
        # Somebody else's file is none of ours.
        with suppress(ValueError):
            found.append(UUID(path.name.removeprefix(FORMER)))
    return found


async def delete_former(region: Region, tiers: Tiers, *, own: UUID, late_s: float) -> None:
    """Deletes what is left of the shards that are noted; tries until every own tier is clear.

    Cancelled or killed it begins again in the next life. ``late_s``: so long a write that a killed
    process had begun may still land.
    """
    former = [shard for shard in noted(region) if shard != own]
    if not former:
        return
    async with asyncio.TaskGroup() as clearing:
        # Each by itself: one that is away holds up none.
        tasks = [
            clearing.create_task(_clear(tier, former, late_s))
            for tier in tiers
            if tier.local and tier.ram is None
        ]
    for shard in former:
        region.remove(f"{FORMER}{shard}")
    found = sum(task.result() for task in tasks)
    logger.info("deleted what this node's earlier state left on its own tiers", segments=found)


async def _clear(tier: Tier, shards: list[UUID], late_s: float) -> int:
    """Tries until nothing of the shards is there; returns how many segments it found."""
    told = ""
    while True:
        try:
            found = await _delete(tier, shards)
            await asyncio.sleep(late_s)
            return found + await _delete(tier, shards)
        except Exception as error:
            if str(error) != told:
                told = str(error)
                logger.warning(
                    "segments of this node's earlier state stay for now", tier=tier.name,
                    reason=told, exc_info=None if isinstance(error, VswapError) else error,
                )  # fmt: skip
        await asyncio.sleep(_AGAIN_S)


async def _delete(tier: Tier, shards: list[UUID]) -> int:
    if not tier.opened:
        raise TierUnavailable(f"tier {tier.name} is not open yet")
    found = 0
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
