"""Damaged segments: what a load can read of them moves, and nothing else is given up for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from shards import objects, open_shard, pages, ram, slots

from vswap.node.directives import Directive, MoveKind
from vswap.node.scrub import Scrubbed
from vswap.node.shard import Shard
from vswap.node.spaces import Limits
from vswap.tiers.record import ROW_BYTES
from vswap.tiers.segment import TRAILER_BYTES
from vswap.wire.errors import PageCorrupt, PageLost

N = 200
ALL = slots(*range(N))


@pytest.fixture
async def shard(tmp_path: Path) -> AsyncIterator[Shard]:
    """One segment of 200 pages on a store of objects, and another store with room."""
    near, far = objects(tmp_path / "near", "near"), objects(tmp_path / "far", "far", rank=60)
    async with open_shard(tmp_path / "state", near, far) as shard:
        space = shard.spaces.create("s")
        await shard.pager.store(space, ALL, pages(ALL, 1))
        yield shard


def file_of(shard: Shard, tmp_path: Path) -> Path:
    tier = shard.tiers.find("near")
    assert tier is not None
    [handle] = tier.segments
    return tmp_path / "near" / tier.segment_name(handle).key


async def drain(shard: Shard, tier_name: str, *, lost: bool = False, ends: bool = True) -> int:
    """Drains a tier; whether it ends is asserted. Returns how many pages were given up."""
    shard.directives.start(Directive("drain", MoveKind.DRAIN, tier_name, lost=lost))
    tier = shard.tiers.find(tier_name)
    assert tier is not None
    async with asyncio.timeout(20):
        while True:
            [progress] = shard.directives.progress()
            if progress.state == "done" or (not ends and "missing" in progress.reason):
                break
            await asyncio.sleep(0.01)
    assert (progress.state == "done") == ends == (not tier.segments)
    shard.directives.stop("drain")
    return progress.pages_lost


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize(
    "behind",
    [
        TRAILER_BYTES,  # The trailer's first byte.
        8,  # The hash.
        TRAILER_BYTES + 4,  # The last row's loc, and the one before's slot.
        TRAILER_BYTES + ROW_BYTES + 8,
        TRAILER_BYTES + ROW_BYTES * N,  # The first row's space.
    ],
)
async def test_what_a_segment_says_of_itself_costs_no_page(
    shard: Shard, tmp_path: Path, behind: int, lost: bool
) -> None:
    path = file_of(shard, tmp_path)
    data = bytearray(path.read_bytes())
    data[-behind] ^= 0xFF
    path.write_bytes(data)
    seen = await shard.scrub(0, Scrubbed(), "near")
    assert (seen.damaged_pages, seen.lost_pages) == (0, 0)
    assert await drain(shard, "near", lost=lost) == 0
    space = shard.spaces.get("s")
    assert np.array_equal(await shard.pager.load(space, ALL), pages(ALL, 1))
    assert not shard.handles.pins.any()


async def test_what_is_left_of_a_torn_segment_moves(shard: Shard, tmp_path: Path) -> None:
    path = file_of(shard, tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    space = shard.spaces.get("s")
    there = []
    for slot in range(N):
        try:
            await shard.pager.load(space, slots(slot))
        except PageLost:
            continue
        there.append(slot)
    assert N // 4 < len(there) < 3 * N // 4
    seen = await shard.scrub(0, Scrubbed(), "near")
    assert (seen.damaged_pages, seen.lost_pages) == (0, N - len(there))
    await drain(shard, "near", ends=False)
    path.unlink()
    # What could be read lies elsewhere by now.
    good = slots(*there)
    assert np.array_equal(await shard.pager.load(space, good), pages(good, 1))
    path.write_bytes(whole)
    assert np.array_equal(await shard.pager.load(space, ALL), pages(ALL, 1))
    path.write_bytes(whole[: len(whole) // 2])
    assert await drain(shard, "near", lost=True) == N - len(there)
    assert np.array_equal(await shard.pager.load(space, good), pages(good, 1))


async def test_nothing_readable_is_given_up_for_lack_of_room(tmp_path: Path) -> None:
    """A torn segment, and no room elsewhere for what is left of it."""
    near, far = objects(tmp_path / "near", "near"), objects(tmp_path / "far", "far", rank=60)
    async with open_shard(tmp_path / "state", near, far) as shard:
        space = shard.spaces.create("s", limits=Limits(tiers=("near",)))
        await shard.pager.store(space, ALL, pages(ALL, 1))
        path = file_of(shard, tmp_path)
        path.write_bytes(path.read_bytes()[:200_000])
        shard.directives.start(Directive("drain", MoveKind.DRAIN, "near", lost=True))
        await asyncio.sleep(1)
        [progress] = shard.directives.progress()
        assert progress.state != "done"
        assert progress.pages_lost == 0
        assert np.array_equal(await shard.pager.load(space, ALL[:50]), pages(ALL[:50], 1))


@pytest.mark.parametrize(("byte", "value"), [(8, 0xFF), (11, 0xFF), (4, 1), (0, 9)])
async def test_a_damaged_row_in_ram_costs_no_page(tmp_path: Path, byte: int, value: int) -> None:
    async with open_shard(tmp_path / "state", ram(mib=8), objects(tmp_path / "far")) as shard:
        space = shard.spaces.create("s")
        await shard.pager.store(space, ALL, pages(ALL, 1))
        tier = shard.tiers.find("ram")
        assert tier is not None
        assert tier.ram is not None
        for handle in tier.segments:
            block = tier.ram.view(int(shard.handles.rows["block"][handle]))
            # Of the oldest record.
            block[len(block) - ROW_BYTES + byte] ^= value
        assert await drain(shard, "ram") == 0
        assert np.array_equal(await shard.pager.load(space, ALL), pages(ALL, 1))


async def test_bad_bytes_in_a_segment_of_which_nothing_else_is_right(
    shard: Shard, tmp_path: Path
) -> None:
    path = file_of(shard, tmp_path)
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    data[-TRAILER_BYTES] ^= 1
    path.write_bytes(data)
    assert await drain(shard, "near") == 0
    space = shard.spaces.get("s")
    with pytest.raises(PageCorrupt):
        await shard.pager.load(space, slots(0))
    assert np.array_equal(await shard.pager.load(space, ALL[1:]), pages(ALL[1:], 1))
