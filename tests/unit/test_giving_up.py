"""`drain --lost`, and what holds up moves: what cannot be read is given up late, all else moves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from servers import Server
from shards import MIB, objects, pages, slots

from vswap.node import directives
from vswap.node.directives import Directive, MoveKind, Progress
from vswap.node.seams import Seams
from vswap.node.shard import Shard
from vswap.node.spaces import Limits
from vswap.node.tier import Tier
from vswap.tiers.backend import Backend, Buffer, Read
from vswap.tiers.breaker import Breaker
from vswap.tiers.factory import make_redundant, make_single
from vswap.tiers.redundancy.base import Redundant
from vswap.tiers.spec import TierSpec
from vswap.tiers.wrappers.base import Wrapper
from vswap.tiers.wrappers.guarded import Guarded
from vswap.wire.errors import PageLost, TierUnavailable, VswapError

PART = 50
"""Pages per store, and so per segment."""


class Disk(Server):
    """A server some of whose segments it cannot read."""

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.sick: set[int] = set()

    async def get(self, reads: Any) -> list[Buffer | VswapError]:
        answers = await super().get(reads)
        return [self._of(read, answer) for read, answer in zip(reads, answers, strict=True)]

    def _of(self, read: Read, answer: Buffer | VswapError) -> Buffer | VswapError:
        return TierUnavailable("I/O error") if read.name.serial in self.sick else answer


class Site:
    """A shard with the tier ``red``, of one server or several, and another one with room."""

    def __init__(self, path: Path, redundancy: str = "none") -> None:
        self.path = path
        self.servers: dict[str, Disk] = {}
        self.pages = 0
        self.shard: Shard
        common: dict[str, Any] = {"name": "red", "capacity_bytes": 64 * MIB, "rank": 10}
        data, spare = TierSpec.model_construct(redundancy=redundancy).shape
        self.spare = spare
        self.urls = tuple(f"file://{path}/server-{i}" for i in range(data + spare))
        if redundancy == "none":
            self.spec = TierSpec(url=self.urls[0], **common)
        else:
            self.spec = TierSpec(urls=self.urls, redundancy=redundancy, **common)

    async def open(self) -> None:
        state = self.path / "state"
        state.mkdir(exist_ok=True)
        other = objects(self.path / "other", "other")
        seams = Seams(make_backend=self._make)
        self.shard = await Shard.open(state, [self.spec, other], seams=seams)
        # Repair is asked for, here.
        self.shard.reclaim.mend = lambda tier, degraded: None  # type: ignore[method-assign]
        if not len(self.shard.spaces):
            self.shard.spaces.create("s")

    def _make(self, spec: TierSpec) -> Backend:
        if spec.redundant:
            return make_redundant(spec, self._make)
        server = Disk(make_single(spec))
        if spec.url in self.servers:
            server.dead = self.servers[spec.url].dead
        self.servers[spec.url] = server
        return server

    @property
    def tier(self) -> Tier:
        return self.shard.tiers.get("red")

    @property
    def backend(self) -> Redundant:
        assert self.tier.redundant is not None
        return self.tier.redundant

    @property
    def breaker(self) -> Breaker:
        metered = self.tier.backend
        assert isinstance(metered, Wrapper)
        assert isinstance(metered.inner, Guarded)
        return metered.inner.reach

    def kill(self, *places: int) -> None:
        for place in places:
            self.servers[self.urls[place]].dead = True

    async def revive(self, *places: int) -> None:
        for place in places:
            self.servers[self.urls[place]].dead = False
        if self.tier.redundant is not None:
            await self.until(lambda: not self.backend.down)

    async def store(self, segments: int) -> None:
        space = self.shard.spaces.get("s")
        for _ in range(segments):
            where = slots(*range(self.pages, self.pages + PART))
            await self.shard.pager.store(space, where, pages(where, 1))
            self.pages += PART

    async def readable(self) -> set[int]:
        """Which pages can be loaded; that they are right is asserted."""
        space, found = self.shard.spaces.get("s"), set()
        for slot in range(self.pages):
            try:
                got = await self.shard.pager.load(space, slots(slot))
            except (PageLost, TierUnavailable):
                continue
            assert (got == pages(slots(slot), 1)).all()
            found.add(slot)
        return found

    def start(self, kind: MoveKind = MoveKind.DRAIN, *, lost: bool = False) -> None:
        self.shard.directives.start(Directive("job", kind, "red", lost=lost))

    @property
    def progress(self) -> Progress:
        [progress] = self.shard.directives.progress()
        return progress

    async def drained(self) -> None:
        await self.until(lambda: self.progress.state == "done")
        assert not self.tier.segments
        assert not self.shard.handles.pins.any()

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                # Sooner than housekeeping does it.
                self.shard.upkeep.watch(self.tier)
                await asyncio.sleep(0.02)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rounds, and silence is short."""
    monkeypatch.setattr(directives, "_RETRY_S", 0.05)
    monkeypatch.setattr(directives, "_SILENT_S", 1.0)
    monkeypatch.setattr(directives, "_SILENT_TIMEOUTS", 0)


