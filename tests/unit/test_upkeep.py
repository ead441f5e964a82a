"""A shard over redundant tiers: servers die, come back, come back empty, lie, are replaced."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from servers import Server
from shards import MIB, pages

from vswap.coordinator.backends import Backends
from vswap.node.departure import Departure
from vswap.node.directives import Directive, MoveKind
from vswap.node.handles import SEALED
from vswap.node.reaper import LATE_S
from vswap.node.seams import Seams
from vswap.node.shard import Shard
from vswap.node.tier import Tier, TierState
from vswap.tiers.backend import Backend, prefix
from vswap.tiers.factory import make_redundant, make_single
from vswap.tiers.redundancy.base import Redundant
from vswap.tiers.spec import TierSpec
from vswap.wire.errors import PageCorrupt, PageLost, TierUnavailable

COUNT = 600


class Cluster:
    """One shard whose only tier, ``red``, is redundant, and the servers it is spread over."""

    def __init__(self, path: Path, redundancy: str) -> None:
        self.path = path
        self.servers: dict[str, Server] = {}
        data, spare = TierSpec.model_construct(redundancy=redundancy).shape
        self.spare = spare
        self.urls = tuple(f"file://{path}/server-{i}" for i in range(data + spare))
        self.spec = self.spec_of(redundancy, self.urls)
        self.version = 0
        self.late_s = LATE_S
        self.shard: Shard

    def spec_of(self, redundancy: str, urls: tuple[str, ...]) -> TierSpec:
        return TierSpec(
            name="red", urls=urls, redundancy=redundancy, capacity_bytes=64 * MIB, rank=10
        )

    def make(self, spec: TierSpec) -> Backend:
        if spec.redundant:
            return make_redundant(spec, self.make)
        # Those of an earlier life of the shard are what they were: dead, or liars.
        server = Server(make_single(spec))
        old = self.servers.get(spec.url)
        if old is not None:
            server.dead, server.flips = old.dead, old.flips
        self.servers[spec.url] = server
        return server

    @property
    def tier(self) -> Tier:
        return self.shard.tiers.get("red")

    @property
    def backend(self) -> Redundant:
        return redundant(self.tier)

    async def open(self, *, mend: bool = False) -> None:
        state = self.path / "state"
        state.mkdir(exist_ok=True)
        seams = Seams(make_backend=self.make, late_s=self.late_s)
        self.shard = await Shard.open(state, [self.spec], seams=seams)
        if not mend:
            # Repair is asked for, here.
            self.shard.reclaim.mend = lambda tier, degraded: None  # type: ignore[method-assign]
        if not len(self.shard.spaces):
            self.shard.spaces.create("s")

    def server(self, place: int) -> Server:
        return self.servers[self.urls[place]]

    async def store(self, first: int = 0, count: int = COUNT) -> None:
        self.version += 1
        space = self.shard.spaces.get("s")
        for start in range(first, first + count, 200):
            where = np.arange(start, min(start + 200, first + count), dtype=np.uint64)
            await self.shard.pager.store(space, where, pages(where, self.version))

    async def load(self, where: NDArray[np.uint64] | None = None) -> None:
        where = np.arange(COUNT, dtype=np.uint64) if where is None else where
        got = await self.shard.pager.load(self.shard.spaces.get("s"), where)
        assert (got == pages(where, self.version)).all()

    def degraded(self) -> int:
        return len(self.shard.upkeep.degraded(self.tier))

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                # Sooner than housekeeping does it.
                self.shard.upkeep.watch(self.tier)
                await asyncio.sleep(0.02)

    async def all_up(self) -> None:
        await self.until(lambda: not self.backend.down)

    async def audited(self) -> None:
        upkeep = self.shard.upkeep
        await self.until(
            lambda: (
                len(upkeep._cares) == len(self.urls)
                and not any(care.suspect or care.task for care in upkeep._cares.values())
            )
        )

    async def repair(self) -> None:
        self.shard.directives.start(Directive("repair", MoveKind.REPAIR, "red"))
        await self.until(lambda: self.shard.directives.progress()[0].state == "done")
        self.shard.directives.stop("repair")

    async def keys(self) -> list[set[str]]:
        return [await self.server(place).keys() for place in range(len(self.urls))]


def redundant(tier: Tier) -> Redundant:
    backend = tier.redundant
    assert backend is not None
    return backend


@pytest.fixture(params=["mirror:2", "rs:4+2"])
async def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Cluster]:
    cluster = Cluster(tmp_path, request.param)
    await cluster.open()
    await cluster.audited()
    yield cluster
    await cluster.shard.close()


async def test_no_record_lies_across_a_cut(cluster: Cluster) -> None:
    """So a page is one ranged read, and the segment is as long as its row says."""
    await cluster.store()
    asked = {url: server.asked for url, server in cluster.servers.items()}
    backend = cluster.backend
    for slot in range(0, COUNT, 7):
        await cluster.load(np.array([slot], np.uint64))
    more = sum(server.asked - asked[url] for url, server in cluster.servers.items())
    assert more == len(range(0, COUNT, 7))
    for handle in cluster.tier.segments:
        name, stored = cluster.tier.segment_name(handle), cluster.shard.handles.rows["stored"]
        assert stored[handle] % (16 * backend.stripes) == 0 or backend.stripes == 1
        for place in range(len(cluster.urls)):
            sizes = {
                listed.key: listed.bytes async for listed in cluster.server(place).list(name.key)
            }
            assert sizes[name.key] == backend.part_bytes(name, place, int(stored[handle]))


async def test_servers_that_die_fail_nothing_and_what_they_missed_is_known(
    cluster: Cluster,
) -> None:
    await cluster.store()
    assert cluster.degraded() == 0
    for place in range(cluster.spare):
        cluster.server(place).dead = True
    await cluster.load()
    await cluster.store(0, 300)
    await cluster.load(np.arange(300, dtype=np.uint64))
    degraded = cluster.shard.upkeep.degraded(cluster.tier)
    lost = (1 << cluster.spare) - 1
    assert len(degraded)
    assert (cluster.shard.handles.rows["lacking"][degraded] == lost).all()
    # Nothing would be the better for a repair yet.
    assert len(cluster.shard.upkeep.repairable(cluster.tier)) == 0
    usage = cluster.shard.usage()[0]
    assert usage.degraded_segments == len(degraded)
    assert usage.degraded_bytes > usage.repairable_bytes == 0
    assert [server.up for server in usage.servers].count(False) == cluster.spare


async def test_repair_makes_whole_what_the_next_loss_would_take(cluster: Cluster) -> None:
    await cluster.store()
    for place in range(cluster.spare):
        cluster.server(place).dead = True
    await cluster.store()
    for place in range(cluster.spare):
        cluster.server(place).dead = False
    await cluster.all_up()
    assert cluster.degraded()
    await cluster.repair()
    await cluster.until(lambda: not cluster.shard.reaper.pending)
    assert cluster.degraded() == 0
    keys = await cluster.keys()
    assert all(found == keys[0] for found in keys)
    for place in range(cluster.spare):
        cluster.server(len(cluster.urls) - 1 - place).dead = True
    await cluster.load()


async def test_a_note_outlives_the_daemon(cluster: Cluster, tmp_path: Path) -> None:
    cluster.server(0).dead = True
    await cluster.store()
    degraded = cluster.degraded()
    assert degraded
    await cluster.shard.close()
    await cluster.open()
    assert cluster.degraded() == degraded
    await cluster.load()
    cluster.server(0).dead = False
    await cluster.all_up()
    await cluster.repair()
    await cluster.until(lambda: cluster.degraded() == 0)


async def test_a_server_that_is_back_empty_is_noticed(cluster: Cluster) -> None:
    await cluster.store()
    cluster.server(1).dead = True
    await cluster.load()
    await cluster.until(lambda: cluster.backend.down == 0b10)
    await cluster.server(1).wipe()
    cluster.server(1).dead = False
    await cluster.all_up()
    sealed = [h for h in cluster.tier.segments if cluster.shard.handles.state(h) == SEALED]
    assert cluster.degraded() == len(sealed)
    await cluster.load()
    await cluster.repair()
    cluster.server(0).dead = True
    await cluster.load()


async def test_a_server_that_lost_its_memory_unseen_is_noticed_by_a_read(
    cluster: Cluster,
) -> None:
    await cluster.store()
    await cluster.server(1).wipe()
    await cluster.load(np.arange(200, dtype=np.uint64))
    # One miss, and all of the server's parts are held against the rows.
    await cluster.until(lambda: cluster.degraded() == len(cluster.tier.segments))
    await cluster.repair()
    cluster.server(0).dead = True
    await cluster.load()


async def test_a_server_that_was_restarted_is_noticed_without_a_read(cluster: Cluster) -> None:
    await cluster.store()
    cares = cluster.shard.upkeep._cares
    await cluster.until(lambda: all(care.life for care in cares.values()))
    await cluster.server(1).wipe()
    cluster.server(1).lives += 1
    await cluster.until(lambda: cluster.degraded() == len(cluster.tier.segments))
    # And one that is gone, although nobody wants anything of it.
    cluster.server(0).dead = True
    await cluster.until(lambda: bool(cluster.backend.down))


async def test_a_server_that_was_wiped_while_nobody_looked_is_noticed_at_the_start(
    cluster: Cluster,
) -> None:
    await cluster.store()
    await cluster.shard.close()
    shutil.rmtree(cluster.urls[1].removeprefix("file://"))
    await cluster.open()
    await cluster.audited()
    assert cluster.degraded() == len(cluster.tier.segments)


async def test_a_part_that_is_lost_while_other_servers_still_write_is_noticed(
    cluster: Cluster,
) -> None:
    """It was acknowledged, and gone before the write as a whole was."""
    cares = cluster.shard.upkeep._cares
    await cluster.until(lambda: all(care.life for care in cares.values()))
    slow, empty = cluster.server(0), cluster.server(1)
    slow.gate = asyncio.Event()
    store = asyncio.create_task(cluster.store(0, 200))
    await cluster.until(lambda: bool(cluster.tier.writing))
    while not await empty.keys():
        await asyncio.sleep(0.01)
    await empty.wipe()
    empty.lives += 1
    await cluster.until(lambda: cares[cluster.backend, 1].life == str(empty.lives))
    for _ in range(20):
        cluster.shard.upkeep.watch(cluster.tier)
        await asyncio.sleep(0.02)
    slow.gate.set()
    await store
    await cluster.audited()
    assert cluster.degraded() == len(cluster.tier.segments) == 1
    await cluster.repair()
    slow.dead = True
    await cluster.load(np.arange(200, dtype=np.uint64))


async def test_a_torn_part_is_found_by_its_length(cluster: Cluster) -> None:
    await cluster.store()
    handle = next(iter(cluster.tier.segments))
    name = cluster.tier.segment_name(handle)
    path = Path(cluster.urls[0].removeprefix("file://")) / name.key
    path.write_bytes(path.read_bytes()[:100])
    cluster.shard.upkeep.suspect(cluster.tier)
    await cluster.until(lambda: cluster.degraded() == 1)
    await cluster.load()


async def test_deletes_that_a_server_missed_are_made_up_for(cluster: Cluster) -> None:
    await cluster.store()
    cluster.server(0).dead = True
    await cluster.shard.pager.free(cluster.shard.spaces.get("s"), np.arange(COUNT, dtype=np.uint64))
    await cluster.until(lambda: not cluster.tier.segments)
    assert len(await cluster.server(0).keys()) > 0
    cluster.server(0).dead = False
    await cluster.all_up()
    assert await cluster.server(0).keys() == set()


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_part_that_lands_late_is_not_left_when_its_segment_is_gone(
    tmp_path: Path, restarted: bool
) -> None:
    """Its server did not answer in time, which the others made up for; then the segment died."""
    cluster = Cluster(tmp_path, "mirror:2")
    cluster.late_s = 4.0
    await cluster.open()
    await cluster.audited()
    slow, other = cluster.server(0), cluster.server(1)
    slow.late = []
    await cluster.store()
    late, slow.late = slow.late, None
    assert late
    if restarted:
        await cluster.shard.close()
        await cluster.open()
        slow, other = cluster.server(0), cluster.server(1)
    await cluster.all_up()
    await cluster.audited()
    await cluster.shard.pager.free(cluster.shard.spaces.get("s"), np.arange(COUNT, dtype=np.uint64))
    while await other.keys():
        await asyncio.sleep(0.02)
    slow.late = late
    await slow.land()
    await cluster.until(lambda: not cluster.tier.segments)
    assert await cluster.keys() == [set(), set()]
    await cluster.shard.close()


async def test_a_copy_that_fails_its_check_is_healed_and_the_segment_rewritten(
    cluster: Cluster,
) -> None:
    await cluster.store()
    for place in range(cluster.spare):
        cluster.server(place).flips = True
    await cluster.load()
    # The bytes themselves are bad now, not their way to us.
    assert cluster.degraded()
    await cluster.repair()
    assert cluster.tier.quarantined == 0
    await cluster.load()


async def test_a_bad_part_that_no_reader_asks_for_is_found_by_who_looks_at_all(
    cluster: Cluster,
) -> None:
    await cluster.store(0, 200)
    [handle] = cluster.tier.segments
    name = cluster.tier.segment_name(handle)
    stored = int(cluster.shard.handles.rows["stored"][handle])
    assert await cluster.backend.verify(name, stored) == 0
    for place in range(len(cluster.urls)):
        path = Path(cluster.urls[place].removeprefix("file://")) / name.key
        good = path.read_bytes()
        damaged = bytearray(good)
        damaged[len(good) // 2] ^= 1
        path.write_bytes(damaged)
        assert await cluster.backend.verify(name, stored) == 1 << place
        path.unlink()
        assert await cluster.backend.verify(name, stored) == 1 << place
        path.write_bytes(good)
    assert int(cluster.shard.handles.rows["lacking"][handle]) == (1 << len(cluster.urls)) - 1


async def test_a_mover_finds_the_good_bytes_as_well(cluster: Cluster) -> None:
    await cluster.store()
    for place in range(cluster.spare):
        cluster.server(place).flips = True
    cluster.shard.directives.start(
        Directive("compact", MoveKind.COMPACT, "red", target_utilisation=1.0)
    )
    await cluster.until(lambda: cluster.shard.directives.progress()[0].state == "done")
    for place in range(cluster.spare):
        cluster.server(place).flips = False
    await cluster.load()
    assert cluster.tier.quarantined == 0


async def test_a_segment_whose_trailer_is_bad_in_one_part_is_found_in_others(
    cluster: Cluster,
) -> None:
    await cluster.store(0, 200)
    [handle] = cluster.tier.segments
    name = cluster.tier.segment_name(handle)
    # Who is asked for the end of it, if all are well.
    place = (cluster.backend.need - 1 + name.serial) % len(cluster.urls)
    path = Path(cluster.urls[place].removeprefix("file://")) / name.key
    damaged = bytearray(path.read_bytes())
    damaged[-90] ^= 1
    path.write_bytes(damaged)
    cluster.shard.directives.start(
        Directive("compact", MoveKind.COMPACT, "red", target_utilisation=1.0)
    )
    await cluster.until(lambda: handle not in cluster.tier.segments)
    await cluster.load(np.arange(200, dtype=np.uint64))


async def test_a_segment_of_which_no_part_is_whole_is_put_together_record_by_record(
    cluster: Cluster,
) -> None:
    await cluster.store(0, 200)
    [handle] = cluster.tier.segments
    name = cluster.tier.segment_name(handle)
    for place in range(cluster.spare + 1):
        path = Path(cluster.urls[place].removeprefix("file://")) / name.key
        damaged = bytearray(path.read_bytes())
        damaged[300 + 4000 * place] ^= 1
        path.write_bytes(damaged)
    cluster.shard.directives.start(
        Directive("compact", MoveKind.COMPACT, "red", target_utilisation=1.0)
    )
    await cluster.until(lambda: handle not in cluster.tier.segments)
    await cluster.load(np.arange(200, dtype=np.uint64))
    assert cluster.tier.quarantined == 0


async def test_more_than_is_to_spare_is_an_error_and_heals_when_they_are_back(
    cluster: Cluster,
) -> None:
    await cluster.store()
    for place in range(cluster.spare + 1):
        cluster.server(place).dead = True
    with pytest.raises(TierUnavailable):
        await cluster.load()
    for place in range(cluster.spare + 1):
        cluster.server(place).dead = False
    await cluster.all_up()
    await cluster.load()
    for place in range(cluster.spare + 1):
        await cluster.server(place).wipe()
    with pytest.raises(PageLost):
        await cluster.load()


async def test_pages_out_of_reach_do_not_take_the_tier_from_others(cluster: Cluster) -> None:
    await cluster.store(0, 200)
    last = len(cluster.urls) - 1
    for place in range(cluster.spare):
        cluster.server(place).dead = True
    before = set(cluster.tier.segments)
    await cluster.store(200, 200)
    new = [h for h in cluster.tier.segments if h not in before]
    for place in range(cluster.spare):
        cluster.server(place).dead = False
    await cluster.all_up()
    assert len(cluster.shard.upkeep.degraded(cluster.tier)) == len(new) > 0
    # The next loss, too early: what has no part to spare is out of reach, and nothing else.
    cluster.server(last).dead = True
    with pytest.raises(TierUnavailable):
        await cluster.load(np.arange(200, 400, dtype=np.uint64))
    assert cluster.tier.writable
    cluster.version = 1
    await cluster.load(np.arange(200, dtype=np.uint64))
    cluster.server(last).dead = False
    await cluster.all_up()
    cluster.version = 2
    await cluster.load(np.arange(200, 400, dtype=np.uint64))


async def test_a_forgotten_shard_is_swept_once_every_server_is_there(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, "mirror:2")
    await cluster.open(mend=True)
    await cluster.store()
    own = cluster.tier.segment_name(0)
    owner = prefix(own.cluster, own.shard)
    await cluster.shard.close()
    backends = Backends(cluster.make)
    cluster.server(1).dead = True
    for _ in range(2):
        with pytest.raises(TierUnavailable):
            await backends.delete(cluster.spec, owner)
    with pytest.raises(TierUnavailable):
        await backends.examine(cluster.spec)
    # Nor is a tier drained by what the others list.
    assert await backends.list(cluster.spec, owner, every_server=False) == []
    with pytest.raises(TierUnavailable):
        await backends.list(cluster.spec, owner, every_server=True)
    cluster.server(1).dead = False
    segments, _ = await backends.delete(cluster.spec, owner)
    assert segments > 0
    assert await cluster.keys() == [set(), set()]
    await backends.close()


async def test_a_node_leaves_nothing_on_a_server_that_is_down(cluster: Cluster) -> None:
    left: list[bool] = []
    departure = Departure(cluster.shard, done=lambda: left.append(True))
    await cluster.store()
    cluster.server(0).dead = True
    await cluster.shard.pager.free(cluster.shard.spaces.get("s"), np.arange(COUNT, dtype=np.uint64))
    with pytest.raises(TierUnavailable):
        await departure.leave()
    cluster.server(0).dead = False
    await cluster.all_up()
    await departure.leave()
    assert left
    assert not any(await cluster.keys())


async def test_all_copies_bad_is_an_error(cluster: Cluster) -> None:
    await cluster.store()
    for server in cluster.servers.values():
        server.flips = True
    with pytest.raises(PageCorrupt):
        await cluster.load()


async def test_another_server_in_the_place_of_one(cluster: Cluster) -> None:
    """Of a tier of the cluster: the configuration says so, the audit finds it empty."""
    shard = cluster.shard
    spec = cluster.spec.model_copy(
        update={"name": "shared", "urls": tuple(f"{url}-shared" for url in cluster.urls)}
    )
    await shard.configure(1, [(spec, TierState.ACTIVE)])
    shard.set_grant("shared", 64 * MIB)
    await cluster.store()
    cluster.shard.directives.start(Directive("move", MoveKind.MIGRATE, "red", destination="shared"))
    await cluster.until(lambda: shard.directives.progress()[0].state == "done")
    tier = shard.tiers.get("shared")
    urls = (spec.urls[0], f"file://{cluster.path}/new", *spec.urls[2:])
    cluster.servers[spec.urls[1]].dead = True
    await shard.configure(2, [(spec.model_copy(update={"urls": urls}), TierState.ACTIVE)])
    await cluster.load()
    await cluster.until(lambda: not redundant(tier).down)
    assert len(shard.upkeep.degraded(tier)) == len(tier.segments) > 0
    shard.directives.start(Directive("repair", MoveKind.REPAIR, "shared"))
    await cluster.until(lambda: all(p.state == "done" for p in shard.directives.progress()))
    assert len(shard.upkeep.degraded(tier)) == 0
    cluster.servers[spec.urls[0]].dead = True
    await cluster.load()


async def test_a_node_repairs_its_own_tiers_by_itself(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, "mirror:2")
    await cluster.open(mend=True)
    cluster.server(0).dead = True
    await cluster.store()
    assert cluster.degraded()
    cluster.server(0).dead = False
    await cluster.until(lambda: not cluster.backend.down and not cluster.degraded())
    cluster.server(1).dead = True
    await cluster.load()
    await cluster.shard.close()


async def test_bad_bytes_are_no_verdict_while_a_server_is_away(cluster: Cluster) -> None:
    """What is away may have it right: nothing is marked as damaged, and nothing is lost."""
    await cluster.store()
    for place in range(cluster.spare):
        cluster.server(place).dead = True
    liar = cluster.server(cluster.spare)
    liar.flips = True
    doubted = 0
    for handle in list(cluster.tier.segments):
        try:
            contents = await cluster.shard.contents.read(cluster.tier, handle)
        except TierUnavailable:
            doubted += 1
        else:
            doubted += contents.doubtful is not None
    assert doubted
    assert cluster.tier.quarantined == 0
    liar.flips = False
    for place in range(cluster.spare):
        cluster.server(place).dead = False
    await cluster.all_up()
    await cluster.load()
