"""One suite over every backend and every wrapper."""

from __future__ import annotations

import asyncio
from uuid import UUID, uuid4

import pytest

from vswap.tiers.backend import Backend, Read, SegmentName, prefix
from vswap.wire.errors import PageLost, SegmentExists


def names(count: int, cluster: UUID | None = None, shard: UUID | None = None) -> list[SegmentName]:
    cluster, shard = cluster or uuid4(), shard or uuid4()
    return [SegmentName(cluster, shard, serial) for serial in range(1, count + 1)]


def content(name: SegmentName, length: int = 10_000) -> bytes:
    unit = f"{name.shard}{name.serial:08}".encode()
    return (unit * (length // len(unit) + 1))[:length]


async def test_reads_back_whole_and_in_ranges(backend: Backend) -> None:
    [name] = names(1)
    data = content(name)
    await backend.put(name, memoryview(data))
    ranges = [(0, len(data)), (0, 1), (len(data) - 1, 1), (16, 4096), (1, 2)]
    got = await backend.get([Read(name, offset, length) for offset, length in ranges])
    for (offset, length), result in zip(ranges, got, strict=True):
        assert not isinstance(result, Exception)
        assert bytes(result) == data[offset : offset + length]


async def test_ranges_of_many_segments_come_in_order_and_misses_stay_alone(
    backend: Backend,
) -> None:
    some = names(30)
    for name in some[:20]:
        await backend.put(name, content(name, 500 + name.serial))
    reads = [Read(name, name.serial, 100) for name in reversed(some)] * 3
    reads.append(Read(some[0], 450, 5000))
    results = await backend.get(reads)
    for read, result in zip(reads, results, strict=True):
        if read.name in some[:20] and read.length == 100:
            assert not isinstance(result, Exception)
            whole = content(read.name, 500 + read.name.serial)
            assert bytes(result) == whole[read.offset : read.offset + 100]
        else:
            assert isinstance(result, PageLost)


async def test_a_segment_is_written_once(backend: Backend) -> None:
    [name] = names(1)
    await backend.put(name, b"first")
    with pytest.raises(SegmentExists):
        await backend.put(name, b"other")
    [kept] = await backend.get([Read(name, 0, 5)])
    assert not isinstance(kept, Exception)
    assert bytes(kept) == b"first"


async def test_delete_is_idempotent_and_final(backend: Backend) -> None:
    some = names(5)
    for name in some[:4]:
        await backend.put(name, content(name))
    await backend.delete(some)
    await backend.delete(some)
    await backend.delete([])
    assert all(isinstance(r, PageLost) for r in await backend.get([Read(n, 0, 1) for n in some]))
    assert [item async for item in backend.list(prefix(some[0].cluster))] == []


async def test_lists_by_prefix_with_lengths(backend: Backend) -> None:
    cluster, other = uuid4(), uuid4()
    mine, theirs = names(3, cluster), names(2, cluster)
    strangers = names(2, other)
    for i, name in enumerate([*mine, *theirs, *strangers]):
        await backend.put(name, bytes(100 + i))
    lengths = {item.key: item.bytes async for item in backend.list(prefix(cluster))}
    assert lengths == {n.key: 100 + i for i, n in enumerate([*mine, *theirs])}
    shard = [item.key async for item in backend.list(prefix(cluster, mine[0].shard))]
    assert sorted(shard) == [name.key for name in mine]
    every = {item.key async for item in backend.list(prefix())}
    assert {name.key for name in [*mine, *theirs, *strangers]} <= every


async def test_calls_on_one_backend_run_side_by_side(backend: Backend) -> None:
    """Puts, reads, listings and deletes of several tasks at once do not see each other's data."""
    cluster = uuid4()

    async def churn(seed: int) -> None:
        some = names(10, cluster)
        for name in some:
            data = content(name, 3000 + seed)
            await backend.put(name, data)
            whole, part = await backend.get([Read(name, 0, len(data)), Read(name, seed, 50)])
            assert not isinstance(whole, Exception)
            assert not isinstance(part, Exception)
            assert bytes(whole) == data
            assert bytes(part) == data[seed : seed + 50]
        keys = [item.key async for item in backend.list(prefix(cluster, some[0].shard))]
        assert sorted(keys) == [name.key for name in some]
        await backend.delete(some[:5])
        keys = [item.key async for item in backend.list(prefix(cluster, some[0].shard))]
        assert sorted(keys) == [name.key for name in some[5:]]

    await asyncio.gather(*map(churn, range(12)))


async def test_of_two_writers_of_one_name_one_wins(backend: Backend) -> None:
    [name] = names(1)
    contents = [bytes([i]) * 5000 for i in range(8)]
    outcomes = await asyncio.gather(
        *(backend.put(name, data) for data in contents), return_exceptions=True
    )
    [winner] = [data for data, error in zip(contents, outcomes, strict=True) if error is None]
    assert sum(isinstance(error, SegmentExists) for error in outcomes) == 7
    [kept] = await backend.get([Read(name, 0, 5000)])
    assert not isinstance(kept, Exception)
    assert bytes(kept) == winner


async def test_a_buffer_may_be_reused_after_a_put(backend: Backend) -> None:
    one, two = names(2)
    buffer = bytearray(content(one, 200_000))
    await backend.put(one, buffer)
    buffer[:] = content(two, 200_000)
    await backend.put(two, buffer)
    buffer[:] = bytes(200_000)
    for name in (one, two):
        [data] = await backend.get([Read(name, 0, 200_000)])
        assert not isinstance(data, Exception)
        assert bytes(data) == content(name, 200_000)


async def test_a_thousand_segments_at_once(backend: Backend) -> None:
    some = names(1000)
    limit = asyncio.Semaphore(50)

    async def put(name: SegmentName) -> None:
        async with limit:
            await backend.put(name, content(name, 200))

    await asyncio.gather(*map(put, some))
    listed = [item.key async for item in backend.list(prefix(some[0].cluster))]
    assert sorted(listed) == [name.key for name in some]
    results = await backend.get([Read(name, 0, 200) for name in some])
    for name, result in zip(some, results, strict=True):
        assert not isinstance(result, Exception)
        assert bytes(result) == content(name, 200)
    await backend.delete(some)
    assert [item async for item in backend.list(prefix(some[0].cluster))] == []


async def test_large_segments_and_the_recommended_size(backend: Backend) -> None:
    largest = backend.segment_bytes if backend.segment_bytes == 2 * 2**20 else 8 * 2**20
    for name, length in zip(names(2), (backend.segment_bytes, largest), strict=True):
        await backend.put(name, content(name, length))
        [middle] = await backend.get([Read(name, length // 2, 4096)])
        assert not isinstance(middle, Exception)
        assert bytes(middle) == content(name, length)[length // 2 : length // 2 + 4096]


async def test_empty_batches(backend: Backend) -> None:
    assert await backend.get([]) == []
    await backend.delete([])


async def test_usage_counts_what_is_stored(backend: Backend) -> None:
    before = (await backend.usage()).used_bytes
    for name in names(4):
        await backend.put(name, bytes(1 << 20))
    after = (await backend.usage()).used_bytes
    assert before is not None
    assert after is not None
    assert after - before >= 4 << 20
    assert after - before < 12 << 20


async def test_close_is_idempotent(backend: Backend) -> None:
    await backend.close()
    await backend.close()
