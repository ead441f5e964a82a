"""Backends that lie, below a real shard: never wrong bytes, an error for those pages alone."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import numpy as np
import pytest
from shards import MIB, objects, open_shard, page, pages, ram, slots

from vswap.node.seams import Seams
from vswap.node.shard import Shard
from vswap.node.spaces import Limits, Space
from vswap.tiers.backend import Backend
from vswap.tiers.factory import make_backend
from vswap.tiers.spec import TierSpec
from vswap.tiers.wrappers.faulty import FaultPlan, Faulty
from vswap.wire.errors import PageCorrupt, PageLost, TierUnavailable, VswapError


class Liar(Seams):
    """Seams whose tiers of segments are all faulty; calm until a plan is set."""

    def __init__(self) -> None:
        super().__init__(rng=random.Random(1))
        self.backends: list[Faulty] = []
        self.make_backend = self._make

    def _make(self, spec: TierSpec) -> Backend:
        self.backends.append(Faulty(make_backend(spec), FaultPlan()))
        return self.backends[-1]

    def plan(self, text: str) -> None:
        for backend in self.backends:
            backend.plan = FaultPlan.parse(text)
            backend.injected.clear()

    @property
    def injected(self) -> int:
        return sum(sum(backend.injected.values()) for backend in self.backends)


NEAR, FAR = slots(*range(100)), slots(*range(1000, 1400))


async def fill(shard: Shard) -> tuple[Space, Space]:
    """One space in RAM, one on the tier that will lie, over several segments."""
    near = shard.spaces.create("near", limits=Limits(tiers=("ram",)))
    far = shard.spaces.create("far", limits=Limits(tiers=("objects",)))
    await shard.pager.store(near, NEAR, pages(NEAR, 1))
    for start in range(0, len(FAR), 100):
        part = FAR[start : start + 100]
        await shard.pager.store(far, part, pages(part, 1))
    return near, far


async def outcomes(shard: Shard, space: Space, where: np.ndarray) -> dict[str, int]:
    """Loads page by page; asserts that whatever comes is right."""
    found: dict[str, int] = {}
    named: list[int] = []
    for slot in where.tolist():
        try:
            loaded = await shard.pager.load(space, slots(slot))
        except VswapError as error:
            kind = type(error).__name__
            named += error.fields["slots"]
        else:
            assert (loaded[0] == page(slot, 1)).all(), slot
            kind = "right"
        found[kind] = found.get(kind, 0) + 1
    assert len(named) == len(where) - found.get("right", 0)
    assert set(named) <= set(where.tolist())
    return found


@pytest.mark.parametrize(
    ("plan", "kinds"),
    [
        ("flip=0.7", {"right", "PageCorrupt"}),
        ("short=0.5", {"right", "PageLost"}),
        ("stale=0.7", {"right", "PageCorrupt", "PageLost"}),
        ("error=0.3", {"right", "TierUnavailable"}),
    ],
)
async def test_lying_reads_never_give_wrong_bytes(
    tmp_path: Path, plan: str, kinds: set[str]
) -> None:
    seams = Liar()
    async with open_shard(tmp_path / "s", ram(), objects(tmp_path / "o"), seams=seams) as shard:
        near, far = await fill(shard)
        seams.plan(f"seed=3,{plan}")
        found = await outcomes(shard, far, FAR[:200])
        assert seams.injected
        assert set(found) <= kinds
        assert len(found) > 1, found
        assert (await shard.pager.load(near, NEAR) == pages(NEAR, 1)).all()
        # The transfers were bad, not what is stored.
        seams.plan("")
        await _well_again(shard, far)
        assert (await shard.pager.load(far, FAR) == pages(FAR, 1)).all()


async def _well_again(shard: Shard, space: Space) -> None:
    """Until the breaker has let a probe through."""
    for _ in range(200):
        try:
            await shard.pager.load(space, FAR[:1])
        except TierUnavailable as error:
            await asyncio.sleep(error.fields.get("retry_after_s", 0.05))
        else:
            return
    raise AssertionError("the breaker stays open")


async def test_a_bad_transfer_is_not_a_bad_copy(tmp_path: Path) -> None:
    seams = Liar()
    async with open_shard(tmp_path / "s", ram(), objects(tmp_path / "o"), seams=seams) as shard:
        _, far = await fill(shard)
        seams.plan("flip=0.5,seed=1")
        # One in eight is damaged three times in a row; every other one without another try.
        assert (await outcomes(shard, far, FAR[:200]))["right"] > 140


async def test_a_short_read_is_not_a_lost_page(tmp_path: Path) -> None:
    seams = Liar()
    async with open_shard(tmp_path / "s", ram(), objects(tmp_path / "o"), seams=seams) as shard:
        _, far = await fill(shard)
        seams.plan("short=0.5,seed=1")
        # One in eight comes short three times in a row; every other one without another try.
        assert (await outcomes(shard, far, FAR[:200]))["right"] > 140
        # A tier that does not answer is not asked again: that would be two more timeouts.
        seams.plan("error=1")
        with pytest.raises(TierUnavailable):
            await shard.pager.load(far, FAR[:1])
        assert seams.injected == 1


async def test_a_range_that_is_not_there_fails_for_its_own_pages_alone(tmp_path: Path) -> None:
    """Of a torn segment, what is left of it is read, in one load with what is not."""
    async with open_shard(tmp_path / "s", objects(tmp_path / "o")) as shard:
        space = shard.spaces.create("far")
        await shard.pager.store(space, FAR[:100], pages(FAR[:100], 1))
        [path] = [p for p in (tmp_path / "o").rglob("*") if p.is_file()]
        path.write_bytes(path.read_bytes()[:100_000])
        with pytest.raises(PageLost) as lost:
            await shard.pager.load(space, FAR[:100])
        gone = set(lost.value.fields["slots"])
        assert 0 < len(gone) < 100
        left = np.array(sorted(set(FAR[:100].tolist()) - gone), np.uint64)
        assert (await shard.pager.load(space, left) == pages(left, 1)).all()


async def test_exchanged_answers_are_found_and_read_again(tmp_path: Path) -> None:
    seams = Liar()
    async with open_shard(tmp_path / "s", ram(), objects(tmp_path / "o"), seams=seams) as shard:
        _, far = await fill(shard)
        # One page of each segment: ranges that are not coalesced, so that there is what to swap.
        where = FAR[::100]
        seams.plan("swap=0.5,seed=1")
        right, named = 0, set()
        for _ in range(40):
            try:
                loaded = await shard.pager.load(far, where)
            except PageCorrupt as error:
                named |= set(error.fields["slots"])
            else:
                assert (loaded == pages(where, 1)).all()
                right += 1
        assert seams.injected
        assert right
        assert named <= set(where.tolist())
        seams.plan("swap=1")
        with pytest.raises(PageCorrupt):
            await shard.pager.load(far, where)


@pytest.mark.parametrize("plan", ["vanish=1", "torn=1"])
async def test_a_write_that_was_not_kept_is_an_error_for_its_pages_alone(
    tmp_path: Path, plan: str
) -> None:
    seams = Liar()
    async with open_shard(tmp_path / "s", ram(), objects(tmp_path / "o"), seams=seams) as shard:
        near, far = await fill(shard)
        seams.plan(f"{plan},seed=5")
        doomed = slots(*range(5000, 5050))
        await shard.pager.store(far, doomed, pages(doomed, 1))
        seams.plan("")
        found = await outcomes(shard, far, doomed)
        assert set(found) <= {"right", "PageLost", "PageCorrupt"}
        assert found.get("PageLost", 0) + found.get("PageCorrupt", 0) > 0
        with pytest.raises((PageLost, PageCorrupt)) as lost:
            await shard.pager.load(far, np.concatenate([FAR, doomed]))
        assert set(lost.value.fields["slots"]) <= set(doomed.tolist())
        assert (await shard.pager.load(far, FAR) == pages(FAR, 1)).all()
        assert (await shard.pager.load(near, NEAR) == pages(NEAR, 1)).all()
        # They can be stored again, and freed.
        await shard.pager.store(far, doomed, pages(doomed, 2))
        assert (await shard.pager.load(far, doomed) == pages(doomed, 2)).all()


@pytest.mark.parametrize("plan", ["vanish=1", "torn=1", "flip=1"])
async def test_with_verified_writes_a_lying_write_is_not_acknowledged(
    tmp_path: Path, plan: str
) -> None:
    seams = Liar()
    tier = objects(tmp_path / "o", verify_writes=True)
    async with open_shard(tmp_path / "s", ram(), tier, seams=seams) as shard:
        near, far = await fill(shard)
        seams.plan(plan)
        with pytest.raises(VswapError):
            await shard.pager.store(far, FAR, pages(FAR, 2))
        seams.plan("")
        assert (await shard.pager.load(far, FAR) == pages(FAR, 1)).all()
        assert (await shard.pager.load(near, NEAR) == pages(NEAR, 1)).all()


async def test_demotion_passes_over_a_tier_that_fails(tmp_path: Path) -> None:
    class OneBad(Liar):
        def _make(self, spec: TierSpec) -> Backend:
            backend = super()._make(spec)
            assert isinstance(backend, Faulty)
            if spec.name == "bad":
                backend.plan = FaultPlan(error=1)
            return backend

    seams = OneBad()
    bad, good = objects(tmp_path / "b", "bad", rank=10), objects(tmp_path / "g", "good", rank=20)
    async with open_shard(tmp_path / "s", ram(mib=4), bad, good, seams=seams) as shard:
        space = shard.spaces.create("s")
        where = slots(*range(8 * MIB // 4096))
        for start in range(0, len(where), 128):
            part = where[start : start + 128]
            await shard.pager.store(space, part, pages(part, 1))
        for start in range(0, len(where), 128):
            part = where[start : start + 128]
            assert (await shard.pager.load(space, part) == pages(part, 1)).all()
        held = {usage.tier: usage.pages for usage in shard.usage()}
        assert held["bad"] == 0
        assert held["good"] > 0
        assert shard.counters()["evacuated_pages"] > 0


async def test_a_batch_over_tiers_names_the_pages_of_the_sick_one(tmp_path: Path) -> None:
    seams = Liar()
    bad, good = objects(tmp_path / "b", "bad", rank=10), objects(tmp_path / "g", "good", rank=20)
    async with open_shard(tmp_path / "s", ram(), bad, good, seams=seams) as shard:
        space = shard.spaces.create("s")
        for tier, start in (("ram", 0), ("bad", 100), ("good", 300)):
            shard.spaces.change("s", Limits(tiers=(tier,)))
            for first in range(start, start + 40, 20):
                where = slots(*range(first, first + 20))
                await shard.pager.store(space, where, pages(where, 1))
        seams.backends[0].plan = FaultPlan(error=1)
        everything = slots(*range(40), *range(100, 140), *range(300, 340))
        for _ in range(5):
            with pytest.raises(TierUnavailable) as error:
                await shard.pager.load(space, everything)
            assert error.value.fields["slots"] == list(range(100, 140))
            assert error.value.fields["tier"] == "bad"
        assert error.value.fields["retry_after_s"] > 0
        rest = everything[(everything < 100) | (everything >= 300)]
        assert (await shard.pager.load(space, rest) == pages(rest, 1)).all()


async def test_requests_that_were_held_back_do_not_lengthen_the_pause(tmp_path: Path) -> None:
    seams = Liar()
    seams.clock = lambda: 100.0
    async with open_shard(tmp_path / "s", ram(), objects(tmp_path / "o"), seams=seams) as shard:
        _, far = await fill(shard)
        seams.plan("error=1")
        for _ in range(4):
            with pytest.raises(TierUnavailable):
                await shard.pager.load(far, FAR[:1])
        pause = shard.tiers.get("objects").sick_for_s
        assert pause > 0
        for _ in range(20):
            with pytest.raises(TierUnavailable, match="left alone"):
                await shard.pager.load(far, FAR[:1])
        assert shard.tiers.get("objects").sick_for_s == pause
