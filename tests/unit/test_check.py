"""The check tells every difference that is planted, and no other, however busy the shard is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest
from shards import MIB, objects, open_shard, pages, ram, slots

from vswap.node import entry
from vswap.node.differences import Checked
from vswap.node.handles import DELETING, WRITING
from vswap.node.shard import Shard
from vswap.tiers.backend import Listed, SegmentName
from vswap.tiers.record import ROW_BYTES
from vswap.tiers.segment import TRAILER_BYTES
from vswap.tiers.spec import TierSpec

N = 1200


class Site:
    """A shard with pages in RAM, in files, and fill pages."""

    def __init__(self, shard: Shard, root: Path) -> None:
        self.shard = shard
        self.root = root
        self.space = shard.spaces.get("s")
        self.ram, self.disk = shard.tiers.get("ram"), shard.tiers.get("disk")

    @property
    def on_disk(self) -> int:
        """A segment with pages in files."""
        return next(iter(self.disk.segments))

    @property
    def in_ram(self) -> int:
        live = self.shard.handles.live_records
        return next(handle for handle in self.ram.segments if live[handle])

    def file(self, handle: int) -> Path:
        return self.root / "disk" / self.disk.segment_name(handle).key

    def slot_in(self, tier_tag: int) -> int:
        used, words = self.space.table.scan(0)
        return int(used[entry.tags(words) == tier_tag][0])

    def set_word(self, slot: int, word: int) -> None:
        self.space.table._words[slot] = word


async def fill(shard: Shard) -> None:
    space = shard.spaces.create("s", max_slots=100_000)
    for start in range(0, N, 100):
        where = slots(*range(start, start + 100))
        await shard.pager.store(space, where, pages(where, 1))
    await shard.pager.store(space, slots(N), np.full((1, 4096), 7, np.uint8))


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    tiers = ram(mib=2), objects(tmp_path / "disk", "disk")
    async with open_shard(tmp_path / "state", *tiers) as shard:
        await fill(shard)
        made = Site(shard, tmp_path)
        async with asyncio.timeout(30):
            while shard.handles.pins.any() or not made.disk.segments:
                await asyncio.sleep(0.02)
        yield made


async def kinds(site: Site, *, deep: bool = False) -> set[str]:
    seen = await site.shard.check(Checked(), deep=deep)
    assert seen.found == len(seen.differences)
    return {difference.kind for difference in seen.differences}


async def test_a_healthy_node_agrees_with_itself(site: Site) -> None:
    seen = await site.shard.check(Checked(), deep=True)
    assert (seen.found, seen.differences, seen.skipped) == (0, [], [])
    assert seen.slots == N + 1
    assert seen.segments == len(site.ram.segments) + len(site.disk.segments)
    assert seen.listed == len(site.disk.segments)
    assert not site.shard.ledger.watchers
    assert not site.shard.handles.pins.any()


# ---------------------------------------------------------------- what is planted


def no_such_segment(site: Site) -> None:
    word = entry.tier_words(site.disk.tag, site.shard.handles.allocated + 5, np.zeros(1, np.uint32))
    site.set_word(site.slot_in(site.disk.tag), int(word[0]))


def unreadable_segment(site: Site) -> None:
    site.shard.handles.set_state(site.on_disk, WRITING)


def beyond_the_records(site: Site) -> None:
    site.shard.handles.rows["payload"][site.in_ram] -= 16


def foreign_tier(site: Site) -> None:
    site.set_word(site.slot_in(site.ram.tag), 13 << 60)


def beyond_the_maximum(site: Site) -> None:
    site.space.max_slots = N - 1


def wrong_live_bytes(site: Site) -> None:
    site.shard.handles.live_bytes[site.on_disk] += 16


def wrong_live_records(site: Site) -> None:
    site.shard.handles.live_records[site.on_disk] += 1


def wrong_pages_of_a_space(site: Site) -> None:
    site.space.pages_by_tag[entry.FILL] += 1


def wrong_bytes_of_the_node(site: Site) -> None:
    site.shard.ledger.bytes_by_tag[site.ram.tag] -= 28


def wrong_lost_pages(site: Site) -> None:
    site.shard.ledger.lost_by_tag[site.disk.tag] += 1


def wrong_chunk_count(site: Site) -> None:
    site.space.table._used[0] += 1


def uncounted_chunk(site: Site) -> None:
    site.space.table._words[5 * 8192] = int(entry.ZERO_WORD)


def segment_without_deleter(site: Site) -> None:
    handle = site.shard.handles.create(site.disk.tag, DELETING, 0.0)
    site.disk.segments[handle] = None


def segment_without_use(site: Site) -> None:
    handle = site.shard.handles.create(site.ram.tag, 1, 0.0)
    site.shard.handles.rows["block"][handle] = site.ram.ram.allocate(  # type: ignore[union-attr]
        site.ram.segment_name(handle)
    )
    site.ram.segments[handle] = None


def serial_used_twice(site: Site) -> None:
    first, second, *_ = site.disk.segments
    site.shard.handles.rows["word"][second] = site.shard.handles.rows["word"][first]


def row_of_no_tier(site: Site) -> None:
    site.shard.handles.create(13, DELETING, 0.0)


def handle_used_and_spare(site: Site) -> None:
    site.shard.handles._free.append(site.on_disk)


def handle_leaked(site: Site) -> None:
    site.shard.handles._free.pop()


def unpinned_twice(site: Site) -> None:
    site.shard.handles.pins[site.on_disk] -= 1


def unknown_to_the_tier(site: Site) -> None:
    del site.disk.segments[site.on_disk]


def wrong_stored_bytes(site: Site) -> None:
    site.disk.stored_bytes += 1


def more_than_granted(site: Site) -> None:
    site.disk.local, site.disk.limit_bytes = False, site.disk.stored_bytes - 1


def block_used_and_free(site: Site) -> None:
    arena = site.ram.ram
    assert arena is not None
    arena._free.append(int(site.shard.handles.rows["block"][site.in_ram]))


def block_leaked(site: Site) -> None:
    arena = site.ram.ram
    assert arena is not None
    (arena._free or arena._warm).pop()


def row_in_another_block(site: Site) -> None:
    site.shard.handles.rows["block"][site.in_ram] += 1


def block_without_row(site: Site) -> None:
    arena = site.ram.ram
    assert arena is not None
    arena.allocate(SegmentName(site.ram.segment_name(0).cluster, site.shard.uuid, 1 << 50))


def not_in_the_directory(site: Site) -> None:
    arena, handle = site.ram.ram, site.in_ram
    assert arena is not None
    block = arena.view(int(site.shard.handles.rows["block"][handle]))
    records = int(site.shard.handles.rows["records"][handle])
    block[len(block) - ROW_BYTES * records + 4] ^= 1


def segment_gone(site: Site) -> None:
    site.file(site.on_disk).unlink()


def segment_cut_short(site: Site) -> None:
    file = site.file(site.on_disk)
    file.write_bytes(file.read_bytes()[:-1])


def stray_segment(site: Site) -> None:
    # A serial that was taken, and is in no row: as a write leaves it that lands too late.
    serial = site.shard.handles.next_serial()
    site.shard.handles._header["next_serial"][0] += 1
    own = site.disk.segment_name(0)
    file = site.root / "disk" / SegmentName(own.cluster, own.shard, serial).key
    file.write_bytes(b"late")


PLANTED: list[tuple[Callable[[Site], None], str]] = [
    (no_such_segment, "entry"),
    (unreadable_segment, "entry"),
    (beyond_the_records, "entry"),
    (foreign_tier, "entry"),
    (beyond_the_maximum, "entry"),
    (wrong_live_bytes, "books"),
    (wrong_live_records, "books"),
    (wrong_pages_of_a_space, "books"),
    (wrong_bytes_of_the_node, "books"),
    (wrong_lost_pages, "books"),
    (wrong_chunk_count, "table"),
    (uncounted_chunk, "table"),
    (segment_without_deleter, "row"),
    (segment_without_use, "row"),
    (serial_used_twice, "row"),
    (row_of_no_tier, "row"),
    (unpinned_twice, "row"),
    (handle_used_and_spare, "handles"),
    (handle_leaked, "handles"),
    (unknown_to_the_tier, "tier"),
    (wrong_stored_bytes, "tier"),
    (more_than_granted, "grant"),
    (block_used_and_free, "block"),
    (block_leaked, "block"),
    (row_in_another_block, "block"),
    (block_without_row, "block"),
    (not_in_the_directory, "directory"),
    (segment_gone, "missing"),
    (segment_cut_short, "length"),
    (stray_segment, "stray"),
]

FOLLOWING: dict[Callable[[Site], None], set[str]] = {
    beyond_the_maximum: {"directory"},
    no_such_segment: {"books"},
    foreign_tier: {"books", "directory"},
    row_in_another_block: {"directory"},
    wrong_live_records: {"directory"},
    serial_used_twice: {"stray", "length"},
    segment_without_use: {"tier"},
}
"""What is wrong with good reason where something else is."""


@pytest.mark.parametrize(("plant", "kind"), PLANTED, ids=lambda what: getattr(what, "__name__", ""))
async def test_what_is_planted_is_found(
    plant: Callable[[Site], None], kind: str, site: Site
) -> None:
    plant(site)
    found = await kinds(site)
    assert kind in found
    assert found <= {kind} | FOLLOWING.get(plant, set())


async def test_deep_reads_the_directories_of_files(site: Site) -> None:
    file = site.file(site.on_disk)
    data = bytearray(file.read_bytes())
    # The slot of the last row of the directory.
    data[-TRAILER_BYTES - ROW_BYTES + 4] ^= 1
    file.write_bytes(data)
    assert await kinds(site) == set()
    assert await kinds(site, deep=True) == {"directory"}
    data[-TRAILER_BYTES] ^= 1
    file.write_bytes(data)
    seen = await site.shard.check(Checked(), deep=True)
    assert "no trailer" in seen.differences[0].detail


async def test_a_tier_that_does_not_answer_is_not_compared(site: Site) -> None:
    site.disk.opened = False
    seen = await site.shard.check(Checked())
    assert seen.found == 0
    assert "disk" in seen.skipped[0]


@pytest.mark.parametrize("when", ["before", "after"])
async def test_segments_that_come_and_go_while_a_backend_lists(
    when: str, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are deleted and written before, or after, the backend looks at what it has."""
    shard, backend = site.shard, site.disk.backend
    look = backend.list

    async def change() -> None:
        before = set(site.disk.segments)
        used, words = site.space.table.scan(0)
        await shard.pager.free(site.space, used[entry.tags(words) == site.disk.tag])
        async with asyncio.timeout(30):
            while shard.reaper.pending:
                await asyncio.sleep(0.01)
        assert not before & site.disk.segments.keys()
        where = slots(*range(N, 2 * N))
        for start in range(0, N, 100):
            part = where[start : start + 100]
            await shard.pager.store(site.space, part, pages(part, 1))
        assert site.disk.segments

    async def changing(prefix: str) -> AsyncIterator[Listed]:
        if when == "before":
            await change()
        found = [item async for item in look(prefix)]
        if when == "after":
            await change()
        for item in found:
            yield item

    monkeypatch.setattr(backend, "list", changing)
    assert (await shard.check(Checked())).differences == []


