"""Memory of a node beyond its records, as a slope over pages; and what an empty space costs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.common import Result, open_shard, ram_tier
from vswap.node.shard import Shard
from vswap.node.spaces import Space

BATCH = 2048


def footprint(directory: Path) -> int:
    """Private memory of the process, plus what its state files hold, mapped or not.

    Not its proportional share of libraries: that changes with who else runs.
    """
    total = 0
    inside = False
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            first = line.split(" ", 1)[0]
            if first in ("Private_Clean:", "Private_Dirty:") and not inside:
                total += int(line.split()[1]) * 1024
            elif not first.endswith(":"):
                inside = str(directory) in line
    blocks = sum(path.stat().st_blocks * 512 for path in directory.iterdir())
    return total + blocks


async def run(fills: int = 10_000_000, real: int = 1_000_000) -> list[Result]:
    async with open_shard(ram_tier("ram", 2048, "zstd:1")) as shard:
        directory = shard._directory
        fill_slope = await _slope(shard, shard.spaces.create("fill"), directory, fills, fill)
        real_slope = await _slope(shard, shard.spaces.create("real"), directory, real, compressible)
        before = footprint(directory)
        empty = shard.spaces.create("empty", max_slots=1 << 32)
        created = footprint(directory) - before
        rng = np.random.default_rng(0)
        for _ in range(500):
            shard.pager.locate(empty, rng.integers(0, 1 << 32, 8192).astype(np.uint64))
        read = footprint(directory) - before
    return [
        Result(f"memory per fill page, {fills:,} pages", fill_slope, "B", floor=16, aim=10),
        Result(f"memory per compressible page beyond records, {real:,} pages", real_slope, "B",
               floor=16, aim=10),
        Result("an empty space of 2^32 slots", created / 1024, "KiB", floor=1024, aim=64,
               note=f"after reading 4 million of its slots: {read / 1024:.0f} KiB"),
    ]  # fmt: skip


def fill(slots: np.ndarray) -> np.ndarray:
    words = np.repeat((slots % 1_000_003).astype(np.uint32), 1024)
    return words.view(np.uint8).reshape(-1, 4096)


_NOISE = np.random.default_rng(1).integers(0, 256, (4096, 700), np.uint8)


def compressible(slots: np.ndarray) -> np.ndarray:
    pages = np.zeros((len(slots), 4096), np.uint8)
    pages[:, :700] = _NOISE[slots % 4096]
    pages[:, :8] = slots.view(np.uint8).reshape(-1, 8)
    return pages


async def _slope(shard: Shard, space: Space, directory: Path, count: int, make: object) -> float:
    points = []
    for start in range(0, count, BATCH):
        if start % (BATCH * max(count // BATCH // 16, 1)) == 0:
            points.append((start, footprint(directory) - shard.usage()[0].live_bytes))
        slots = np.arange(start, min(start + BATCH, count), dtype=np.uint64)
        await shard.pager.store(space, slots, make(slots))  # type: ignore[operator]
    points.append((count, footprint(directory) - shard.usage()[0].live_bytes))
    # The first half holds what a process allocates once.
    xs, ys = np.array(points[len(points) // 2 :], float).T
    return float(np.polyfit(xs, ys, 1)[0])