async def out_of_reach(site: Site, segments: int) -> None:
    """Stores segments that only some servers have, and others that all have; then one of the
    servers that have the first ones is dead."""
    site.kill(*range(site.spare))
    await site.store(segments)
    await site.revive(*range(site.spare))
    await site.store(8)
    site.kill(len(site.urls) - 1)
    with pytest.raises(TierUnavailable):
        await site.shard.pager.load(site.shard.spaces.get("s"), slots(*range(PART)))


@pytest.mark.parametrize("redundancy", ["mirror:2", "rs:4+2"])
async def test_what_a_redundant_tier_can_give_is_not_given_up(
    tmp_path: Path, soon: None, redundancy: str
) -> None:
    site = Site(tmp_path, redundancy)
    await site.open()
    await out_of_reach(site, 4)
    before = await site.readable()
    # Of a coded tier a page is readable as long as the one server is up that has it as it is.
    assert (len(before) == 8 * PART) == (redundancy == "mirror:2")
    site.start(lost=True)
    await site.drained()
    assert await site.readable() == before
    assert site.progress.pages_lost == site.pages - len(before)
    await site.shard.close()


async def test_nothing_is_given_up_before_a_server_was_silent_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An outage that ends while the drain runs, of many times as many rounds as there are tries."""
    monkeypatch.setattr(directives, "_RETRY_S", 0.02)
    site = Site(tmp_path)
    await site.open()
    await site.store(12)
    site.kill(0)
    site.start(lost=True)
    await asyncio.sleep(1.5)
    assert site.progress.pages_lost == 0
    await site.revive(0)
    await site.drained()
    assert site.progress.pages_lost == 0
    assert len(await site.readable()) == site.pages
    await site.shard.close()


async def test_silence_begins_anew_with_every_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directives, "_RETRY_S", 0.05)
    monkeypatch.setattr(directives, "_SILENT_S", 3.0)
    monkeypatch.setattr(directives, "_SILENT_TIMEOUTS", 0)
    site = Site(tmp_path)
    await site.open()
    await site.store(12)
    # Nothing finds room, so that the drain goes on.
    site.shard.spaces.change("s", Limits(tiers=("red",)))
    site.start(lost=True)
    for _ in range(3):
        site.kill(0)
        await asyncio.sleep(1.5)
        await site.revive(0)
        await site.until(lambda: site.progress.silent_since is None)
    assert site.progress.pages_lost == 0
    await site.shard.close()


async def test_a_server_is_asked_before_it_counts_as_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It came back in the pause of its breaker, when nothing reaches it."""
    monkeypatch.setattr(directives, "_RETRY_S", 0.05)
    monkeypatch.setattr(directives, "_SILENT_S", 0.0)
    monkeypatch.setattr(directives, "_SILENT_TIMEOUTS", 0)
    site = Site(tmp_path)
    await site.open()
    await site.store(4)
    site.kill(0)
    breaker = site.breaker
    while breaker.retry_after_s < 2:
        await asyncio.sleep(breaker.retry_after_s)
        with pytest.raises(TierUnavailable):
            await site.shard.pager.load(site.shard.spaces.get("s"), slots(0))
    await site.revive(0)
    site.start(lost=True)
    await site.drained()
    assert site.progress.pages_lost == 0
    assert len(await site.readable()) == site.pages
    await site.shard.close()


