"""What loads feel of the scrub that verifies everything in the background."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.common import (
    MIB,
    PAGE_BYTES,
    Result,
    loads_p99_s,
    open_shard,
    p99_result,
    ram_tier,
)
from vswap.node.config import NodeConfig
from vswap.node.scrub import Scrubbed
from vswap.node.shard import Shard
from vswap.node.spaces import Limits
from vswap.tiers.spec import TierSpec

_HOT = 1024


async def run(rounds: int = 6, seconds: float = 3.0) -> list[Result]:
    """Rounds with and without a scrub in turn, at the rate that nodes scrub at unless told."""
    rate = NodeConfig.model_fields["scrub_bytes_s"].default
    calm, scrubbed = [], []
    with TemporaryDirectory() as root:
        disk = TierSpec(
            name="disk", url=f"file://{Path(root)}/disk", capacity_bytes=400 * MIB, rank=10
        )
        async with open_shard(ram_tier("ram", 64, "none"), disk) as shard:
            near = shard.spaces.create("near", limits=Limits(tiers=("ram",)))
            far = shard.spaces.create("far", limits=Limits(tiers=("disk",)))
            rng = np.random.default_rng(0)
            for space, count in ((near, 8 * _HOT), (far, 32 * _HOT)):
                for start in range(0, count, 512):
                    slots = np.arange(start, start + 512, dtype=np.uint64)
                    pages = rng.integers(0, 256, (len(slots), PAGE_BYTES), np.uint8)
                    await shard.pager.store(space, slots, pages)
            await loads_p99_s(shard, near, _HOT, 0.5)
            for _ in range(rounds):
                calm.append(await loads_p99_s(shard, near, _HOT, seconds))
                scrub = asyncio.create_task(_scrub(shard, rate))
                scrubbed.append(await loads_p99_s(shard, near, _HOT, seconds))
                scrub.cancel()
                with suppress(asyncio.CancelledError):
                    await scrub
            verified = shard.scrubber.counters["scrubbed_bytes"] / rounds / seconds / MIB
    return [
        p99_result(
            "RAM p99 during a scrub over without", scrubbed, calm, 1.5, 1.2,
            f"while {verified:.1f} MiB/s are verified, in RAM and on a disk",
        ),
    ]  # fmt: skip


async def _scrub(shard: Shard, rate_bytes_s: int) -> None:
    while True:
        await shard.scrub(rate_bytes_s, Scrubbed())
