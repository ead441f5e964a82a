"""A tier that does not answer holds up neither its node's start nor the upkeep of other tiers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
from servers import Server
from shards import MIB, objects, open_shard, pages, ram

from vswap.node.seams import Seams
from vswap.node.shard import Shard
from vswap.node.spaces import Limits
from vswap.node.tier import Tier, TierState
from vswap.tiers.backend import Backend
from vswap.tiers.factory import make_redundant, make_single
from vswap.tiers.spec import TierSpec
from vswap.wire.errors import BackendRefused, OutOfTiers, TierUnavailable

SLOTS = np.arange(50, dtype=np.uint64)
PAGES = pages(SLOTS, 1)
SOON_S = 20.0
"""Less than anything that hangs takes here, which is for ever."""


class Site:
    """Servers by the last part of their URL, over lives of a shard; some of them hang at first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.servers: dict[str, Server] = {}
        self.hanging: set[str] = set()
        self.state = path / "state"

    def seams(self) -> Seams:
        return Seams(make_backend=self._make)

    def _make(self, spec: TierSpec) -> Backend:
        if spec.redundant:
            return make_redundant(spec, self._make)
        name = spec.url.rpartition("/")[2]
        server = self.servers[name] = Server(make_single(spec))
        if name in self.hanging:
            server.gate = asyncio.Event()
        return server

    def hang(self, name: str) -> asyncio.Event:
        gate = self.servers[name].gate = asyncio.Event()
        return gate

    def gate(self, name: str) -> asyncio.Event:
        gate = self.servers[name].gate
        assert gate is not None
        return gate

    def tier(self, name: str, **more: int) -> TierSpec:
        return objects(self.path / name, name, **more)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON_S):
        while not condition():
            await asyncio.sleep(0.02)


async def test_a_node_starts_without_its_tiers_and_who_needs_one_waits(site: Site) -> None:
    tiers = (ram(), site.tier("slow"))
    async with open_shard(site.state, *tiers, seams=site.seams()) as shard:
        near = shard.spaces.create("near")
        far = shard.spaces.create("far", limits=Limits(tiers=("slow",)))
        for space in (near, far):
            await shard.pager.store(space, SLOTS, PAGES)
    site.hanging.add("slow")
    async with asyncio.timeout(SOON_S):
        shard = await Shard.open(site.state, tiers, seams=site.seams())
        near, far = shard.spaces.get("near"), shard.spaces.get("far")
        assert (await shard.pager.load(near, SLOTS) == PAGES).all()
        await shard.pager.store(near, SLOTS + 100, PAGES)
    # To who needs what hangs it is a pause, not an error.
    load = asyncio.create_task(shard.pager.load(far, SLOTS))
    store = asyncio.create_task(shard.pager.store(far, SLOTS + 100, PAGES))
    await asyncio.sleep(0.2)
    assert not load.done()
    assert not store.done()
    site.gate("slow").set()
    assert (await load == PAGES).all()
    await store
    assert (await shard.pager.load(far, SLOTS + 100) == PAGES).all()
    await shard.close()


async def test_a_server_that_refuses_is_waited_for_once(site: Site) -> None:
    tiers = (ram(), site.tier("gone"))
    async with open_shard(site.state, *tiers, seams=site.seams()) as shard:
        far = shard.spaces.create("far", limits=Limits(tiers=("gone",)))
        await shard.pager.store(far, SLOTS, PAGES)
    site.hanging.add("gone")
    shard = await Shard.open(site.state, tiers, seams=site.seams())
    far = shard.spaces.get("far")
    calls = [
        asyncio.create_task(shard.pager.store(far, SLOTS, PAGES)),
        asyncio.create_task(shard.pager.load(far, SLOTS)),
    ]
    await asyncio.sleep(0.05)
    site.servers["gone"].dead = True
    site.gate("gone").set()
    for error in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(error, TierUnavailable)
    # It is tried again by and by, and nobody waits for that.
    site.hang("gone")
    async with asyncio.timeout(SOON_S):
        with pytest.raises(TierUnavailable):
            await shard.pager.load(far, SLOTS)
    await shard.close()


async def test_a_new_tier_is_tried_before_its_node_serves(site: Site) -> None:
    """At every start until it was opened once; a tier that was there before ends no start."""
    async with open_shard(site.state, ram(), seams=site.seams()) as shard:
        await shard.pager.store(shard.spaces.create("s"), SLOTS, PAGES)
    (site.path / "wrong").write_text("is no directory")
    for _ in range(2):
        with pytest.raises(BackendRefused, match="tier wrong: "):
            await Shard.open(site.state, [ram(), site.tier("wrong")], seams=site.seams())
    (site.path / "wrong").unlink()
    async with open_shard(site.state, ram(), site.tier("wrong"), seams=site.seams()) as shard:
        assert shard.tiers.get("wrong").available
    site.hanging.add("wrong")
    shard = await Shard.open(site.state, [ram(), site.tier("wrong")], seams=site.seams())
    assert (await shard.pager.load(shard.spaces.get("s"), SLOTS) == PAGES).all()
    await shard.close()