async def test_a_server_on_its_way_back_is_waited_for(tmp_path: Path, soon: None) -> None:
    site = Site(tmp_path, "mirror:2")
    await site.open()
    await out_of_reach(site, 4)
    # It answers, but nobody has looked yet at what it has.
    watch = site.shard.upkeep.watch
    site.shard.upkeep.watch = lambda tier: None  # type: ignore[method-assign]
    site.servers[site.urls[1]].dead = False
    site.backend.given_up(1, TierUnavailable("refused"))
    site.start(lost=True)
    await asyncio.sleep(3)
    assert site.progress.pages_lost == 0
    site.shard.upkeep.watch = watch  # type: ignore[method-assign]
    await site.drained()
    assert site.progress.pages_lost == 0
    assert len(await site.readable()) == site.pages
    await site.shard.close()


@pytest.mark.parametrize("redundancy", ["none", "mirror:2"])
async def test_a_tier_that_is_away_when_its_node_starts_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, redundancy: str
) -> None:
    monkeypatch.setattr(directives, "_RETRY_S", 0.05)
    site = Site(tmp_path, redundancy)
    await site.open()
    await site.store(4)
    site.kill(*range(len(site.urls)))
    await site.shard.close()
    await site.open()
    site.start(lost=True)
    await asyncio.sleep(1)
    assert not site.tier.opened
    assert site.progress.pages_lost == 0
    await site.revive(*range(len(site.urls)))
    await site.drained()
    assert site.progress.pages_lost == 0
    assert len(await site.readable()) == site.pages
    await site.shard.close()


@pytest.mark.parametrize("redundancy", ["none", "mirror:2"])
@pytest.mark.parametrize("restarted", [False, True])
async def test_a_tier_that_is_gone_is_given_up(
    tmp_path: Path, soon: None, redundancy: str, restarted: bool
) -> None:
    site = Site(tmp_path, redundancy)
    await site.open()
    await site.store(4)
    site.kill(*range(len(site.urls)))
    if restarted:
        await site.shard.close()
        await site.open()
    # Dead segments as well: nobody can delete them.
    await site.shard.pager.free(site.shard.spaces.get("s"), slots(*range(PART)))
    site.start(lost=True)
    await site.drained()
    assert site.progress.pages_lost == site.pages - PART
    with pytest.raises(PageLost):
        await site.shard.pager.load(site.shard.spaces.get("s"), slots(PART))
    await site.shard.close()


async def test_nothing_but_dead_segments_on_a_tier_that_is_gone(tmp_path: Path, soon: None) -> None:
    site = Site(tmp_path)
    await site.open()
    await site.store(2)
    site.kill(0)
    await site.shard.pager.free(site.shard.spaces.get("s"), slots(*range(site.pages)))
    site.start(lost=True)
    await site.drained()
    await site.shard.close()


async def test_bad_bytes_are_not_given_up_while_a_server_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directives, "_RETRY_S", 0.05)
    site = Site(tmp_path, "mirror:2")
    await site.open()
    await site.store(2)
    site.kill(0)
    site.servers[site.urls[1]].flips = True
    site.start(lost=True)
    await asyncio.sleep(1)
    assert site.progress.pages_lost == 0
    await site.revive(0)
    await site.drained()
    assert site.progress.pages_lost == 0
    assert len(await site.readable()) == site.pages
    await site.shard.close()


