"""Moves under awkward timing: nothing is lost, leaked, or written where it was promised not to be.

Each test stands for a defect that a review found and reproduced.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
from numpy.typing import NDArray
from shards import MIB, objects, open_shard, pages, ram, slots

from vswap.node import grants
from vswap.node.choose import Choosers
from vswap.node.directives import Directive, MoveKind
from vswap.node.evacuator import Chooser
from vswap.node.seams import Seams
from vswap.node.shard import Shard
from vswap.node.spaces import Limits, Space
from vswap.node.tier import TierState
from vswap.tiers.backend import SegmentName
from vswap.tiers.region import Mapping, Region
from vswap.tiers.spec import TierSpec
from vswap.wire.errors import OutOfTiers, StaleIncarnation, TierUnavailable


class Slow:
    """A pacer that lets other things happen."""

    def __init__(self, *waits_s: float) -> None:
        self._waits_s = list(waits_s)

    async def take(self, amount_bytes: int) -> None:
        await asyncio.sleep(self._waits_s.pop(0) if self._waits_s else 0)


def span(first: int, last: int) -> NDArray[np.uint64]:
    return np.arange(first, last, dtype=np.uint64)


def into(shard: Shard, tier: str) -> Chooser:
    return Choosers(shard.spaces, shard.evacuator).first_fit(lambda: [shard.tiers.get(tier)])


async def store(shard: Shard, space: Space, where: NDArray[np.uint64], version: int = 1) -> None:
    await shard.pager.store(space, where, pages(where, version))


async def check(shard: Shard, space: Space, where: NDArray[np.uint64], version: int = 1) -> None:
    assert (await shard.pager.load(space, where) == pages(where, version)).all()


def cluster_tier(root: Path, name: str, rank: int, mib: int = 1024) -> TierSpec:
    return TierSpec(name=name, url=f"file://{root}/{name}", capacity_bytes=mib * MIB, rank=rank)


async def test_a_sweep_leaves_another_tier_on_the_same_backend_alone(tmp_path: Path) -> None:
    a, b = objects(tmp_path / "o", "a", rank=1), objects(tmp_path / "o", "b", rank=2)
    async with open_shard(tmp_path / "s", a, b) as shard:
        space = shard.spaces.create("x")
        await store(shard, space, span(0, 100))
        shard.tiers.get("a").state = TierState.DRAINING
        shard.directives.start(Directive("j", MoveKind.DRAIN, "a"))
        async with asyncio.timeout(20):
            while shard.directives.progress()[0].state != "done":
                await asyncio.sleep(0.01)
        await check(shard, space, span(0, 100))


async def test_what_waits_for_promotion_cannot_come_back_as_an_old_page(tmp_path: Path) -> None:
    async with open_shard(tmp_path / "s", ram(), objects(tmp_path / "o", rank=5)) as shard:
        space = shard.spaces.create("x", limits=Limits(tiers=("objects",)))
        where, rng = slots(7), np.random.default_rng(1)

        def fresh() -> NDArray[np.uint8]:
            return rng.integers(0, 256, (1, 4096), np.uint8)

        await shard.pager.store(space, where, fresh())
        [first] = space.table.get(where).tolist()
        gate, codecs = asyncio.Event(), shard.promoter._codecs
        transcode = codecs.transcode

        async def held_up(*args: object) -> object:
            await gate.wait()
            return await transcode(*args)  # type: ignore[arg-type]

        codecs.transcode = held_up  # type: ignore[assignment, method-assign]
        for _ in range(2):
            await shard.pager.load(space, where)
        shard.spaces.change("x", Limits())
        await shard.pager.load(space, where)
        await asyncio.sleep(0.01)
        shard.spaces.change("x", Limits(tiers=("objects",)))
        while len(shard.handles._free) > 1:
            shard.handles._free.pop()
        newest = fresh()
        for _ in range(6):
            newest = fresh()
            await shard.pager.store(space, where, newest)
            await asyncio.sleep(0.05)
            assert space.table.get(where)[0] != first
        gate.set()
        await asyncio.sleep(0.05)
        assert (await shard.pager.load(space, where) == newest).all()
        assert not shard.handles.pins.any()


async def test_what_waits_for_promotion_holds_little_memory(tmp_path: Path) -> None:
    """Its own records, not the buffers of the loads that they came with; and few of them."""
    async with open_shard(tmp_path / "s", ram(), objects(tmp_path / "o", rank=5)) as shard:
        space = shard.spaces.create("x", limits=Limits(tiers=("objects",)))
        await store(shard, space, span(0, 400))
        shard.spaces.change("x", Limits())
        gate, codecs = asyncio.Event(), shard.promoter._codecs
        transcode = codecs.transcode

        async def held_up(*args: object) -> object:
            await gate.wait()
            return await transcode(*args)  # type: ignore[arg-type]

        codecs.transcode = held_up  # type: ignore[assignment, method-assign]

        def held_bytes() -> int:
            waiting = [records for _, records, _ in shard.promoter._queue._queue]  # type: ignore[attr-defined]
            return sum(records.blob.nbytes for records in waiting)

        # The first one is on its way to RAM, the second one waits: of a batch, one page is hot.
        for _ in range(3):
            await shard.pager.load(space, slots(0))
        await shard.pager.load(space, span(0, 200))
        assert 0 < held_bytes() < 2 * 4096
        for _ in range(20):
            await check(shard, space, span(0, 400))
        assert held_bytes() < 4 * MIB
        gate.set()
        async with asyncio.timeout(10):
            while shard.promoter.queued_bytes:
                await asyncio.sleep(0.01)
        assert shard.promoter.counters["promoted_pages"] >= 400
        await check(shard, space, span(0, 400))
        assert not shard.handles.pins.any()


async def test_a_start_with_full_shared_memory_keeps_the_tables(tmp_path: Path) -> None:
    class FullMapping(Mapping):
        def reserve(self, offset: int, length: int) -> None:
            raise OutOfTiers("shared memory is full", need=length)

    class Full(Region):
        def create(self, name: str, size: int) -> Mapping:
            kind = FullMapping if name.endswith(".heat") else Mapping
            return kind(self.directory / name, size, create=True)

    async with open_shard(tmp_path, ram()) as shard:
        await store(shard, shard.spaces.create("x"), span(0, 50))
    with pytest.raises(OutOfTiers):
        await Shard.open(tmp_path, [ram()], seams=Seams(make_region=Full))
    async with open_shard(tmp_path, ram()) as shard:
        await check(shard, shard.spaces.get("x"), span(0, 50))


async def test_nothing_arrives_in_a_tier_after_its_closing_was_acknowledged(tmp_path: Path) -> None:
    a, b = cluster_tier(tmp_path, "a", 1), cluster_tier(tmp_path, "b", 2)
    active, draining = TierState.ACTIVE, TierState.DRAINING
    async with open_shard(tmp_path / "s", ram()) as shard:
        await shard.join(uuid4())
        await shard.configure(1, [(a, active), (b, active)])
        for name in "ab":
            shard.set_grant(name, 256 * MIB)
        space = shard.spaces.create("x", limits=Limits(tiers=("a", "b")))
        for first in range(0, 180, 20):
            await store(shard, space, span(first, first + 20))
        source, target = shard.tiers.get("a"), shard.tiers.get("b")
        moving = asyncio.create_task(
            shard.evacuator.evacuate(
                source, list(source.segments), into(shard, "b"), pacer=Slow(0, 0.1, 0.1)
            )
        )
        await asyncio.sleep(0.05)
        # A store that is still encoding chose its tier before, too.
        shard.spaces.change("x", Limits(tiers=("b",)))
        late = asyncio.create_task(store(shard, space, span(500, 800)))
        await asyncio.sleep(0)
        await shard.configure(2, [(a, active), (b, draining)])
        there = len(target.segments)
        await moving
        with pytest.raises(OutOfTiers):
            await late
        assert len(target.segments) == there
        assert not any(shard.evacuator.promised.values())
        await check(shard, space, span(0, 180))


async def test_a_removed_tier_that_holds_pages_is_kept_over_a_restart(tmp_path: Path) -> None:
    a = cluster_tier(tmp_path, "a", 1)
    async with open_shard(tmp_path / "s", ram()) as shard:
        await shard.join(uuid4())
        await shard.configure(1, [(a, TierState.ACTIVE)])
        shard.set_grant("a", 256 * MIB)
        space = shard.spaces.create("x", limits=Limits(tiers=("a",)))
        await store(shard, space, span(0, 20))
        await shard.configure(2, [])
        assert shard.tiers.get("a").state is TierState.DRAINED
    async with open_shard(tmp_path / "s", ram()) as shard:
        await check(shard, shard.spaces.get("x"), span(0, 20))
        await shard.delete_space("x")
        await asyncio.sleep(0.2)
        await shard.configure(3, [])
        assert shard.tiers.find("a") is None


async def test_grants_grow_with_a_large_tier(tmp_path: Path) -> None:
    async with open_shard(tmp_path / "s", ram()) as shard:
        await shard.join(uuid4())
        spec = cluster_tier(tmp_path, "c", 50, mib=1 << 20)
        await shard.configure(1, [(spec, TierState.ACTIVE)])
        tier = shard.tiers.get("c")

        def granted(name: str, total_bytes: int) -> None:
            asyncio.get_running_loop().call_soon(shard.set_grant, name, total_bytes)

        shard.connect_grants(granted)
        for _ in range(8000):
            assert tier.room() >= MIB or await shard._grants.want(tier, MIB)
            tier.stored_bytes += MIB
        tier.stored_bytes = 0


async def test_a_grant_outlives_a_restart_without_a_coordinator(tmp_path: Path) -> None:
    tiers = [(cluster_tier(tmp_path, "c", 500), TierState.ACTIVE)]
    told: list[int] = []
    async with open_shard(tmp_path / "s", ram(mib=1)) as shard:
        await shard.join(uuid4())
        await shard.configure(1, tiers)
        shard.set_grant("c", 9 * MIB)
    async with open_shard(tmp_path / "s", ram(mib=1)) as shard:
        assert shard.grants() == {"c": 9 * MIB}
        space = shard.spaces.create("x", limits=Limits(tiers=("c",)))
        await store(shard, space, span(0, 500))
        # What is given back is gone at once, for every later life.
        shard.set_grant("c", 400 * MIB)
        shard.connect_grants(lambda _, total_bytes: told.append(total_bytes))
        shard._grants.give_back(shard.tiers.get("c"))
        [lower] = told
        assert lower < 400 * MIB
        assert shard.handles.granted[shard.tiers.get("c").tag] == lower
    async with open_shard(tmp_path / "s", ram(mib=1)) as shard:
        assert shard.grants() == {"c": lower}
        await check(shard, shard.spaces.get("x"), span(0, 500))
        # The tier is closed: when it is opened again it may be another one.
        await shard.configure(2, [(tiers[0][0], TierState.DRAINED)])
    async with open_shard(tmp_path / "s", ram(mib=1)) as shard:
        assert shard.grants() == {"c": shard.tiers.get("c").stored_bytes}


async def test_another_tier_has_nothing_of_the_grant_of_the_one_before(tmp_path: Path) -> None:
    async with open_shard(tmp_path / "s", ram(mib=1)) as shard:
        await shard.join(uuid4())
        await shard.configure(1, [(cluster_tier(tmp_path, "c", 50), TierState.ACTIVE)])
        shard.set_grant("c", 9 * MIB)
        await shard.configure(2, [(cluster_tier(tmp_path, "d", 50), TierState.ACTIVE)])
        assert shard.grants() == {"d": 0}
    async with open_shard(tmp_path / "s", ram(mib=1)) as shard:
        assert shard.grants() == {"d": 0}


@pytest.mark.parametrize("stopped", [True, False])
async def test_without_room_it_matters_whether_the_coordinator_could_have_given_more(
    stopped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grants, "_WAIT_S", 0.1)
    monkeypatch.setattr(grants, "_GRACE_S", 0.1)
    async with open_shard(tmp_path / "s", ram(mib=1)) as shard:
        await shard.join(uuid4())
        await shard.configure(1, [(cluster_tier(tmp_path, "c", 50), TierState.ACTIVE)])
        space = shard.spaces.create("x", limits=Limits(tiers=("c",)))
        if stopped:
            shard.connect_grants(lambda name, total_bytes: None)
        with pytest.raises(TierUnavailable, match="does not answer"):
            await store(shard, space, span(0, 20))

        def answer(name: str, total_bytes: int) -> None:
            asyncio.get_running_loop().call_soon(shard.set_grant, name, 0)

        shard.connect_grants(answer)
        with pytest.raises(OutOfTiers):
            await store(shard, space, span(0, 20))


async def test_a_store_waits_for_the_coordinator_that_its_node_has_not_reached_yet(
    tmp_path: Path,
) -> None:
    """Right after a restart: what was granted may be used up, and more may be had."""
    async with open_shard(tmp_path / "s", ram(mib=1)) as shard:
        await shard.join(uuid4())
        await shard.configure(1, [(cluster_tier(tmp_path, "c", 50), TierState.ACTIVE)])
        space = shard.spaces.create("x", limits=Limits(tiers=("c",)))
        assert shard.grants() == {"c": 0}

        def granted(name: str, total_bytes: int) -> None:
            asyncio.get_running_loop().call_soon(shard.set_grant, name, total_bytes)

        storing = asyncio.create_task(store(shard, space, span(0, 20)))
        await asyncio.sleep(0.1)
        assert not storing.done()
        shard.connect_grants(granted)
        await storing
        await check(shard, space, span(0, 20))


async def test_a_segment_may_die_while_its_mover_waits_for_the_pacer(tmp_path: Path) -> None:
    a, b = objects(tmp_path / "a", "a", rank=1), objects(tmp_path / "b", "b", rank=2)
    async with open_shard(tmp_path / "s", a, b) as shard:
        space = shard.spaces.create("x")
        await store(shard, space, span(0, 50))
        tier = shard.tiers.get("a")
        segments = list(tier.segments)
        moving = asyncio.create_task(
            shard.evacuator.evacuate(tier, segments, into(shard, "b"), pacer=Slow(0.1))
        )
        await asyncio.sleep(0.02)
        await shard.pager.free(space, span(0, 50))
        assert (await moving).error is None
        await asyncio.sleep(0.1)
        assert not tier.segments
        assert segments[0] in shard.handles._free
        assert not shard.handles.pins.any()


async def test_a_cancelled_move_leaves_no_pin_and_no_promise(tmp_path: Path) -> None:
    a, b = objects(tmp_path / "a", "a", rank=1), objects(tmp_path / "b", "b", rank=2)
    async with open_shard(tmp_path / "s", a, b) as shard:
        space = shard.spaces.create("x")
        tier, evacuator = shard.tiers.get("a"), shard.evacuator
        for turns in range(12):
            await store(shard, space, span(0, 50), turns)
            moving = asyncio.create_task(
                evacuator.evacuate(tier, list(tier.segments), into(shard, "b"))
            )
            launch = evacuator._launch

            async def launch_then_cancel(*args: object) -> None:
                await launch(*args)  # type: ignore[arg-type]  # noqa: B023
                moving.cancel()  # noqa: B023

            if turns % 2:
                evacuator._launch = launch_then_cancel  # type: ignore[method-assign, assignment]
            else:
                for _ in range(turns):
                    await asyncio.sleep(0)
                moving.cancel()
            await asyncio.gather(moving, return_exceptions=True)
            evacuator._launch = launch  # type: ignore[method-assign]
            await check(shard, space, span(0, 50), turns)
        await shard.pager.free(space, span(0, 50))
        await asyncio.sleep(0.3)
        assert not shard.handles.pins.any()
        assert not any(evacuator.promised.values())
        assert not evacuator.promised_to
        assert not tier.segments


async def test_a_lost_segment_does_not_hold_up_its_neighbours(tmp_path: Path) -> None:
    a, b = objects(tmp_path / "a", "a", rank=1), objects(tmp_path / "b", "b", rank=2)
    async with open_shard(tmp_path / "s", a, b) as shard:
        space = shard.spaces.create("x")
        for first in range(0, 500, 50):
            await store(shard, space, span(first, first + 50))
        tier = shard.tiers.get("a")
        lost: list[SegmentName] = [tier.segment_name(h) for h in list(tier.segments)[:4]]
        await tier.backend.delete(lost)
        moved = await shard.evacuator.evacuate(tier, list(tier.segments), into(shard, "b"))
        assert "missing" in str(moved.error)
        assert moved.pages == 300
        await check(shard, space, span(200, 500))


async def test_moves_respect_what_a_space_may_hold_in_a_tier(tmp_path: Path) -> None:
    a, b = objects(tmp_path / "a", "a", rank=1), objects(tmp_path / "b", "b", rank=2)
    async with open_shard(tmp_path / "s", a, b) as shard:
        space = shard.spaces.create("x", limits=Limits(tier_max_bytes={"b": MIB}))
        for first in range(0, 4000, 500):
            await store(shard, space, span(first, first + 500))
        tier = shard.tiers.get("a")
        await shard.evacuator.evacuate(tier, list(tier.segments), into(shard, "b"))
        held = int(space.bytes_by_tag[shard.tiers.get("b").tag])
        assert MIB // 2 < held <= MIB


async def test_small_ram_alone_is_cleaned_while_clients_overwrite(tmp_path: Path) -> None:
    async with open_shard(tmp_path, ram(mib=3)) as shard:
        space, rng = shard.spaces.create("x"), np.random.default_rng(3)
        every = span(0, 190)
        await store(shard, space, every)
        newest = np.ones(190, np.int64)
        for turn in range(2, 60):
            some = np.sort(rng.choice(190, 48, replace=False)).astype(np.uint64)
            await store(shard, space, some, turn)
            newest[some] = turn
        for slot in every.tolist():
            await check(shard, space, slots(slot), int(newest[slot]))


async def test_a_confirmation_with_the_wrong_space_changes_nothing(tmp_path: Path) -> None:
    async with open_shard(tmp_path, ram()) as shard:
        right, wrong = shard.spaces.create("right"), shard.spaces.create("wrong")
        await store(shard, right, slots(1, 2))
        _, token = await shard.pager.load_exclusive(right, slots(1, 2))
        with pytest.raises(StaleIncarnation):
            await shard.pager.confirm(wrong, token)
        assert await shard.pager.confirm(right, token) == 2


async def test_a_failed_sparse_batch_gives_its_memory_back(tmp_path: Path) -> None:
    class Small(Mapping):
        left = 5

        def reserve(self, offset: int, length: int) -> None:
            if self.path.name.endswith(".heat"):
                if not Small.left:
                    raise OutOfTiers("shared memory is full", need=length)
                Small.left -= 1
            super().reserve(offset, length)

    class SmallRegion(Region):
        def create(self, name: str, size: int) -> Mapping:
            return Small(self.directory / name, size, create=True)

    seams = Seams(make_region=SmallRegion)
    async with open_shard(tmp_path, ram(), seams=seams) as shard:
        space = shard.spaces.create("x")
        where = span(0, 20) * np.uint64(8192)
        with pytest.raises(OutOfTiers):
            await store(shard, space, where)
        assert space.table.allocated_bytes == 0
        assert shard.pages == 0
        Small.left = 100
        await store(shard, space, where)
        await check(shard, space, where)


@pytest.mark.parametrize("mib", [1, 2, 3])
async def test_reclaim_of_tiny_tiers_comes_to_an_end(tmp_path: Path, mib: int) -> None:
    """Rewriting a half-filled block into another one frees nothing, however often."""
    tiers = [ram(mib=mib), ram("zram", mib=1, codec="zstd:1", rank=1), objects(tmp_path / "o")]
    async with open_shard(tmp_path / "s", *tiers) as shard:
        space, rng = shard.spaces.create("x"), np.random.default_rng(1)
        async with asyncio.timeout(30):
            for turn in range(60):
                some = np.sort(rng.choice(1500, 40, replace=False)).astype(np.uint64)
                await store(shard, space, some, turn)
                if turn % 7 == 0:
                    await shard.pager.free(space, some[:20])
            while any(shard.reclaim._running(tier) for tier in shard.tiers):
                await asyncio.sleep(0.01)