async def test_deletions_on_a_tier_that_hangs_hold_up_no_others(site: Site) -> None:
    tiers = (site.tier("hung"), site.tier("well"))
    async with open_shard(site.state, *tiers, seams=site.seams()) as shard:
        spaces = [shard.spaces.create(n, limits=Limits(tiers=(n,))) for n in ("hung", "well")]
        for space in spaces:
            await shard.pager.store(space, SLOTS, PAGES)
        gate = site.hang("hung")
        await shard.pager.free(spaces[0], SLOTS)
        await asyncio.sleep(0.05)
        await shard.pager.free(spaces[1], SLOTS)
        await until(lambda: not shard.tiers.get("well").segments)
        assert shard.tiers.get("hung").segments
        gate.set()
        await until(lambda: not shard.reaper.pending)


async def test_a_tier_that_hangs_holds_up_no_housekeeping(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that does not open, and one that does not list what it has."""
    monkeypatch.setattr("vswap.node.shard._SWEEP_S", 0.1)
    urls = tuple(f"file://{site.path}/member-{i}" for i in range(2))
    red = TierSpec(name="red", urls=urls, redundancy="mirror:2", capacity_bytes=64 * MIB, rank=99)
    tiers = (site.tier("closed", rank=1), site.tier("mute", rank=2), red)
    async with open_shard(site.state, *tiers, seams=site.seams()):
        pass
    site.hanging.add("closed")
    shard = await Shard.open(site.state, tiers, seams=site.seams())
    backend = shard.tiers.get("red").redundant
    assert backend is not None
    space = shard.spaces.create("s", limits=Limits(tiers=("red",)))
    await until(lambda: shard.tiers.get("mute").opened)
    site.hang("mute")
    await asyncio.sleep(1.5)
    site.servers["member-0"].dead = True
    await shard.pager.store(space, SLOTS, PAGES)
    assert backend.down
    site.servers["member-0"].dead = False
    await until(lambda: not backend.down)
    await shard.close()


async def test_what_dies_while_another_tier_is_read_is_deleted_once_nobody_brings_it(
    tmp_path: Path,
) -> None:
    """Pages of two tiers are brought to RAM; the first tier does not answer, and meanwhile those of
    the second are freed."""
    site = Site(tmp_path)
    more = SLOTS + np.uint64(50)
    async with open_shard(
        site.state, ram(mib=8), site.tier("a"), site.tier("b"), seams=site.seams()
    ) as shard:
        space = shard.spaces.create("s")
        for name, where in (("a", SLOTS), ("b", more)):
            shard.spaces.change("s", Limits(tiers=(name,)))
            await shard.pager.store(space, where, PAGES)
        shard.spaces.change("s", Limits())
        gate = site.hang("a")
        bringing = asyncio.create_task(shard.promoter.bring(space, np.concatenate((SLOTS, more))))
        await asyncio.sleep(0.05)
        await shard.pager.free(space, more)
        await asyncio.sleep(0.05)
        gate.set()
        async with asyncio.timeout(SOON_S):
            await bringing
            while shard.tiers.get("b").segments:
                await asyncio.sleep(0.01)
        assert not shard.handles.pins.any()
        assert not shard.reaper.pending


async def test_nobody_waits_for_a_tier_that_went_before_it_was_tried(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared memory was full when it came."""
    async with open_shard(site.state, ram(), seams=site.seams()) as shard:
        await shard.join(uuid4())
        saved = shard._save_tiers
        calls = 0

        def full() -> None:
            nonlocal calls
            calls += 1
            if calls > 1:
                raise OutOfTiers("full")
            saved()

        with monkeypatch.context() as patch, pytest.raises(OutOfTiers):
            patch.setattr(shard, "_save_tiers", full)
            await shard.configure(1, [(site.tier("new"), TierState.ACTIVE)])
        tried = shard.tiers.get("new").tried
        assert not tried.done()
        await shard.configure(2, [])
        assert tried.done()


async def test_a_sweep_is_not_forgotten_over_a_check(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They fall due in one tick, and a tier has one of them at a time."""
    monkeypatch.setattr("vswap.node.shard._CHECK_S", 0.0)
    monkeypatch.setattr("vswap.node.shard._SWEEP_S", 1.0)
    async with open_shard(site.state, site.tier("t"), seams=site.seams()) as shard:
        swept = asyncio.Event()

        async def sweep(_: Tier) -> int:
            swept.set()
            return 0

        monkeypatch.setattr(shard._sweeper, "sweep", sweep)
        async with asyncio.timeout(SOON_S):
            await swept.wait()