@pytest.mark.parametrize(("lost", "few"), [(False, 5), (True, 1)])
async def test_segments_that_one_server_cannot_read_hold_up_no_others(
    tmp_path: Path, soon: None, lost: bool, few: int
) -> None:
    """Bad sectors, say: the server is there."""
    site = Site(tmp_path)
    await site.open()
    await site.store(few)
    sick = {site.tier.segment_name(handle).serial for handle in site.tier.segments}
    await site.store(20)
    site.servers[site.urls[0]].sick = sick
    site.start(lost=lost)
    if lost:
        await site.drained()
    else:
        await site.until(lambda: site.progress.moved.pages == 20 * PART)
    assert site.progress.moved.pages == 20 * PART
    assert site.progress.pages_lost == (PART if lost else 0)
    await site.shard.close()


@pytest.mark.parametrize("kind", [MoveKind.DRAIN, MoveKind.COMPACT, MoveKind.REPAIR])
async def test_segments_out_of_reach_hold_up_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: MoveKind
) -> None:
    """All that can move does, in the first round, behind more of them than one turn takes."""
    monkeypatch.setattr(directives, "_RETRY_S", 1e9)
    monkeypatch.setattr(directives, "_ROUND_SEGMENTS", 4)
    site = Site(tmp_path, "rs:4+2")
    await site.open()
    site.kill(0, 1)
    await site.store(7)
    await site.revive(0, 1)
    site.kill(2, 3)
    await site.store(8)
    await site.revive(2, 3)
    site.kill(2)
    behind = list(site.tier.segments)[7:]
    site.shard.directives.start(Directive("job", kind, "red", target_utilisation=1.0))
    await site.until(lambda: site.progress.state == "waiting")
    assert site.progress.moved.pages == 8 * PART
    await site.until(lambda: not site.tier.segments.keys() & set(behind))
    await site.revive(2)
    assert len(await site.readable()) == site.pages
    await site.shard.close()


@pytest.mark.parametrize("redundancy", ["mirror:2", "rs:4+2"])
async def test_lost_pages_of_a_redundant_tier_are_counted(tmp_path: Path, redundancy: str) -> None:
    site = Site(tmp_path, redundancy)
    await site.open()
    await site.store(4)
    space = site.shard.spaces.get("s")
    for place in range(site.spare):
        await site.servers[site.urls[place]].wipe()
    assert len(await site.readable()) == site.pages
    await site.until(lambda: len(site.shard.upkeep.degraded(site.tier)) == 4)
    assert site.shard.usage()[0].lost_pages == 0
    await site.servers[site.urls[-1]].wipe()
    # One load meets it; a listing tells the rest.
    with pytest.raises(PageLost):
        await site.shard.pager.load(space, slots(*range(PART)))
    assert site.shard.usage()[0].lost_pages >= PART
    await site.until(lambda: site.shard.usage()[0].lost_pages == site.pages)
    await site.shard.pager.free(space, slots(*range(site.pages - 3)))
    assert site.shard.usage()[0].lost_pages == 3
    site.start(lost=True)
    await site.drained()
    assert site.progress.pages_lost == 3
    assert site.shard.usage()[0].lost_pages == 3
    await site.shard.close()


async def test_what_finds_no_room_is_not_given_up_with_what_is_lost(
    tmp_path: Path, soon: None
) -> None:
    site = Site(tmp_path)
    await site.open()
    await site.store(1)
    await site.servers[site.urls[0]].wipe()
    await site.store(8)
    site.shard.spaces.change("s", Limits(tiers=("red",)))
    site.start(lost=True)
    await site.until(lambda: site.progress.pages_lost)
    await asyncio.sleep(2)
    assert site.progress.pages_lost == PART
    assert len(await site.readable()) == site.pages - PART
    await site.shard.close()
