"""Batch store and load of real pages against the bare zstandard loop."""

from __future__ import annotations

import time

import numpy as np
import zstandard

from benchmarks.common import PAGE_BYTES, Result, open_shard, ram_tier, ratio, real_pages

BATCH = 256


async def run(rounds: int = 9, count: int = 4096) -> list[Result]:
    pages = real_pages(count)
    compress = zstandard.ZstdCompressor(level=1).compress
    decompress = zstandard.ZstdDecompressor().decompress
    slots = np.arange(count, dtype=np.uint64)
    times: dict[str, list[float]] = {"store": [], "load": [], "compress": [], "decompress": []}

    async with open_shard(ram_tier("zram", 256, "zstd:1")) as shard:
        space = shard.spaces.create("bench")
        for _ in range(rounds):
            start = time.perf_counter()
            encoded = [compress(page) for page in pages]
            times["compress"].append(time.perf_counter() - start)

            start = time.perf_counter()
            for i in range(0, count, BATCH):
                await shard.pager.store(space, slots[i : i + BATCH], pages[i : i + BATCH])
            times["store"].append(time.perf_counter() - start)

            start = time.perf_counter()
            for data in encoded:
                decompress(data)
            times["decompress"].append(time.perf_counter() - start)

            start = time.perf_counter()
            for i in range(0, count, BATCH):
                loaded = await shard.pager.load(space, slots[i : i + BATCH])
            times["load"].append(time.perf_counter() - start)
            assert (loaded == pages[count - len(loaded) :]).all()

    def us(name: str) -> str:
        return f"{np.median(times[name]) / count * 1e6:.1f} us/page"

    packed = count * PAGE_BYTES / sum(map(len, encoded))
    return [
        Result(
            f"store, batches of {BATCH}: time over bare zstd:1",
            ratio(times["store"], times["compress"]), floor=2.0, aim=1.5,
            note=f"{us('store')} vs {us('compress')}; pages compress {packed:.1f}x",
        ),
        Result(
            f"load, batches of {BATCH}: time over bare zstd:1",
            ratio(times["load"], times["decompress"]), floor=3.0, aim=2.0,
            note=f"{us('load')} vs {us('decompress')}, checksums verified",
        ),
    ]  # fmt: skip