async def test_nothing_is_found_while_everything_changes(site: Site) -> None:
    """Stores, frees, demotion, compaction of RAM, spaces that come and go, all between turns."""
    shard, stop = site.shard, asyncio.Event()

    async def churn(seed: int) -> None:
        rng, version = np.random.default_rng(seed), 1
        while not stop.is_set():
            version += 1
            where = np.unique(rng.integers(0, 90_000, 60)).astype(np.uint64)
            await shard.pager.store(site.space, where, pages(where, version))
            await shard.pager.free(site.space, where[rng.random(len(where)) < 0.8])

    async def come_and_go() -> None:
        while not stop.is_set():
            space = shard.spaces.create("passing")
            await shard.pager.store(space, slots(*range(20)), pages(slots(*range(20)), 1))
            await asyncio.sleep(0.01)
            await shard.delete_space("passing")

    works = churn(1), churn(2), churn(3), come_and_go()
    tasks = [asyncio.create_task(work) for work in works]
    stored = shard.pager.counters["pages_stored"]
    try:
        for _ in range(12):
            seen = await shard.check(Checked(), deep=True)
            assert seen.differences == []
            assert seen.slots > 0
    finally:
        stop.set()
        await asyncio.gather(*tasks)
    assert shard.pager.counters["pages_stored"] > stored + 1000
    assert not shard.ledger.watchers


