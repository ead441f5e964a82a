"""The pager on a real shard: batches, limits, exclusive loads, all tiers full."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest
from numpy.typing import NDArray
from shards import MIB, objects, open_shard, page, pages, ram, slots

from vswap.node.seams import Seams
from vswap.node.spaces import Limits
from vswap.node.tier import TierState
from vswap.tiers.backend import Backend, Buffer, SegmentName
from vswap.tiers.factory import make_backend
from vswap.tiers.record import U8
from vswap.tiers.spec import TierSpec
from vswap.tiers.wrappers.faulty import FaultPlan, Faulty
from vswap.wire.errors import (
    AlreadyExists,
    InvalidRequest,
    OutOfTiers,
    SlotNotFound,
    SlotOutOfRange,
    SpaceFull,
    StaleIncarnation,
    TierUnavailable,
    UnknownSpace,
)


@pytest.mark.parametrize("page_bytes", [4096, 8192, 16384, 32768, 65536])
@pytest.mark.parametrize("codec", ["none", "zstd:1", "lz4"])
async def test_what_is_stored_is_loaded(tmp_path: Path, page_bytes: int, codec: str) -> None:
    async with open_shard(tmp_path, ram(codec=codec, mib=32)) as shard:
        space = shard.spaces.create("s", page_bytes)
        where = slots(*range(0, 300, 3))
        content = pages(where, 1, page_bytes)
        content[5] = 0
        content[6] = np.tile(np.frombuffer(b"\1\2\3\4", np.uint8), page_bytes // 4)
        content[7] = np.random.default_rng(0).integers(0, 256, page_bytes)
        await shard.pager.store(space, where, content)
        assert (await shard.pager.load(space, where) == content).all()
        back = where[::-1]
        assert (await shard.pager.load(space, back) == content[::-1]).all()
        assert shard.fill_pages == 2
        assert await shard.pager.free(space, where) == len(where)
        assert shard.pages == 0


async def test_a_batch_spans_all_backends(tmp_path: Path) -> None:
    tiers = [ram(mib=2), ram("zram", mib=2, codec="zstd:1", rank=1), objects(tmp_path / "o")]
    async with open_shard(tmp_path / "s", *tiers) as shard:
        space = shard.spaces.create("s")
        where = np.arange(4000, dtype=np.uint64)
        for start in range(0, 4000, 200):
            part = where[start : start + 200]
            await shard.pager.store(space, part, pages(part, 1))
        await shard.pager.store(space, slots(7), np.zeros((1, 4096), np.uint8))
        places = {shard.places[tag] for tag in shard.pager.locate(space, where).tolist()}
        assert places == {"fill", "ram", "zram", "objects"}
        expected = pages(where, 1)
        expected[7] = 0
        mixed = np.random.default_rng(1).permutation(where)
        assert (await shard.pager.load(space, mixed) == expected[mixed]).all()


async def test_errors_name_the_slots_and_change_nothing(tmp_path: Path) -> None:
    async with open_shard(tmp_path, ram()) as shard:
        space = shard.spaces.create("s", max_slots=100)
        await shard.pager.store(space, slots(1), pages(slots(1), 1))
        with pytest.raises(SlotOutOfRange) as outside:
            await shard.pager.store(space, slots(1, 100), pages(slots(1, 100), 2))
        assert outside.value.fields["slots"] == [100]
        with pytest.raises(SlotNotFound) as missing:
            await shard.pager.load(space, slots(1, 2, 3))
        assert missing.value.fields["slots"] == [2, 3]
        assert (await shard.pager.load(space, slots(1)) == pages(slots(1), 1)).all()
        assert await shard.pager.free(space, slots(2, 3)) == 0


async def test_a_write_that_was_not_kept_goes_to_another_tier(tmp_path: Path) -> None:
    def make(spec: TierSpec) -> Backend:
        return Faulty(make_backend(spec), FaultPlan(torn=1 if spec.name == "liar" else 0))

    liar = objects(tmp_path / "a", "liar", rank=1, verify_writes=True)
    honest = objects(tmp_path / "b", "honest", rank=2)
    async with open_shard(tmp_path / "s", liar, honest, seams=Seams(make_backend=make)) as shard:
        space = shard.spaces.create("s")
        await shard.pager.store(space, slots(1, 2), pages(slots(1, 2), 1))
        assert (await shard.pager.load(space, slots(1, 2)) == pages(slots(1, 2), 1)).all()
        assert not shard.tiers.get("liar").writable


async def test_a_grant_that_is_a_little_too_small_is_raised(tmp_path: Path) -> None:
    """There is room for the records, not for the segment with its padding: that must be asked for,
    and not be tried again and again."""
    urls = tuple(f"file://{tmp_path}/{place}" for place in range(3))
    spec = TierSpec(
        name="coded", urls=urls, redundancy="rs:2+1", codec="none", capacity_bytes=64 * MIB
    )
    async with open_shard(tmp_path / "s") as shard:
        await shard.join(UUID(int=7))
        await shard.configure(1, [(spec, TierState.ACTIVE)])
        tier = shard.tiers.get("coded")
        tier.limit_bytes = tier.reserve_bytes + 16_500
        loop = asyncio.get_running_loop()

        def ask(name: str, total_bytes: int) -> None:
            loop.call_soon(shard.set_grant, name, total_bytes)

        shard.connect_grants(ask)
        space = shard.spaces.create("s")
        where = slots(1, 2, 3)
        content = np.random.default_rng(0).integers(0, 256, (3, 4096), np.uint8)
        await shard.pager.store(space, where, content)
        assert (await shard.pager.load(space, where) == content).all()


async def test_the_last_of_duplicates_wins(tmp_path: Path) -> None:
    async with open_shard(tmp_path, ram()) as shard:
        space = shard.spaces.create("s")
        where = slots(4, 9, 4, 4)
        content = np.stack([page(4, 1), page(9, 1), page(4, 2), page(4, 3)])
        await shard.pager.store(space, where, content)
        assert (await shard.pager.load(space, slots(4, 9)) == content[[3, 1]]).all()
        assert shard.pages == 2


async def test_a_quota_holds_and_an_overwrite_needs_only_the_difference(tmp_path: Path) -> None:
    async with open_shard(tmp_path, ram(mib=16)) as shard:
        cost = 4096 + 16 + 12
        space = shard.spaces.create("s", limits=Limits(quota_bytes=100 * cost))
        where = np.arange(100, dtype=np.uint64)
        await shard.pager.store(space, where, pages(where, 1))
        with pytest.raises(SpaceFull) as full:
            await shard.pager.store(space, slots(5, 100), pages(slots(5, 100), 2))
        assert full.value.fields["room"] < full.value.fields["need"]
        assert (await shard.pager.load(space, where) == pages(where, 1)).all()
        assert space.events["quota"] == 1
        await shard.pager.store(space, where, pages(where, 3))
        await shard.pager.store(space, slots(200), np.zeros((1, 4096), np.uint8))
        assert (await shard.pager.load(space, where) == pages(where, 3)).all()
        shard.spaces.change("s", Limits())
        await shard.pager.store(space, slots(100), pages(slots(100), 2))


async def test_tier_limits_and_masks_hold(tmp_path: Path) -> None:
    tiers = [ram(mib=8), ram("zram", mib=8, codec="zstd:1", rank=1), objects(tmp_path / "o")]
    async with open_shard(tmp_path / "s", *tiers) as shard:
        masked = shard.spaces.create("masked", limits=Limits(tiers=("objects",)))
        forbidden = shard.spaces.create("forbidden", limits=Limits(tier_max_bytes={"ram": 0}))
        where = np.arange(300, dtype=np.uint64)
        for space in (masked, forbidden):
            await shard.pager.store(space, where, pages(where, 1))
            assert (await shard.pager.load(space, where) == pages(where, 1)).all()
        names = shard.places
        assert {names[t] for t in shard.pager.locate(masked, where).tolist()} == {"objects"}
        assert {names[t] for t in shard.pager.locate(forbidden, where).tolist()} == {"zram"}


async def test_all_tiers_full_is_an_error_and_loses_nothing(tmp_path: Path) -> None:
    async with open_shard(tmp_path, ram(mib=2)) as shard:
        space = shard.spaces.create("s")
        stored = 0
        with pytest.raises(OutOfTiers) as full:
            while True:
                where = np.arange(stored, stored + 50, dtype=np.uint64)
                await shard.pager.store(space, where, pages(where, 1))
                stored += 50
        assert full.value.fields["tiers"] == ["ram"]
        assert stored >= 300
        assert shard.pages == stored
        every = np.arange(stored, dtype=np.uint64)
        assert (await shard.pager.load(space, every) == pages(every, 1)).all()
        # Overwriting and freeing go on; what was freed is room again.
        await shard.pager.free(space, every[:200])
        again = np.arange(1000, 1150, dtype=np.uint64)
        await shard.pager.store(space, again, pages(again, 2))
        assert (await shard.pager.load(space, again) == pages(again, 2)).all()


async def test_full_shared_memory_is_an_error_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To touch memory that is not there would be SIGBUS: it is asked for first."""
    allocate, left = os.posix_fallocate, 4 * MIB

    def some(fd: int, offset: int, length: int) -> None:
        nonlocal left
        if length > left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left -= length
        allocate(fd, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", some)
    async with open_shard(tmp_path, ram(mib=64)) as shard:
        space = shard.spaces.create("s")
        stored: list[NDArray[np.uint64]] = []
        with pytest.raises(OutOfTiers):
            for start in range(0, 64 * MIB // 4096, 100):
                where = np.arange(start, start + 100, dtype=np.uint64)
                await shard.pager.store(space, where, pages(where, 1))
                stored.append(where)
        assert stored
        for where in stored:
            assert (await shard.pager.load(space, where) == pages(where, 1)).all()
        # Part of the sparse files, all that was used was allocated.
        blocks = sum(path.stat().st_blocks for path in tmp_path.iterdir()) * 512
        assert blocks <= 5 * MIB
        left = 64 * MIB
        again = np.arange(5000, 5100, dtype=np.uint64)
        async with asyncio.timeout(120):
            while True:
                try:
                    await shard.pager.store(space, again, pages(again, 2))
                    break
                except OutOfTiers:
                    await asyncio.sleep(1)


async def test_a_batch_larger_than_any_tier_is_split_over_tiers(tmp_path: Path) -> None:
    tiers = [ram(mib=2), ram("second", mib=3, rank=1)]
    async with open_shard(tmp_path, *tiers) as shard:
        space = shard.spaces.create("s")
        where = np.arange(700, dtype=np.uint64)
        await shard.pager.store(space, where, pages(where, 1))
        assert (await shard.pager.load(space, where) == pages(where, 1)).all()


async def test_a_batch_that_no_limit_admits_as_a_whole_is_split(tmp_path: Path) -> None:
    tiers = [ram(mib=4), objects(tmp_path / "o", codec="none")]
    async with open_shard(tmp_path / "s", *tiers) as shard:
        most = {"ram": MIB, "objects": MIB}
        space = shard.spaces.create("s", limits=Limits(tier_max_bytes=most))
        where = np.arange(400, dtype=np.uint64)
        await shard.pager.store(space, where, pages(where, 1))
        assert (await shard.pager.load(space, where) == pages(where, 1)).all()
        # What they replace makes room for them.
        await shard.pager.store(space, where, pages(where, 2))
        assert not space.events
        for tier in shard.tiers:
            assert MIB // 2 < space.bytes_by_tag[tier.tag] <= MIB
        more = np.arange(1000, 1200, dtype=np.uint64)
        with pytest.raises(SpaceFull) as full:
            await shard.pager.store(space, more, pages(more, 1))
        assert full.value.fields["need"] > 200 * 4096
        assert (space.pages, space.events) == (400, {"quota": 1})


async def test_a_full_tier_and_a_limit_share_a_batch(tmp_path: Path) -> None:
    tiers = [ram(mib=1), objects(tmp_path / "o", codec="none")]
    async with open_shard(tmp_path / "s", *tiers) as shard:
        limits = Limits(tier_max_bytes={"objects": MIB})
        space = shard.spaces.create("s", limits=limits)
        where = np.arange(300, dtype=np.uint64)
        await shard.pager.store(space, where, pages(where, 1))
        assert (await shard.pager.load(space, where) == pages(where, 1)).all()


async def test_stores_at_once_see_each_other_in_a_tiers_limit(tmp_path: Path) -> None:
    tiers = [objects(tmp_path / "o", codec="none"), objects(tmp_path / "p", "next", rank=60)]
    async with open_shard(tmp_path / "s", ram("unused"), *tiers) as shard:
        limits = Limits(tiers=("objects", "next"), tier_max_bytes={"objects": MIB})
        space = shard.spaces.create("s", limits=limits)
        batches = [np.arange(n, n + 150, dtype=np.uint64) for n in (0, 1000)]
        await asyncio.gather(*(shard.pager.store(space, b, pages(b, 1)) for b in batches))
        assert space.bytes_by_tag[shard.tiers.get("objects").tag] <= MIB
        for batch in batches:
            assert (await shard.pager.load(space, batch) == pages(batch, 1)).all()
        # Nothing is held against those that come later.
        await shard.pager.free(space, np.concatenate(batches))
        await shard.pager.store(space, batches[0], pages(batches[0], 1))
        assert set(shard.pager.locate(space, batches[0])) == {shard.tiers.get("objects").tag}


async def test_a_limit_is_not_the_answer_while_a_tier_is_away(tmp_path: Path) -> None:
    async with open_shard(tmp_path / "s", ram(), objects(tmp_path / "o")) as shard:
        space = shard.spaces.create("s", limits=Limits(tier_max_bytes={"ram": 4096}))
        shard.tiers.get("objects").failed(OSError("no route"))
        with pytest.raises(TierUnavailable, match="no route"):
            await shard.pager.store(space, slots(1), pages(slots(1), 1))


async def test_exclusive_load_frees_only_on_confirmation(tmp_path: Path) -> None:
    async with open_shard(tmp_path, ram()) as shard:
        space = shard.spaces.create("s")
        where = slots(1, 2, 3, 4)
        await shard.pager.store(space, where, pages(where, 1))
        got, token = await shard.pager.load_exclusive(space, where)
        assert (got == pages(where, 1)).all()
        assert shard.pages == 4
        await shard.pager.store(space, slots(2), pages(slots(2), 2))
        await shard.pager.free(space, slots(3))
        await shard.pager.store(space, slots(3), pages(slots(3), 5))
        assert await shard.pager.confirm(space, token) == 2
        assert await shard.pager.confirm(space, token) == 2
        assert (await shard.pager.load(space, slots(2, 3)) == [page(2, 2), page(3, 5)]).all()
        with pytest.raises(SlotNotFound):
            await shard.pager.load(space, slots(1))
        with pytest.raises(StaleIncarnation):
            await shard.pager.confirm(space, token + 1)


async def test_an_unconfirmed_exclusive_load_expires_and_keeps_its_pages(tmp_path: Path) -> None:
    async with open_shard(tmp_path, ram(), exclusive_timeout_s=0.0) as shard:
        space = shard.spaces.create("s")
        await shard.pager.store(space, slots(1), pages(slots(1), 1))
        _, token = await shard.pager.load_exclusive(space, slots(1))
        await asyncio.sleep(0.01)
        with pytest.raises(StaleIncarnation):
            await shard.pager.confirm(space, token)
        assert (await shard.pager.load(space, slots(1)) == page(1, 1)).all()


async def test_spaces_are_created_changed_and_deleted(tmp_path: Path) -> None:
    async with open_shard(tmp_path, ram()) as shard:
        space = shard.spaces.create("s", max_slots=10)
        assert shard.spaces.create("s", max_slots=10, exist_ok=True) is space
        with pytest.raises(AlreadyExists):
            shard.spaces.create("s", max_slots=10)
        with pytest.raises(AlreadyExists):
            shard.spaces.create("s", max_slots=11, exist_ok=True)
        for name, page_bytes, most in (("", 4096, 1), ("x", 4095, 1), ("x", 2048, 1),
                                       ("x", 131072, 1), ("x", 4096, 0), ("x", 4096, 1 << 33),
                                       ("../x", 4096, 1)):  # fmt: skip
            with pytest.raises(InvalidRequest):
                shard.spaces.create(name, page_bytes, most)
        await shard.pager.store(space, slots(3), pages(slots(3), 1))
        shard.spaces.change("s", Limits(), max_slots=1 << 30)
        await shard.pager.store(space, slots(1 << 29), pages(slots(9), 1))
        with pytest.raises(InvalidRequest):
            shard.spaces.change("s", Limits(), max_slots=10)
        assert await shard.delete_space("s") == 2
        with pytest.raises(UnknownSpace):
            shard.spaces.get("s")
        with pytest.raises(UnknownSpace):
            await shard.pager.load(space, slots(3))
        assert shard.pages == 0
        assert not list(tmp_path.glob("space-*"))


async def test_a_reopened_shard_has_its_pages(tmp_path: Path) -> None:
    tiers = [ram(mib=2), objects(tmp_path / "o")]
    where = np.arange(2000, dtype=np.uint64)
    async with open_shard(tmp_path / "s", *tiers) as shard:
        space = shard.spaces.create("s")
        for start in range(0, 2000, 100):
            part = where[start : start + 100]
            await shard.pager.store(space, part, pages(part, 1))
        before = shard.uuid
    async with open_shard(tmp_path / "s", *tiers) as shard:
        assert shard.uuid == before
        assert shard.incarnation == 2
        space = shard.spaces.get("s")
        assert (await shard.pager.load(space, where) == pages(where, 1)).all()
        await shard.delete_space("s")
    async with open_shard(tmp_path / "s", *tiers, fresh=True) as shard:
        assert shard.uuid != before
        assert not list(shard.spaces)


async def test_concurrent_stores_of_one_slot_end_with_the_last_acknowledged(tmp_path: Path) -> None:
    async with open_shard(tmp_path, ram(codec="zstd:1", mib=16)) as shard:
        space = shard.spaces.create("s")
        where = np.arange(64, dtype=np.uint64)
        for turn in range(20):
            big = asyncio.create_task(shard.pager.store(space, where, pages(where, 2 * turn)))
            await asyncio.sleep(0)
            small = slots(turn, turn + 1)
            await shard.pager.store(space, small, pages(small, 2 * turn + 1))
            await big
            loaded = await shard.pager.load(space, small)
            assert (loaded == pages(small, 2 * turn + 1)).all()
        assert (shard.handles.pins == 0).all()


async def test_an_update_does_not_undo_a_store_that_it_did_not_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun before it and done after it, the store comes after the update, for what that read."""
    async with open_shard(tmp_path / "s", objects(tmp_path / "o")) as shard:
        space, where = shard.spaces.create("s"), slots(0)
        await shard.pager.store(space, where, pages(where, 1))
        [tier] = shard.tiers
        put, asked, gate = tier.backend.put, asyncio.Event(), asyncio.Event()

        async def slow(name: SegmentName, data: Buffer) -> None:
            asked.set()
            await gate.wait()
            await put(name, data)

        with monkeypatch.context() as patched:
            patched.setattr(tier.backend, "put", slow)
            store = asyncio.create_task(shard.pager.store(space, where, pages(where, 2)))
            await asyncio.wait_for(asked.wait(), 10)

        def edit(held: U8) -> None:
            held[:, 2048:] = 7

        await shard.pager.update(space, where, edit)
        gate.set()
        await store
        assert (await shard.pager.load(space, where) == pages(where, 2)).all()


async def test_stores_at_once_do_not_share_the_same_room(tmp_path: Path) -> None:
    """Of a tier in which one of them fits, at no time more is charged than it may hold."""
    async with open_shard(tmp_path / "s", objects(tmp_path / "o", mib=16, codec="none")) as shard:
        space = shard.spaces.create("s")
        [tier] = shard.tiers
        # Room for one and a half of them.
        tier.limit_bytes = tier.reserve_bytes + 3 * MIB
        content = np.random.default_rng(0).integers(0, 256, (512, 4096), np.uint8)
        batches = [np.arange(n * 512, (n + 1) * 512, dtype=np.uint64) for n in range(2)]
        stores = [
            asyncio.create_task(shard.pager.store(space, where, content)) for where in batches
        ]
        while not all(store.done() for store in stores):
            assert tier.stored_bytes <= tier.limit_bytes
            await asyncio.sleep(0)
        errors = [store.exception() for store in stores]
        assert [type(error) for error in errors if error] == [OutOfTiers]
        await asyncio.sleep(0.1)
        assert tier.stored_bytes <= tier.limit_bytes
        good = errors.index(None)
        assert np.array_equal(await shard.pager.load(space, batches[good]), content)
