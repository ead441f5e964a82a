"""Mirrors and codes: the loss of any servers they promise to survive, flips, and what they tell."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import combinations
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import Server

from vswap.tiers.backend import Backend, Read, SegmentName, prefix
from vswap.tiers.factory import make_redundant, make_single
from vswap.tiers.redundancy.base import Redundant
from vswap.tiers.redundancy.fragment import HEADER_BYTES, Shape, pack, read_header, stripe_of
from vswap.tiers.spec import TierSpec
from vswap.wire.errors import (
    OutcomeUnknown,
    PageLost,
    SegmentExists,
    TierUnavailable,
    VswapError,
)

KINDS = {"mirror:2": 2, "mirror:3": 3, "rs:2+1": 3, "rs:4+2": 6}


class Tier:
    """A redundant backend over directories, the servers behind it, and what it tells."""

    def __init__(self, kind: str, path: Path) -> None:
        count = sum(TierSpec.model_construct(redundancy=kind).shape)
        urls = tuple(f"file://{path}/{i}" for i in range(count))
        spec = TierSpec(name="t", urls=urls, redundancy=kind, capacity_bytes=1 << 30)
        self.servers: list[Server] = []
        self.backend: Redundant = make_redundant(spec, self._make)
        self.spare = sum(spec.shape) - spec.shape[0]
        self.told: dict[int, int] = {}
        self.backend.on_damage = self._note

    def _make(self, spec: TierSpec) -> Backend:
        self.servers.append(Server(make_single(spec)))
        return self.servers[-1]

    def _note(self, name: SegmentName, places: int) -> None:
        self.told[name.serial] = self.told.get(name.serial, 0) | places

    def losses(self) -> list[tuple[int, ...]]:
        """Every set of servers whose loss is to be survived."""
        every = range(len(self.servers))
        return [lost for count in range(self.spare + 1) for lost in combinations(every, count)]

    def kill(self, *places: int) -> None:
        for place in places:
            self.servers[place].dead = True

    def heal(self) -> None:
        for place, server in enumerate(self.servers):
            server.dead = server.refuses = server.flips = False
            self.backend.restore(place)


@asynccontextmanager
async def open_tier(kind: str, path: Path) -> AsyncIterator[Tier]:
    tier = Tier(kind, path)
    await tier.backend.open()
    try:
        yield tier
    finally:
        await tier.backend.close()


def segments(count: int, length: int) -> dict[SegmentName, bytes]:
    cluster, shard = uuid4(), uuid4()
    names = [SegmentName(cluster, shard, serial) for serial in range(1, count + 1)]
    return {name: bytes((i * 7 + name.serial) % 251 for i in range(length)) for name in names}


async def check(backend: Backend, stored: dict[SegmentName, bytes], *, known: bool = True) -> None:
    """Every segment whole, and in ranges that lie within and across stripes."""
    reads, wanted = [], []
    for name, data in stored.items():
        n = len(data)
        for start, length in ((0, n), (0, 1), (n - 1, 1), (n // 3, n // 5), (n // 2, n // 2)):
            reads.append(Read(name, start, length, n if known else 0))
            wanted.append(data[start : start + length])
    answers = await backend.get(reads)
    for read, answer, data in zip(reads, answers, wanted, strict=True):
        assert not isinstance(answer, VswapError), (read, answer)
        assert bytes(answer) == data, read


@pytest.mark.parametrize("kind", KINDS)
async def test_the_loss_of_any_servers_that_are_to_spare_fails_nothing(
    kind: str, tmp_path: Path
) -> None:
    async with open_tier(kind, tmp_path) as tier:
        before = segments(7, 5000)
        for name, data in before.items():
            await tier.backend.put(name, data)
        assert not tier.told
        for lost in tier.losses():
            tier.heal()
            tier.kill(*lost)
            await check(tier.backend, before)
            # Writes go on, and who lacks them is told before they are acknowledged.
            during = segments(3, 4096)
            for name, data in during.items():
                tier.told.clear()
                await tier.backend.put(name, data)
                assert tier.told.get(name.serial, 0) == sum(1 << place for place in lost)
            await check(tier.backend, {**before, **during}, known=len(lost) != 1)


@pytest.mark.parametrize("kind", KINDS)
async def test_more_losses_than_that_are_an_error_and_no_answer(kind: str, tmp_path: Path) -> None:
    async with open_tier(kind, tmp_path) as tier:
        stored = segments(4, 5000)
        for name, data in stored.items():
            await tier.backend.put(name, data)
        tier.kill(*range(tier.spare + 1))
        read = [Read(name, 0, 5000, 5000) for name in stored]
        for answer in await tier.backend.get(read):
            assert isinstance(answer, TierUnavailable)
        with pytest.raises((TierUnavailable, OutcomeUnknown)):
            await tier.backend.put(*next(iter(segments(1, 100).items())))
        # They came back empty: now it is certain.
        tier.heal()
        for server in tier.servers[: tier.spare + 1]:
            await server.wipe()
        for answer in await tier.backend.get(read):
            assert isinstance(answer, PageLost)


@pytest.mark.parametrize("kind", KINDS)
async def test_servers_that_only_seemed_to_be_gone_are_asked_in_need(
    kind: str, tmp_path: Path
) -> None:
    async with open_tier(kind, tmp_path) as tier:
        stored = segments(4, 5000)
        for name, data in stored.items():
            await tier.backend.put(name, data)
        late = TierUnavailable("no answer in time")
        for place in range(len(tier.servers)):
            tier.backend.failed(place, late)
        more = segments(2, 5000)
        for name, data in more.items():
            await tier.backend.put(name, data)
        await check(tier.backend, {**stored, **more})
        # Somebody tried: from here on nobody waits for them.
        for place in range(len(tier.servers)):
            tier.backend.given_up(place, late)
        [answer] = await tier.backend.get([Read(next(iter(stored)), 0, 10, 5000)])
        assert isinstance(answer, TierUnavailable)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_server_that_lost_its_memory_is_noticed_by_the_reader(
    kind: str, tmp_path: Path
) -> None:
    async with open_tier(kind, tmp_path) as tier:
        stored = segments(9, 5000)
        for name, data in stored.items():
            await tier.backend.put(name, data)
        await tier.servers[1].wipe()
        await check(tier.backend, stored)
        assert set(tier.told.values()) == {0b10}
        assert tier.backend.down == 0


@pytest.mark.parametrize("kind", KINDS)
async def test_what_a_server_missed_is_no_answer_when_it_is_back(kind: str, tmp_path: Path) -> None:
    async with open_tier(kind, tmp_path) as tier:
        tier.kill(0)
        stored = segments(6, 3000)
        for name, data in stored.items():
            await tier.backend.put(name, data)
        assert tier.told == {name.serial: 1 for name in stored}
        tier.heal()
        await check(tier.backend, stored)
        listed = {item.key: item.bytes async for item in tier.backend.list(prefix())}
        assert set(listed) == {name.key for name in stored}
        assert all(3000 <= size < 3000 + 16 * 6 for size in listed.values())


@pytest.mark.parametrize("kind", KINDS)
async def test_another_answer_is_found_where_servers_lie(kind: str, tmp_path: Path) -> None:
    async with open_tier(kind, tmp_path) as tier:
        stored = segments(3, 5000)
        for name, data in stored.items():
            await tier.backend.put(name, data)
        for liars in tier.losses():
            tier.heal()
            for place in liars:
                tier.servers[place].flips = True
            for name, data in stored.items():
                for start, length in ((0, 5000), (100, 700), (4000, 900)):
                    read = Read(name, start, length, 5000)
                    found = [bytes(other) async for other in tier.backend.alternatives(read)]
                    assert data[start : start + length] in found, (liars, start)


async def test_a_range_is_found_where_no_fragment_is_whole(tmp_path: Path) -> None:
    """Three fragments of 4+2 are damaged, but not all in the same range."""
    async with open_tier("rs:4+2", tmp_path) as tier:
        [(name, data)] = segments(1, 4000).items()
        await tier.backend.put(name, data)
        for index, offset in enumerate((10, 500, 900)):
            damage(tmp_path / str((index + name.serial) % 6) / name.key, offset)
        stripe = Shape(4000, 4).stripe
        for start in (0, stripe + 490, 2 * stripe + 880):
            read = Read(name, start, 50, 4000)
            found = [bytes(other) async for other in tier.backend.alternatives(read)]
            assert data[start : start + 50] in found


async def test_the_right_fragments_are_found_among_many(tmp_path: Path) -> None:
    """All of 10+5 are damaged, the first three of them in the range that is wanted."""
    async with open_tier("rs:10+5", tmp_path) as tier:
        [(name, data)] = segments(1, 4000).items()
        await tier.backend.put(name, data)
        for index in range(15):
            # Not in the same place: the errors of two could cancel each other out.
            offset = 110 + 10 * index if index < 3 else 300
            damage(tmp_path / str((index + name.serial) % 15) / name.key, offset)
        read = Read(name, 100, 50, 4000)
        found = [bytes(other) async for other in tier.backend.alternatives(read)]
        assert data[100:150] in found
        assert len(found) < 300


async def test_of_a_short_segment_the_zeros_behind_its_end_are_known(tmp_path: Path) -> None:
    """They need no server: here two are away, and the one stripe that is not empty is damaged."""
    async with open_tier("rs:4+2", tmp_path) as tier:
        [(name, data)] = segments(1, 16).items()
        await tier.backend.put(name, data)
        damage(tmp_path / str(name.serial % 6) / name.key, 3)
        tier.kill(*((index + name.serial) % 6 for index in (1, 2)))
        found = [bytes(o) async for o in tier.backend.alternatives(Read(name, 0, 16, 16))]
        assert data in found


def damage(path: Path, offset: int) -> None:
    """One bit of a fragment's stripe."""
    data = bytearray(path.read_bytes())
    data[HEADER_BYTES + offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_write_that_too_few_have_is_not_acknowledged(kind: str, tmp_path: Path) -> None:
    async with open_tier(kind, tmp_path) as tier:
        for server in tier.servers[: tier.spare + 1]:
            server.refuses = True
        [(name, data)] = segments(1, 3000).items()
        kind_of_error = TierUnavailable if tier.backend.need == 1 else OutcomeUnknown
        if tier.spare + 1 < len(tier.servers):
            kind_of_error = OutcomeUnknown
        with pytest.raises(kind_of_error):
            await tier.backend.put(name, data)


async def test_a_name_that_one_server_knows_is_stored_on_none(tmp_path: Path) -> None:
    async with open_tier("mirror:3", tmp_path) as tier:
        [(name, data)] = segments(1, 3000).items()
        await tier.servers[1].inner.put(name, b"of an earlier life")
        with pytest.raises(SegmentExists):
            await tier.backend.put(name, data)
        for place in (0, 2):
            [answer] = await tier.servers[place].inner.get([Read(name, 0, 1)])
            assert isinstance(answer, PageLost)


async def test_a_server_that_does_not_keep_what_it_acknowledged(tmp_path: Path) -> None:
    urls = tuple(f"file://{tmp_path}/{i}" for i in range(2))
    spec = TierSpec(
        name="t", urls=urls, redundancy="mirror:2", capacity_bytes=1 << 30, verify_writes=True
    )
    servers: list[Server] = []

    def make(member: TierSpec) -> Backend:
        servers.append(Server(make_single(member)))
        return servers[-1]

    backend = make_redundant(spec, make)
    await backend.open()
    told = []
    backend.on_damage = lambda name, places: told.append(places)
    servers[0].flips = True
    [(name, data)] = segments(1, 3000).items()
    await backend.put(name, data)
    assert told == [1]
    await backend.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", [0, 1])
async def test_a_stray_of_a_few_bytes_has_no_negative_length(
    kind: str, place: int, tmp_path: Path
) -> None:
    async with open_tier(kind, tmp_path) as tier:
        [name] = segments(1, 100)
        for member in tier.backend.members[: place + 1]:
            await member.backend.put(name, b"torn")
        [listed] = [item async for item in tier.backend.list(prefix())]
        assert listed.key == name.key
        assert listed.bytes >= 0


async def test_deletes_wait_for_nobody_who_is_down(tmp_path: Path) -> None:
    async with open_tier("mirror:2", tmp_path) as tier:
        stored = segments(3, 100)
        for name, data in stored.items():
            await tier.backend.put(name, data)
        tier.kill(0)
        await tier.backend.delete(list(stored))
        tier.heal()
        # What is left behind shows in the listing, for whoever sweeps.
        left = [item.key async for item in tier.backend.list(prefix())]
        assert sorted(left) == sorted(name.key for name in stored)
        await tier.backend.delete(list(stored))
        assert [item async for item in tier.backend.list(prefix())] == []


async def test_a_tier_opens_with_as_many_as_it_needs(tmp_path: Path) -> None:
    async with open_tier("rs:4+2", tmp_path) as tier:
        stored = segments(2, 3000)
        for name, data in stored.items():
            await tier.backend.put(name, data)
    again = Tier("rs:4+2", tmp_path)

    async def refuse() -> None:
        raise TierUnavailable("refused")

    for place in (0, 5):
        again.servers[place].open = refuse  # type: ignore[method-assign]
    await again.backend.open()
    assert again.backend.down == 0b100001
    await check(again.backend, stored)
    again.servers[2].open = refuse  # type: ignore[method-assign]
    with pytest.raises(TierUnavailable):
        await again.backend.open()
    await again.backend.close()


async def test_one_read_of_a_healthy_page_asks_one_server(tmp_path: Path) -> None:
    for kind in KINDS:
        async with open_tier(kind, tmp_path / kind.replace(":", "-")) as tier:
            [(name, data)] = segments(1, 64 * 1024).items()
            await tier.backend.put(name, data)
            for place in range(len(tier.servers)):
                before = sum(server.asked for server in tier.servers)
                [answer] = await tier.backend.get([Read(name, 4096, 1024, len(data))])
                assert answer == data[4096:5120]
                asked = sum(server.asked for server in tier.servers) - before
                assert asked in ((1,) if not place else (1, tier.backend.need))
                tier.heal()
                tier.kill(place)


@given(whole=st.integers(1, 5000), k=st.integers(2, 9))
def test_stripes_cover_a_segment(whole: int, k: int) -> None:
    shape = Shape(whole, k)
    assert shape.stripe % 16 == 0
    assert sum(shape.size(index) for index in range(k)) == whole
    assert shape.size(k) == shape.stripe


@given(bit=st.integers(0, (HEADER_BYTES + 100) * 8 - 1))
@settings(max_examples=200)
def test_a_fragment_knows_itself(bit: int) -> None:
    [(name, data)] = segments(1, 400).items()
    shape = Shape(400, 4)
    fragment = pack(name, shape, 2, 1, data[112:212])
    assert read_header(fragment, name) is not None
    shape = Shape(400, 4)
    assert stripe_of(pack(name, shape, 2, 1, data[112:224]), name, shape, 2, 1) == data[112:224]
    assert stripe_of(pack(name, shape, 2, 1, data[112:224]), name, shape, 2, 2) is None
    damaged = bytearray(pack(name, shape, 2, 1, data[112:224]))
    damaged[bit >> 3] ^= 1 << (bit & 7)
    padding = range(88, HEADER_BYTES)
    if bit >> 3 not in padding:
        assert stripe_of(damaged, name, shape, 2, 1) is None


@given(data=st.binary(min_size=1, max_size=3000), lost=st.sets(st.integers(0, 5), max_size=2))
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_bytes_come_back_whatever_two_servers_are_lost(
    data: bytes, lost: set[int], tmp_path: Path
) -> None:
    async def run() -> None:
        async with open_tier("rs:4+2", tmp_path / uuid4().hex) as tier:
            name = SegmentName(uuid4(), uuid4(), len(data))
            await tier.backend.put(name, data)
            tier.kill(*lost)
            await check(tier.backend, {name: data})

    asyncio.run(run())