@pytest.mark.parametrize("redundancy", ["mirror:2", "rs:2+1"])
async def test_every_server_of_a_redundant_tier_is_compared(
    redundancy: str, tmp_path: Path
) -> None:
    count = 2 if redundancy == "mirror:2" else 3
    urls = tuple(f"file://{tmp_path}/server-{place}" for place in range(count))
    spec = TierSpec(name="red", urls=urls, redundancy=redundancy, capacity_bytes=64 * MIB, rank=10)
    async with open_shard(tmp_path / "state", spec) as shard:
        await fill(shard)
        tier = shard.tiers.get("red")
        seen = await shard.check(Checked(), deep=True)
        assert (seen.found, seen.skipped) == (0, [])
        assert seen.listed == count * len(tier.segments)
        handle = next(iter(tier.segments))
        key = tier.segment_name(handle).key
        (tmp_path / "server-1" / key).unlink()
        [difference] = (await shard.check(Checked())).differences
        assert (difference.kind, difference.where) == ("missing", urls[1])
        # What the node knows that it lacks is no difference: repair is under way.
        shard.handles.rows["lacking"][handle] |= 1 << 1
        assert (await shard.check(Checked())).found == 0
        assert tier.redundant is not None
        tier.redundant.members[0].up = False
        assert urls[0] in (await shard.check(Checked())).skipped[0]
