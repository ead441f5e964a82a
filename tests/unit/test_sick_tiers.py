"""A tier that hangs or fails costs its own pages time, and no others."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from shards import objects, open_shard, pages, ram, slots

from vswap.node.seams import Seams
from vswap.node.shard import Shard
from vswap.node.spaces import Limits, Space
from vswap.tiers.backend import Backend, Buffer, SegmentName
from vswap.tiers.factory import make_backend
from vswap.tiers.spec import TierSpec
from vswap.tiers.wrappers.faulty import FaultPlan, Faulty

WHERE = np.arange(100, dtype=np.uint64)


async def filled(shard: Shard, tier: str) -> Space:
    space = shard.spaces.create(tier, limits=Limits(tiers=(tier,)))
    await shard.pager.store(space, WHERE, pages(WHERE, 1))
    return space


async def test_a_disk_that_hangs_holds_up_no_page_of_other_tiers(tmp_path: Path) -> None:
    """However many loads wait for it: other tiers have threads of their own, and RAM needs none."""
    hangs = objects(tmp_path / "h", "hangs", timeout_s=60)
    other = objects(tmp_path / "o", "other", timeout_s=60)
    async with open_shard(tmp_path / "s", ram(), hangs, other) as shard:
        spaces = {name: await filled(shard, name) for name in ("ram", "hangs", "other")}
        [segment] = [path for path in (tmp_path / "h").rglob("*") if path.is_file()]
        # To open a pipe waits for a writer that never comes.
        segment.unlink()
        os.mkfifo(segment)
        try:
            waiting = [
                asyncio.create_task(shard.pager.load(spaces["hangs"], WHERE)) for _ in range(50)
            ]
            await asyncio.sleep(0.1)
            async with asyncio.timeout(20):
                for name in ("ram", "other"):
                    assert (await shard.pager.load(spaces[name], WHERE) == pages(WHERE, 1)).all()
                    await shard.pager.store(spaces[name], WHERE, pages(WHERE, 2))
            assert not any(task.done() for task in waiting)
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            # Whoever still waits in there finds an empty file.
            release = os.open(segment, os.O_RDWR)
            segment.unlink()
            segment.touch()
            await asyncio.sleep(0.2)
            os.close(release)


async def test_stores_pass_over_a_tier_that_fails(tmp_path: Path) -> None:
    """And it is left alone for a while: a store does not wait for what another one has found."""
    asked: list[SegmentName] = []

    class Failing(Faulty):
        async def put(self, name: SegmentName, data: Buffer) -> None:
            asked.append(name)
            await super().put(name, data)

    def make(spec: TierSpec) -> Backend:
        backend = make_backend(spec)
        return Failing(backend, FaultPlan(error=1)) if spec.name == "sick" else backend

    def tiers() -> Sequence[TierSpec]:
        return objects(tmp_path / "a", "sick", rank=1), objects(tmp_path / "b", "well", rank=2)

    seams = Seams(make_backend=make, clock=lambda: 100.0)
    async with open_shard(tmp_path / "s", *tiers(), seams=seams) as shard:
        space = shard.spaces.create("s")
        for slot in (1, 2, 3):
            await shard.pager.store(space, slots(slot), pages(slots(slot), 1))
        assert len(asked) == 1
        where = slots(1, 2, 3)
        assert (await shard.pager.load(space, where) == pages(where, 1)).all()
        assert {usage.tier: usage.pages for usage in shard.usage()} == {"sick": 0, "well": 3}
