"""Pages in Redis: segments against one key per page, raw and compressed, by redis-py pipelines."""

from __future__ import annotations

import time

import numpy as np
import redis.asyncio
import zstandard

from benchmarks.common import MIB, Result, open_shard, ram_tier, ratio, real_pages
from vswap.cli.embedded import EmbeddedRedis
from vswap.node.spaces import Limits
from vswap.tiers.spec import TierSpec

BATCH = 2048


async def run(rounds: int = 5, count: int = 16384) -> list[Result]:
    pages = real_pages(count)
    compress = zstandard.ZstdCompressor(level=1).compress
    slots = np.arange(count, dtype=np.uint64)
    seconds: dict[str, list[float]] = {"segments": [], "raw": [], "compressed": []}
    memory: dict[str, list[float]] = {"segments": [], "raw": [], "compressed": []}

    async def used(client: redis.asyncio.Redis) -> int:
        return int((await client.info("memory"))["used_memory"])

    for _ in range(rounds):
        # A server each, so that no one inherits another one's heap.
        for kind in ("raw", "compressed"):
            with EmbeddedRedis(maxmemory_bytes=1024 * MIB) as server:
                client = redis.asyncio.Redis.from_url(server.url)
                before = await used(client)
                start = time.perf_counter()
                for i in range(0, count, 256):
                    pipeline = client.pipeline(transaction=False)
                    for slot in range(i, min(i + 256, count)):
                        page = pages[slot].tobytes()
                        pipeline.set(f"page:{slot}", page if kind == "raw" else compress(page))
                    await pipeline.execute()
                seconds[kind].append(time.perf_counter() - start)
                memory[kind].append(await used(client) - before)
                await client.aclose()
        with EmbeddedRedis(maxmemory_bytes=1024 * MIB) as server:
            client = redis.asyncio.Redis.from_url(server.url)
            before = await used(client)
            tier = TierSpec(name="redis", url=server.url, capacity_bytes=1024 * MIB, rank=1)
            async with open_shard(ram_tier("ram", 8, "none"), tier) as shard:
                space = shard.spaces.create("bench", limits=Limits(tiers=("redis",)))
                start = time.perf_counter()
                for i in range(0, count, BATCH):
                    await shard.pager.store(space, slots[i : i + BATCH], pages[i : i + BATCH])
                seconds["segments"].append(time.perf_counter() - start)
                memory["segments"].append(await used(client) - before)
                loaded = await shard.pager.load(space, slots[:BATCH])
                assert (loaded == pages[:BATCH]).all()
                assert shard.ledger.pages_by_tag[shard.tiers.get("redis").tag] >= count * 0.9
            await client.aclose()

    def rate(kind: str) -> str:
        return f"{count / float(np.median(seconds[kind])) / 1000:.0f}k pages/s"

    def per_page(kind: str) -> str:
        return f"{float(np.median(memory[kind])) / count:.0f} B/page"

    return [
        Result(
            "Redis: pages/s over one raw page per key", ratio(seconds["raw"], seconds["segments"]),
            floor=1.5, aim=4.0, up=True, note=f"{rate('segments')} vs {rate('raw')}",
        ),
        Result(
            "Redis: server memory over one raw page per key",
            ratio(memory["segments"], memory["raw"]),
            floor=0.5, aim=0.35, note=f"{per_page('segments')} vs {per_page('raw')}",
        ),
        Result(
            "Redis: server memory over one compressed page per key",
            ratio(memory["segments"], memory["compressed"]),
            aim=0.9, note=f"{per_page('segments')} vs {per_page('compressed')}",
        ),
        Result(
            "Redis: pages/s over one compressed page per key",
            ratio(seconds["compressed"], seconds["segments"]), up=True,
            note=f"{rate('segments')} vs {rate('compressed')}",
        ),
    ]  # fmt: skip
