"""Redundant tiers over Redis servers: what they cost, what a dead server costs, and a rebuild."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict

import numpy as np

from benchmarks.common import MIB, PAGE_BYTES, Pages, Result, open_shard, real_pages
from vswap.cli.embedded import EmbeddedRedis, free_port
from vswap.node.directives import Directive, MoveKind
from vswap.node.shard import Shard
from vswap.node.spaces import Space
from vswap.node.upkeep import Upkeep
from vswap.tiers.redundancy.base import Redundant
from vswap.tiers.spec import TierSpec

_KINDS = {"none": (1, 0), "mirror:2": (2, 1), "rs:4+2": (6, 2)}
_LOADS = 3000


async def run(rounds: int = 3, count: int = 32768) -> list[Result]:
    """Per kind: stores in segments, single-page loads healthy and degraded, repair."""
    pages = real_pages(count)
    figures: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(rounds):
        for kind in _KINDS:
            for what, value in (await _round(kind, pages)).items():
                figures[kind, what].append(value)
    return [
        Result(
            f"{kind}: {what}", float(np.median(values)),
            unit="GB/s" if what in ("store", "rebuild") else "us", up=what in ("store", "rebuild"),
            note=f"{count * PAGE_BYTES >> 20} MiB of pages" if what == "store" else "",
        )
        for (kind, what), values in figures.items()
    ]  # fmt: skip


async def _round(kind: str, pages: Pages) -> dict[str, float]:
    count, lost = _KINDS[kind]
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(EmbeddedRedis(maxmemory_bytes=512 * MIB, port=free_port()))
            for _ in range(count)
        ]
        urls = tuple(server.url for server in servers)
        spec = TierSpec(
            name="red", url="" if lost else urls[0], urls=urls if lost else (), redundancy=kind,
            capacity_bytes=400 * MIB,
        )  # fmt: skip
        async with open_shard(spec) as shard:
            # Repair is measured, and not to begin before.
            shard.reclaim.mend = lambda tier, degraded: None  # type: ignore[method-assign]
            return await _measure(shard, pages, servers[:lost])


async def _measure(shard: Shard, pages: Pages, victims: list[EmbeddedRedis]) -> dict[str, float]:
    space = shard.spaces.create("s")
    slots = np.arange(len(pages), dtype=np.uint64)
    start = time.perf_counter()
    for i in range(0, len(pages), 2048):
        await shard.pager.store(space, slots[i : i + 2048], pages[i : i + 2048])
    found = {"store": pages.nbytes / (time.perf_counter() - start) / 1e9}
    found |= await _loads(shard, space, pages, "healthy")
    if not victims:
        return found
    for server in victims:
        server.kill()
    await _loads(shard, space, pages, "noticing")
    found |= await _loads(shard, space, pages, "degraded")
    for server in victims:
        server.start()
    tier, upkeep = shard.tiers.get("red"), shard.upkeep
    assert tier.redundant is not None
    await _until_back(tier.redundant)
    logical = int(shard.ledger.logical_by_tag[tier.tag])
    start = time.perf_counter()
    await _repair(shard, upkeep)
    found["rebuild"] = logical / (time.perf_counter() - start) / 1e9
    assert not len(upkeep.degraded(tier))
    some = slots[::37]
    assert (await shard.pager.load(space, some) == pages[some]).all()
    return found


async def _until_back(backend: Redundant) -> None:
    async with asyncio.timeout(30):
        while backend.down:
            await asyncio.sleep(0.02)


async def _repair(shard: Shard, upkeep: Upkeep) -> None:
    done = asyncio.Event()
    shard.directives.changed = done.set
    shard.directives.start(Directive("repair", MoveKind.REPAIR, "red"))
    while shard.directives.progress()[0].state != "done":
        done.clear()
        await done.wait()


async def _loads(shard: Shard, space: Space, pages: Pages, what: str) -> dict[str, float]:
    """Single pages, one after the other, in microseconds."""
    rng = np.random.default_rng(1)
    took = []
    for slot in rng.integers(0, len(pages), _LOADS).tolist():
        start = time.perf_counter()
        got = await shard.pager.load(space, np.array([slot], np.uint64))
        took.append(time.perf_counter() - start)
        assert (got[0] == pages[slot]).all()
    p50, p99 = np.percentile(took, (50, 99)) * 1e6
    return {f"{what} p50": float(p50), f"{what} p99": float(p99)}
