"""A server that somebody makes unfit while it is in use, say by a policy that evicts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from servers import Server
from shards import MIB, objects, open_shard, pages

from vswap.node.seams import Seams
from vswap.tiers.backend import Backend
from vswap.tiers.factory import make_redundant, make_single
from vswap.tiers.spec import TierSpec
from vswap.wire.errors import PageLost, TierUnavailable

SLOTS = np.arange(50, dtype=np.uint64)
PAGES = pages(SLOTS, 1)


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vswap.node.shard._CHECK_S", 0.1)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.02)


async def test_it_takes_no_more_pages_and_its_own_stay_readable(tmp_path: Path) -> None:
    servers: list[Server] = []

    def make(spec: TierSpec) -> Backend:
        servers.append(Server(make_single(spec)))
        return servers[-1]

    async with open_shard(
        tmp_path / "s", objects(tmp_path / "o"), seams=Seams(make_backend=make)
    ) as shard:
        space, tier = shard.spaces.create("s"), shard.tiers.get("objects")
        await shard.pager.store(space, SLOTS, PAGES)
        servers[0].unfit = True
        await until(lambda: tier.unfit)
        assert (await shard.pager.load(space, SLOTS) == PAGES).all()
        with pytest.raises(TierUnavailable, match="evicts"):
            await shard.pager.store(space, SLOTS + 100, PAGES)
        assert shard.usage()[0].error == "evicts"
        assert not tier.available
        # What it evicted counts as lost.
        await servers[0].wipe()
        servers[0].unfit = False
        await until(lambda: shard.usage()[0].lost_pages == 50 and tier.writable)
        with pytest.raises(PageLost):
            await shard.pager.load(space, SLOTS)
        await shard.pager.store(space, SLOTS, PAGES)
        assert (await shard.pager.load(space, SLOTS) == PAGES).all()
        assert not shard.usage()[0].error


async def test_one_of_several_is_left_out_as_long_as_there_are_enough(tmp_path: Path) -> None:
    servers: list[Server] = []

    def make(spec: TierSpec) -> Backend:
        if spec.redundant:
            return make_redundant(spec, make)
        servers.append(Server(make_single(spec)))
        return servers[-1]

    urls = tuple(f"file://{tmp_path}/{i}" for i in range(2))
    spec = TierSpec(name="red", urls=urls, redundancy="mirror:2", capacity_bytes=64 * MIB, rank=10)
    async with open_shard(tmp_path / "s", spec, seams=Seams(make_backend=make)) as shard:
        space, tier = shard.spaces.create("s"), shard.tiers.get("red")
        backend = tier.redundant
        assert backend is not None
        servers[1].unfit = True
        await until(lambda: backend.down == 0b10)
        await shard.pager.store(space, SLOTS, PAGES)
        servers[0].unfit = True
        await until(lambda: tier.unfit)
        assert (await shard.pager.load(space, SLOTS) == PAGES).all()
        with pytest.raises(TierUnavailable, match="evicts"):
            await shard.pager.store(space, SLOTS, PAGES)
        servers[0].unfit = servers[1].unfit = False
        await until(lambda: tier.writable and not backend.down)
        await shard.pager.store(space, SLOTS, PAGES)
