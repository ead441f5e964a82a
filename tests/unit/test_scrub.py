"""The scrub finds what no client has read yet."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from shards import MIB, objects, open_shard, pages, ram, slots

from vswap.node import scrub
from vswap.node.scrub import Scrubbed
from vswap.node.shard import Shard
from vswap.tiers.spec import TierSpec
from vswap.wire.errors import PageCorrupt, PageLost, UnknownTier

N = 400


async def fill(shard: Shard) -> None:
    space = shard.spaces.create("s")
    where = slots(*range(N))
    for start in range(0, N, 50):
        part = where[start : start + 50]
        await shard.pager.store(space, part, pages(part, 1))


async def test_a_healthy_node_has_nothing_to_tell(tmp_path: Path) -> None:
    async with open_shard(tmp_path / "state", ram(mib=1), objects(tmp_path / "objects")) as shard:
        await fill(shard)
        seen = await shard.scrub(0, Scrubbed())
        assert seen.segments > 2
        assert seen.bytes > N * 1000
        assert (seen.damaged_pages, seen.lost_pages, seen.skipped, seen.segments_left) == (0,) * 4
        only = await shard.scrub(0, Scrubbed(), "ram")
        assert 0 < only.segments < seen.segments
        with pytest.raises(UnknownTier):
            await shard.scrub(0, Scrubbed(), "nowhere")
        assert not shard.handles.pins.any()


async def test_damage_in_ram_is_found_and_set_aside(tmp_path: Path) -> None:
    async with open_shard(tmp_path / "state", ram(mib=8)) as shard:
        await fill(shard)
        [tier] = shard.tiers
        assert tier.ram is not None
        handle = next(iter(tier.segments))
        # Somewhere in the first page.
        tier.ram.view(int(shard.handles.rows["block"][handle]))[100] ^= 1
        seen = await shard.scrub(0, Scrubbed())
        assert (seen.damaged_pages, seen.lost_pages) == (1, 0)
        space = shard.spaces.get("s")
        with pytest.raises(PageCorrupt):
            await shard.pager.load(space, slots(0))
        rest = slots(*range(1, N))
        assert np.array_equal(await shard.pager.load(space, rest), pages(rest, 1))
        assert (await shard.scrub(0, Scrubbed())).damaged_pages == 0, "told once"


async def test_damaged_and_missing_objects_are_found(tmp_path: Path) -> None:
    async with open_shard(tmp_path / "state", objects(tmp_path / "objects")) as shard:
        space = shard.spaces.create("s")
        for first in (0, N):
            where = slots(*range(first, first + N))
            await shard.pager.store(space, where, pages(where, 1))
        [tier] = shard.tiers
        gone, damaged = (
            next((tmp_path / "objects").rglob(tier.segment_name(handle).key.rpartition("/")[2]))
            for handle in tier.segments
        )
        gone.unlink()
        data = bytearray(damaged.read_bytes())
        data[100] ^= 1
        damaged.write_bytes(data)
        seen = await shard.scrub(0, Scrubbed())
        assert (seen.damaged_pages, seen.lost_pages) == (1, N)
        # Counted and named at once, without a listing or a search by anybody.
        [usage] = shard.usage()
        assert usage.lost_pages == N
        [lost] = seen.lost
        assert (lost.space, lost.slots) == ("s", list(range(N)))
        with pytest.raises(PageLost):
            await shard.pager.load(space, slots(0))


@pytest.mark.parametrize("redundancy", ["mirror:2", "rs:2+1"])
async def test_bad_parts_of_redundant_segments_are_found_and_repaired(
    tmp_path: Path, redundancy: str
) -> None:
    roots = [tmp_path / str(i) for i in range(2 if redundancy == "mirror:2" else 3)]
    urls = tuple(f"file://{root}" for root in roots)
    spec = TierSpec(name="t", urls=urls, redundancy=redundancy, capacity_bytes=256 * MIB)
    async with open_shard(tmp_path / "state", spec) as shard:
        space = shard.spaces.create("s")
        for first in (0, N):
            where = slots(*range(first, first + N))
            await shard.pager.store(space, where, pages(where, 1))
        [tier] = shard.tiers
        first, second = tier.segments
        # Of one segment a server has lost its part, of the other one it has a damaged part.
        keys = [tier.segment_name(h).key.rpartition("/")[2] for h in (first, second)]
        next(roots[0].rglob(keys[0])).unlink()
        damaged = next(roots[1].rglob(keys[1]))
        data = bytearray(damaged.read_bytes())
        data[100] ^= 1
        damaged.write_bytes(data)
        seen = await shard.scrub(0, Scrubbed())
        assert (seen.bad_parts, seen.damaged_pages, seen.lost_pages, seen.lost) == (2, 0, 0, [])
        async with asyncio.timeout(60):
            while {first, second} & tier.segments.keys():
                await asyncio.sleep(0.02)
        seen = await shard.scrub(0, Scrubbed())
        assert (seen.bad_parts, seen.damaged_pages, seen.lost_pages) == (0, 0, 0)
        where = slots(*range(2 * N))
        assert np.array_equal(await shard.pager.load(space, where), pages(where, 1))


async def test_passes_follow_each_other_and_tell_how_far_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scrub, "_PAUSE_S", 0.01)
    async with open_shard(tmp_path / "state", ram(mib=8)) as shard:
        await fill(shard)
        shard.start_scrub(0, 0.01)
        async with asyncio.timeout(20):
            while shard.counters().get("scrub_passes", 0) < 2:
                await asyncio.sleep(0.01)
        counters = shard.counters()
        assert counters["scrubbed_bytes"] > N * 1000
        assert counters["scrub_lost_pages"] == 0
        assert "scrub_segments_left" in counters
