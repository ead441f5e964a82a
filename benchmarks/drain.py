"""Draining a Redis tier into another one: speed, and what the neighbours feel of it."""

from __future__ import annotations

import asyncio
import time

import numpy as np

from benchmarks.common import MIB, PAGE_BYTES, Pages, Result, open_shard, ram_tier, real_pages
from vswap.cli.embedded import EmbeddedRedis
from vswap.node.directives import Directive, MoveKind
from vswap.node.shard import Shard
from vswap.node.spaces import Limits, Space
from vswap.node.tier import TierState
from vswap.tiers.spec import TierSpec

_FOREGROUND_BATCH = 16
_PERIOD_S = 0.004


async def run(rounds: int = 3, count: int = 65536) -> list[Result]:
    pages = real_pages(count)
    speed, ratios, befores, durings = [], [], [], []
    for _ in range(rounds):
        with (
            EmbeddedRedis(maxmemory_bytes=1024 * MIB) as a,
            EmbeddedRedis(maxmemory_bytes=1024 * MIB) as b,
        ):
            speed.append(await _idle(pages, a, b))
        with (
            EmbeddedRedis(maxmemory_bytes=1024 * MIB) as a,
            EmbeddedRedis(maxmemory_bytes=1024 * MIB) as b,
        ):
            before, during = await _loaded(pages, a, b)
            ratios.append(during / before)
            befores.append(before)
            durings.append(during)
    return [
        Result(
            "drain Redis to Redis: logical GB/s", float(np.median(speed)), unit="GB/s",
            floor=0.5, aim=1.4, up=True, note=f"{count * PAGE_BYTES >> 20} MiB of pages",
        ),
        Result(
            "foreground p99 during a drain over before", float(np.median(ratios)), aim=2.0,
            note=f"{np.median(durings) * 1e3:.2f} ms vs {np.median(befores) * 1e3:.2f} ms, "
            f"loads and stores of {_FOREGROUND_BATCH} pages in RAM, open loop, "
            f"every {_PERIOD_S * 1e3:.0f} ms",
        ),
    ]  # fmt: skip


def _tiers(a: EmbeddedRedis, b: EmbeddedRedis) -> list[TierSpec]:
    return [
        ram_tier("ram", 64, "zstd:1"),
        TierSpec(name="a", url=a.url, capacity_bytes=900 * MIB, rank=1),
        TierSpec(name="b", url=b.url, capacity_bytes=900 * MIB, rank=2),
    ]


async def _fill(shard: Shard, pages: Pages) -> Space:
    space = shard.spaces.create("far", limits=Limits(tiers=("a", "b")))
    slots = np.arange(len(pages), dtype=np.uint64)
    for i in range(0, len(pages), 2048):
        await shard.pager.store(space, slots[i : i + 2048], pages[i : i + 2048])
    return space


async def _drain(shard: Shard, rate_bytes_s: int = 0) -> float:
    """Drains tier a; returns logical bytes a second."""
    tier = shard.tiers.get("a")
    logical = int(shard.ledger.logical_by_tag[tier.tag])
    tier.state = TierState.DRAINING
    done = asyncio.Event()
    shard.directives.changed = done.set
    start = time.perf_counter()
    shard.directives.start(Directive("drain", MoveKind.DRAIN, "a", rate_bytes_s=rate_bytes_s))
    while shard.directives.progress()[0].state != "done":
        done.clear()
        await done.wait()
    elapsed = time.perf_counter() - start
    assert not tier.segments
    return logical / elapsed


async def _idle(pages: Pages, a: EmbeddedRedis, b: EmbeddedRedis) -> float:
    async with open_shard(*_tiers(a, b)) as shard:
        space = await _fill(shard, pages)
        speed = await _drain(shard)
        slots = np.arange(0, len(pages), 37, dtype=np.uint64)[:2048]
        assert (await shard.pager.load(space, slots) == pages[slots]).all()
    return speed / 1e9


async def _loaded(pages: Pages, a: EmbeddedRedis, b: EmbeddedRedis) -> tuple[float, float]:
    async with open_shard(*_tiers(a, b)) as shard:
        await _fill(shard, pages)
        near = shard.spaces.create("near", limits=Limits(tiers=("ram",)))
        slots = np.arange(1024, dtype=np.uint64)
        await shard.pager.store(near, slots, pages[:1024])
        before = await _foreground(shard, near, pages, asyncio.sleep(2.0))
        during = await _foreground(shard, near, pages, _drain(shard))
    return before, during


async def _foreground(shard: Shard, space: Space, pages: Pages, meanwhile: object) -> float:
    """The p99 in seconds of small operations at a fixed rate, from their intended start."""
    task = asyncio.ensure_future(meanwhile)  # type: ignore[call-overload]
    rng = np.random.default_rng(0)
    took: list[float] = []
    pending: set[asyncio.Task[None]] = set()

    async def operation(due: float, turn: int) -> None:
        slots = np.unique(rng.integers(0, 1024, _FOREGROUND_BATCH).astype(np.uint64))
        if turn % 2:
            await shard.pager.load(space, slots)
        else:
            await shard.pager.store(space, slots, pages[slots])
        took.append(time.perf_counter() - due)

    due, turn = time.perf_counter(), 0
    while not task.done():
        due += _PERIOD_S
        await asyncio.sleep(max(due - time.perf_counter(), 0))
        started = asyncio.create_task(operation(due, turn))
        pending.add(started)
        started.add_done_callback(pending.discard)
        turn += 1
    await asyncio.gather(*pending)
    await task
    return float(np.percentile(took, 99))
