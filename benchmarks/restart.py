"""How long a node takes to take up an earlier life: tables recounted, segments found."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.common import Result, ram_tier
from benchmarks.memory import BATCH, compressible, fill
from vswap.node.shard import Shard
from vswap.tiers.spec import TierSpec


async def run(rounds: int = 3, fills: int = 8_000_000, real: int = 2_000_000) -> list[Result]:
    """Slots in use: fill pages, and pages in compressed RAM and in a directory of segments."""
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as state,
        tempfile.TemporaryDirectory() as disk,
    ):
        tiers = [
            ram_tier("ram", 1024, "zstd:1"),
            TierSpec(
                name="disk", url=f"file://{disk}", codec="zstd:1", capacity_bytes=8 << 30, rank=9
            ),
        ]
        shard = await Shard.open(Path(state), tiers)
        space = shard.spaces.create("s")
        for count, first, make in ((real, 0, compressible), (fills, real, fill)):
            for start in range(first, first + count, BATCH):
                slots = np.arange(start, min(start + BATCH, first + count), dtype=np.uint64)
                await shard.pager.store(space, slots, make(slots))
        took = []
        for _ in range(rounds):
            await shard.close()
            began = time.perf_counter()
            shard = await Shard.open(Path(state), tiers)
            took.append(time.perf_counter() - began)
        spread = {u.tier: u.pages for u in shard.usage()}
        pages = shard.pages
        await shard.close()
    assert pages == fills + real
    return [
        Result(f"restart with {pages:,} slots in use", median(took), "s", floor=5, aim=1,
               note=f"without the interpreter's start; pages: fill {fills:,}, "
                    + ", ".join(f"{name} {n:,}" for name, n in spread.items())),
    ]  # fmt: skip
