"""What the pages in RAM feel of a Redis server that is stopped while its pages are asked for."""

from __future__ import annotations

import asyncio
import os
import signal

import numpy as np

from benchmarks.common import (
    LOAD_PAGES,
    MIB,
    PAGE_BYTES,
    Result,
    loads_p99_s,
    open_shard,
    p99_result,
    ram_tier,
)
from vswap.cli.embedded import EmbeddedRedis
from vswap.node.shard import Shard
from vswap.node.spaces import Limits, Space
from vswap.tiers.spec import TierSpec
from vswap.wire.errors import TierUnavailable

_ASKERS = 4
_ASK_EVERY_S = 0.01
_TIMEOUT_S = 0.5


async def run(rounds: int = 6, seconds: float = 3.0) -> list[Result]:
    """Healthy and stopped rounds in turn, the same load in both."""
    healthy, stopped, failed = [], [], 0
    with EmbeddedRedis(maxmemory_bytes=256 * MIB) as server:
        red = TierSpec(
            name="red", url=server.url, capacity_bytes=200 * MIB, rank=1, timeout_s=_TIMEOUT_S
        )
        async with open_shard(ram_tier("ram", 64, "none"), red) as shard:
            near = shard.spaces.create("near", limits=Limits(tiers=("ram",)))
            far = shard.spaces.create("far", limits=Limits(tiers=("red",)))
            rng = np.random.default_rng(0)
            slots = np.arange(1024, dtype=np.uint64)
            for space in (near, far):
                pages = rng.integers(0, 256, (len(slots), PAGE_BYTES), np.uint8)
                await shard.pager.store(space, slots, pages)
            await _round(shard, near, far, 0.5)
            for _ in range(rounds):
                healthy.append((await _round(shard, near, far, seconds))[0])
                os.kill(server.pid, signal.SIGSTOP)
                try:
                    p99, errors = await _round(shard, near, far, seconds)
                finally:
                    os.kill(server.pid, signal.SIGCONT)
                stopped.append(p99)
                failed += errors
                await _until_served(shard, far, slots[:1])
    return [
        p99_result(
            "RAM p99 while a Redis server is stopped over before", stopped, healthy, 1.2, 1.0,
            f"beside {_ASKERS} who load from Redis every {_ASK_EVERY_S * 1e3:.0f} ms "
            f"({failed} of these failed)",
        ),
    ]  # fmt: skip


async def _round(shard: Shard, near: Space, far: Space, seconds: float) -> tuple[float, int]:
    """The p99 of loads of RAM pages in seconds, counted from when each was due (open loop), and
    how many loads of the other tier failed."""
    failed = 0

    async def ask() -> None:
        nonlocal failed
        rng = np.random.default_rng(1)
        while True:
            try:
                await shard.pager.load(far, rng.integers(0, 1024, LOAD_PAGES).astype(np.uint64))
            except TierUnavailable:
                failed += 1
            await asyncio.sleep(_ASK_EVERY_S)

    askers = [asyncio.create_task(ask()) for _ in range(_ASKERS)]
    p99_s = await loads_p99_s(shard, near, 1024, seconds)
    for asker in askers:
        asker.cancel()
    await asyncio.gather(*askers, return_exceptions=True)
    return p99_s, failed


async def _until_served(shard: Shard, far: Space, slots: np.ndarray) -> None:
    for _ in range(300):
        try:
            await shard.pager.load(far, slots)
        except TierUnavailable as error:
            await asyncio.sleep(error.fields.get("retry_after_s", 0.05))
        else:
            return
    raise RuntimeError("the tier did not heal")
