"""What a restart does with what a killed node left half-done."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from shards import objects, open_shard, pages, ram, slots

from vswap.node.seams import Seams
from vswap.node.shard import Shard
from vswap.tiers.backend import Backend, Buffer, SegmentName
from vswap.tiers.factory import make_backend
from vswap.tiers.spec import TierSpec
from vswap.tiers.wrappers.base import Wrapper
from vswap.wire.errors import BackendRefused, StateInvalid


class Unanswered(Wrapper):
    """Keeps what is put, and does not say so."""

    silent = False

    async def put(self, name: SegmentName, data: Buffer) -> None:
        await super().put(name, data)
        if self.silent:
            await asyncio.Event().wait()


@pytest.mark.parametrize("late", [False, True])
async def test_a_segment_that_was_being_written_at_the_kill_is_deleted(
    late: bool, tmp_path: Path
) -> None:
    """Nothing of it was acknowledged. ``late``: it lands once the next life has deleted it."""
    backends: list[Unanswered] = []

    def make(spec: TierSpec) -> Backend:
        backends.append(Unanswered(make_backend(spec)))
        return backends[-1]

    def kept() -> list[Path]:
        return [path for path in (tmp_path / "o").rglob("*") if path.is_file()]

    tier = objects(tmp_path / "o")
    async with open_shard(tmp_path / "s", tier, seams=Seams(make_backend=make)) as killed:
        space = killed.spaces.create("s")
        await killed.pager.store(space, slots(1), pages(slots(1), 1))
        [acknowledged] = kept()
        backends[0].silent = True
        writing = asyncio.create_task(killed.pager.store(space, slots(1, 2), pages(slots(1, 2), 2)))
        async with asyncio.timeout(10):
            while len(kept()) < 2:
                await asyncio.sleep(0.01)
        [half] = set(kept()) - {acknowledged}
        content = half.read_bytes()
        # The first life says nothing any more, and does nothing: as good as killed.
        async with open_shard(tmp_path / "s", tier, seams=Seams(late_s=3.0)) as shard:
            async with asyncio.timeout(10):
                while half.exists():
                    await asyncio.sleep(0.01)
                if late:
                    half.write_bytes(content)
                while half.exists() or shard.reaper.pending:
                    await asyncio.sleep(0.01)
            assert kept() == [acknowledged]
            assert len(shard.tiers.get("objects").segments) == 1
            loaded = await shard.pager.load(shard.spaces.get("s"), slots(1))
            assert (loaded == pages(slots(1), 1)).all()
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)


async def test_the_arena_of_an_empty_tier_may_have_any_capacity(tmp_path: Path) -> None:
    """A first start that failed left it, or nothing is in it any more."""
    state = tmp_path / "s"
    state.mkdir()
    (tmp_path / "wrong").write_text("is no directory")
    with pytest.raises(BackendRefused):
        await Shard.open(state, [ram(mib=64), objects(tmp_path / "wrong", "wrong")])
    async with open_shard(state, ram(mib=8)) as shard:
        space = shard.spaces.create("s")
        await shard.pager.store(space, slots(1, 2), pages(slots(1, 2), 1))
    with pytest.raises(StateInvalid, match="set capacity_bytes back"):
        await Shard.open(state, [ram(mib=64)])
    async with open_shard(state, ram(mib=8)) as shard:
        space = shard.spaces.get("s")
        assert (await shard.pager.load(space, slots(1, 2)) == pages(slots(1, 2), 1)).all()
        await shard.pager.free(space, slots(1, 2))
    for mib in (64, 4):
        async with open_shard(state, ram(mib=mib)) as shard:
            space = shard.spaces.get("s")
            await shard.pager.store(space, slots(1, 2), pages(slots(1, 2), mib))
            assert (await shard.pager.load(space, slots(1, 2)) == pages(slots(1, 2), mib)).all()
            await shard.pager.free(space, slots(1, 2))
