"""The NBD server over real sockets: what a disk must do, in whatever tier the pages lie."""

from __future__ import annotations

import asyncio
import errno
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TypeVar

import nbd_client as nbd
import numpy as np
import pytest
from nbd_client import Nbd
from shards import objects, open_shard, pages, ram, slots

from vswap.node.device import Device
from vswap.node.frontends.nbd.server import NbdServer
from vswap.node.readahead import ReadAhead
from vswap.node.shard import Shard
from vswap.node.spaces import Limits, Space
from vswap.tiers.spec import TierSpec
from vswap.wire.errors import BadConfig

T = TypeVar("T")
SLOTS = 4096
SIZE = SLOTS * 4096


@asynccontextmanager
async def serve(tmp_path: Path, *tiers: TierSpec) -> AsyncIterator[tuple[Shard, Space, str]]:
    """A shard with one space, "swap", and the address where it is a block device."""
    async with open_shard(tmp_path / "state", *(tiers or (ram(mib=32),))) as shard:
        space = shard.spaces.create("swap", max_slots=SLOTS)
        server = NbdServer(shard, inflight_bytes=8 << 20)
        [address] = await server.start([f"unix:{tmp_path}/nbd.sock"], insecure=False)
        try:
            yield shard, space, address
        finally:
            await server.stop(5.0)
            assert not shard.handles.pins.any(), "a pin was left behind"


async def client(address: str, work: Callable[[Nbd], T], **how: object) -> T:
    """Runs ``work`` with a connected client, in a thread."""

    def run() -> T:
        with Nbd(address) as connected:
            return work(connected.go("swap", **how))  # type: ignore[arg-type]

    return await asyncio.to_thread(run)


TIERS: dict[str, Callable[[Path], tuple[TierSpec, ...]]] = {
    "raw": lambda path: (ram(mib=32),),
    "zstd": lambda path: (ram(mib=32, codec="zstd:1"),),
    "spilling": lambda path: (ram(mib=1), ram("zram", mib=1, codec="zstd:1", rank=1),
                              objects(path / "objects")),
    "objects": lambda path: (objects(path / "objects"),),
}  # fmt: skip


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
@pytest.mark.parametrize("kind", TIERS)
async def test_a_disk_keeps_what_is_written(kind: str, structured: bool, tmp_path: Path) -> None:
    """Random requests of all sizes, aligned and not, against an array of bytes."""
    rng = random.Random(f"{kind} {structured}")
    model = bytearray(SIZE)

    def content(length: int) -> bytes:
        some = rng.choice([rng.randbytes(64), bytes(64), rng.randbytes(1) * 64])
        return rng.randbytes(length) if rng.random() < 0.4 else (some * (length // 64 + 1))[:length]

    def work(disk: Nbd) -> None:
        for _ in range(400):
            length = rng.choice([1, 100, 512, 4096, 4096, 8192, 65536, rng.randrange(1, 200_000)])
            offset = rng.randrange(SIZE - length)
            if rng.random() < 0.5:
                offset, length = offset & ~4095, max(length & ~4095, 4096)
            command = rng.random()
            if command < 0.45:
                data = content(length)
                disk.write(offset, data, rng.choice([0, nbd.FUA]))
                model[offset : offset + length] = data
            elif command < 0.55:
                flags = rng.choice([0, nbd.NO_HOLE, nbd.FUA])
                disk.do(nbd.WRITE_ZEROES, offset, length, flags)
                model[offset : offset + length] = bytes(length)
            elif command < 0.62:
                # Whole pages read as zeros after it; parts of pages stay as they were.
                disk.do(nbd.TRIM, offset, length)
                first, end = -(-offset // 4096) * 4096, (offset + length) // 4096 * 4096
                model[first:end] = bytes(max(end - first, 0))
            elif command < 0.66:
                disk.do(nbd.CACHE, offset, length)
            elif command < 0.68:
                disk.do(nbd.FLUSH)
            else:
                assert disk.read(offset, length) == model[offset : offset + length]
        for offset in range(0, SIZE, 1 << 20):
            assert disk.read(offset, 1 << 20) == model[offset : offset + (1 << 20)]

    async with serve(tmp_path, *TIERS[kind](tmp_path)) as (shard, _, address):
        await client(address, work, structured=structured)
        if kind == "spilling":
            assert sum(usage.pages > 0 for usage in shard.usage()) == 3


@pytest.mark.parametrize("mib", [32, 3], ids=["roomy", "tight"])
async def test_long_writes_in_a_stream_however_it_is_cut(mib: int, tmp_path: Path) -> None:
    """Long writes that follow each other, with others between, in pieces of any size: they are
    received where they will lie, and what does not fit there finds its way all the same."""
    rng = random.Random(mib)
    model = bytearray(SIZE)
    stream = bytearray()
    reads: dict[int, tuple[int, int]] = {}
    expected: dict[int, bytes] = {}
    length = 0
    for cookie in range(1, 240):
        if rng.random() < 0.5 or not length:
            length = rng.choice([4096, 32768, 131072, 131072, 262144, 5000, 131072 + 512])
        offset = rng.randrange(SIZE - length) & ~(4095 if rng.random() < 0.9 else 511)
        if rng.random() < 0.15:
            stream += struct.pack(">IHHQQI", nbd.REQUEST, 0, nbd.FLUSH, cookie, 0, 0)
            continue
        data = rng.randbytes(length)
        if rng.random() < 0.2:
            # A fill page in the middle is not stored as it is.
            at = rng.randrange(length // 4096) * 4096
            data = data[:at] + b"\5" * 4096 + data[at + 4096 :]
        # Writes under way at once may end in either order where they overlap.
        if any(o < offset + length and offset < o + n for o, n in reads.values()):
            continue
        reads[cookie] = offset, length
        expected[cookie] = data[:length]
        model[offset : offset + length] = data[:length]
        stream += struct.pack(">IHHQQI", nbd.REQUEST, 0, nbd.WRITE, cookie, offset, length)
        stream += data[:length]

    def work(disk: Nbd) -> None:
        answers: dict[int, nbd.Answer] = {}
        count = stream.count(struct.pack(">I", nbd.REQUEST))
        taker = threading.Thread(target=lambda: answers.update(disk.replies(count)))
        taker.start()
        position = 0
        while position < len(stream):
            step = rng.choice([1, 27, 28, 29, 4095, 4124, 65536, 300_000, 300_000])
            disk.sock.sendall(stream[position : position + step])
            position += step
        taker.join(30)
        assert [a.error for a in answers.values()] == [0] * count
        for offset in range(0, SIZE, 1 << 20):
            assert disk.read(offset, 1 << 20) == model[offset : offset + (1 << 20)]

    tiers = (ram(mib=mib), objects(tmp_path / "objects"))
    async with serve(tmp_path, *tiers) as (shard, _, address):
        await client(address, work)
        assert not shard.pager.counters["corrupt_pages"]


async def test_of_two_long_writes_of_a_page_at_once_one_counts(tmp_path: Path) -> None:
    rng = random.Random(8)
    writes = [(at << 12, rng.randbytes(131072)) for at in (0, 32, 16, 16, 0, 64, 40)]

    def work(disk: Nbd) -> None:
        stream = b""
        for cookie, (offset, data) in enumerate(writes):
            stream += struct.pack(">IHHQQI", nbd.REQUEST, 0, nbd.WRITE, cookie, offset, len(data))
            stream += data
        with ThreadPoolExecutor(1) as pool:
            answers = pool.submit(disk.replies, len(writes))
            disk.sock.sendall(stream)
        assert [answer.error for answer in answers.result().values()] == [0] * len(writes)
        found = disk.read(0, 96 << 12)
        for slot in range(96):
            page = found[slot << 12 : (slot + 1) << 12]
            assert page in [
                data[(slot << 12) - offset :][:4096]
                for offset, data in writes if 0 <= (slot << 12) - offset < 131072
            ]  # fmt: skip

    async with serve(tmp_path, ram(mib=32)) as (shard, _, address):
        await client(address, work)
        assert not shard.pager.counters["corrupt_pages"]


async def test_a_client_that_vanishes_in_a_long_write_leaves_what_was_there(
    tmp_path: Path,
) -> None:
    old, new = random.Random(1).randbytes(1 << 20), random.Random(2).randbytes(1 << 20)

    def work(disk: Nbd) -> None:
        disk.write(0, old)
        head = struct.pack(">IHHQQI", nbd.REQUEST, 0, nbd.WRITE, 99, 0, len(new))
        disk.sock.sendall(head + new[: 500_000 + 77])
        disk.sock.shutdown(socket.SHUT_RDWR)

    async with serve(tmp_path) as (_, _, address):
        await client(address, work)
        # Never acknowledged: each page is the old one or the new one, whole.
        found = await client(address, lambda disk: disk.read(0, 1 << 20))
        for at in range(0, 1 << 20, 4096):
            assert found[at : at + 4096] in (old[at : at + 4096], new[at : at + 4096])


async def test_many_requests_in_flight_and_two_connections(tmp_path: Path) -> None:
    def work(disk: Nbd) -> None:
        with Nbd(address) as second:
            second.go("swap")
            wanted = {}
            for slot in range(64):
                data = pages(slots(slot), 1)[0].tobytes()
                wanted[disk.send(nbd.WRITE, slot * 4096, 4096, data)] = (slot, data)
            answers = disk.replies(64)
            assert all(answer.error == 0 for answer in answers.values())
            asked = {second.send(nbd.READ, slot * 4096, 4096): data
                     for slot, data in wanted.values()}  # fmt: skip
            for cookie, answer in second.replies(64).items():
                assert answer.pieces[0][1] == asked[cookie]

    async with serve(tmp_path) as (_, _, address):
        await client(address, work)


async def test_parts_of_one_page_written_at_once_are_all_kept(tmp_path: Path) -> None:
    """Eight connections write 512 bytes each of the same pages, again and again."""

    def work(part: int) -> None:
        with Nbd(address) as disk:
            disk.go("swap")
            for turn in range(1, 31):
                for slot in range(4):
                    offset = slot * 4096 + part * 512
                    disk.send(nbd.WRITE, offset, 512, bytes([part + 1, turn]) * 256)
                assert not any(a.error for a in disk.replies(4).values())

    async with serve(tmp_path, ram(mib=4, codec="zstd:1")) as (_, _, address):
        await asyncio.gather(*(asyncio.to_thread(work, part) for part in range(8)))
        found = await client(address, lambda disk: disk.read(0, 4 * 4096))
    assert found == b"".join(bytes([part + 1, 30]) * 256 for part in range(8)) * 4


async def test_trim_and_zeroes_free_slots(tmp_path: Path) -> None:
    async with serve(tmp_path) as (_, space, address):

        def work(disk: Nbd) -> list[int]:
            disk.write(0, pages(slots(*range(16)), 1).tobytes())
            counts = [space.pages]
            disk.do(nbd.TRIM, 0, 4 * 4096)
            counts.append(space.pages)
            disk.do(nbd.WRITE_ZEROES, 4 * 4096, 4 * 4096)
            counts.append(space.pages)
            disk.do(nbd.WRITE_ZEROES, 8 * 4096, 4 * 4096, nbd.NO_HOLE)
            counts.append(space.pages)
            disk.do(nbd.TRIM, 0, SIZE)
            counts.append(space.pages)
            return counts

        assert await client(address, work) == [16, 12, 8, 8, 0]
        assert space.live_bytes == 0


async def test_fast_zero_is_refused_where_it_is_not_fast(tmp_path: Path) -> None:
    async with serve(tmp_path) as (_, _, address):

        def work(disk: Nbd) -> None:
            disk.do(nbd.WRITE_ZEROES, 0, 8192, nbd.FAST_ZERO)
            answer = disk.ask(nbd.WRITE_ZEROES, 1, 8192, flags=nbd.FAST_ZERO)
            assert answer.error == errno.ENOTSUP

        await client(address, work)


async def test_block_status_tells_holes_and_tiers(tmp_path: Path) -> None:
    tiers = (ram(mib=8), objects(tmp_path / "objects"))
    async with serve(tmp_path, *tiers) as (shard, space, address):
        await shard.pager.store(space, slots(*range(4)), pages(slots(*range(4)), 1))
        await shard.pager.store(space, slots(8, 9), np.zeros((2, 4096), np.uint8))
        shard.spaces.change("swap", Limits(tiers=("objects",)))
        await shard.pager.store(space, slots(4, 5), pages(slots(4, 5), 1))
        tags = {name: tag for tag, name in enumerate(shard.places) if name}

        def work(disk: Nbd) -> None:
            base, tier = disk.contexts["base:allocation"], disk.contexts["vswap:tier"]
            extents = disk.ask(nbd.BLOCK_STATUS, 0, SIZE).extents
            assert extents[base] == [
                (6 * 4096, 0), (2 * 4096, 3), (2 * 4096, 2), (SIZE - 10 * 4096, 3)
            ]  # fmt: skip
            assert extents[tier] == [
                (4 * 4096, tags["ram"]), (2 * 4096, tags["objects"]), (2 * 4096, 0),
                (2 * 4096, 1), (SIZE - 10 * 4096, 0),
            ]  # fmt: skip
            # Unaligned, and only the first.
            some = disk.ask(nbd.BLOCK_STATUS, 100, 5 * 4096)
            assert some.extents[tier] == [
                (4 * 4096 - 100, tags["ram"]), (4096 + 100, tags["objects"])
            ]  # fmt: skip
            one = disk.ask(nbd.BLOCK_STATUS, 4096, SIZE - 4096, flags=nbd.REQ_ONE)
            assert one.extents[tier] == [(3 * 4096, tags["ram"])]
            assert one.extents[base] == [(5 * 4096, 0)]

        await client(address, work, contexts=("base:allocation", "vswap:tier"))
        only = await client(
            address, lambda disk: disk.ask(nbd.BLOCK_STATUS, 0, 4096), contexts=("vswap:tier",)
        )
        assert list(only.extents) == [2]
        without = await client(address, lambda disk: disk.ask(nbd.BLOCK_STATUS, 0, 4096))
        assert without.error == errno.EINVAL


async def test_more_extents_than_one_answer_holds(tmp_path: Path) -> None:
    async with open_shard(tmp_path / "state", ram(mib=32)) as shard:
        space = shard.spaces.create("swap", max_slots=1 << 20)
        every_other = np.arange(0, 40000, 2, dtype=np.uint64)
        await shard.pager.fill(space, every_other)
        server = NbdServer(shard, inflight_bytes=8 << 20)
        [address] = await server.start([f"unix:{tmp_path}/nbd.sock"], insecure=False)

        def work(disk: Nbd) -> int:
            offset, holes = 0, 0
            while offset < disk.size:
                length = min(disk.size - offset, (1 << 32) - 4096)
                [found] = disk.ask(nbd.BLOCK_STATUS, offset, length).extents.values()
                assert 0 < len(found) <= 8192
                holes += sum(state & 1 for _, state in found)
                offset += sum(size for size, _ in found)
            return holes

        assert await client(address, work, contexts=("base:allocation",)) in (20000, 20001)
        await server.stop(5.0)


async def test_a_file_in_the_way_of_the_socket_stays(tmp_path: Path) -> None:
    file = tmp_path / "nbd.sock"
    file.write_text("somebody's")
    with pytest.raises(BadConfig, match="no socket"):
        async with serve(tmp_path):
            pass
    assert file.read_text() == "somebody's"


async def test_the_first_extent_alone_is_as_long_as_it_is(tmp_path: Path) -> None:
    async with open_shard(tmp_path / "state", ram(mib=32)) as shard:
        space = shard.spaces.create("swap", max_slots=1 << 20)
        await shard.pager.fill(space, slots((1 << 19) + 5))
        server = NbdServer(shard, inflight_bytes=8 << 20)
        [address] = await server.start([f"unix:{tmp_path}/nbd.sock"], insecure=False)

        def work(disk: Nbd) -> None:
            for flags in (0, nbd.REQ_ONE):
                asked = disk.ask(nbd.BLOCK_STATUS, 100, (1 << 32) - 4096, flags=flags)
                found = asked.extents[disk.contexts["base:allocation"]]
                assert found[0] == ((((1 << 19) + 5) << 12) - 100, 3)
                assert len(found) == (1 if flags else 3)

        await client(address, work, contexts=("base:allocation",))
        await server.stop(5.0)


async def test_cache_of_pages_out_of_reach_does_nothing(tmp_path: Path) -> None:
    """And the connection lives; nor was anything ever promoted before."""
    tiers = (ram(mib=8), objects(tmp_path / "objects"))
    async with serve(tmp_path, *tiers) as (shard, space, address):
        shard.spaces.change("swap", Limits(tiers=("objects",)))
        await shard.pager.store(space, slots(*range(16)), pages(slots(*range(16)), 1))
        shard.spaces.change("swap", Limits())
        (tmp_path / "objects").rename(tmp_path / "away")

        def work(disk: Nbd) -> None:
            disk.do(nbd.CACHE, 0, 16 * 4096)
            assert disk.ask(nbd.READ, 0, 4096).error == errno.EIO
            disk.do(nbd.FLUSH)

        await client(address, work)
        (tmp_path / "away").rename(tmp_path / "objects")


@pytest.mark.parametrize("kind", ["empty", "fill", "ram"])
async def test_cache_of_a_long_range_leaves_others_their_turns(kind: str, tmp_path: Path) -> None:
    async with open_shard(tmp_path / "state", ram(mib=32)) as shard:
        space = shard.spaces.create("swap", max_slots=1 << 20)
        if kind == "fill":
            await shard.pager.fill(space, np.arange(65536, dtype=np.uint64))
        elif kind == "ram":
            where = np.arange(4096, dtype=np.uint64)
            noise = np.random.default_rng(1).integers(0, 256, (4096, 4096), np.uint8)
            await shard.pager.store(space, where, noise)
        ahead = ReadAhead(shard.pager, shard.handles, shard.tiers, space, Counter())
        device = Device(shard.pager, shard.promoter, ahead, space)
        caching = asyncio.create_task(device.cache(100, (1 << 32) - 4096))
        turns = 0
        while not caching.done():
            await asyncio.sleep(0)
            turns += 1
        await caching
        assert turns > 100


async def test_cache_brings_pages_into_ram(tmp_path: Path) -> None:
    tiers = (ram(mib=8), objects(tmp_path / "objects"))
    async with serve(tmp_path, *tiers) as (shard, space, address):
        shard.spaces.change("swap", Limits(tiers=("objects",)))
        await shard.pager.store(space, slots(*range(600)), pages(slots(*range(600)), 1))
        shard.spaces.change("swap", Limits())
        await client(address, lambda disk: disk.do(nbd.CACHE, 100, 599 * 4096))
        assert int(space.pages_by_tag[shard.tiers.get("ram").tag]) == 600
        data = await client(address, lambda disk: disk.read(0, 600 * 4096))
        assert data == pages(slots(*range(600)), 1).tobytes()


async def test_a_full_backing_is_enospc_and_nothing_is_lost(tmp_path: Path) -> None:
    async with serve(tmp_path, ram(mib=2)) as (_, _, address):
        data = random.Random(3).randbytes(4096 * 64)

        def work(disk: Nbd) -> None:
            stored = 0
            while True:
                answer = disk.ask(nbd.WRITE, stored * len(data), len(data), data)
                if answer.error:
                    break
                stored += 1
            assert answer.error == errno.ENOSPC
            assert "room" in answer.message
            assert stored
            for part in range(stored):
                assert disk.read(part * len(data), len(data)) == data
            # The connection lives, and what is freed can be used again.
            disk.do(nbd.TRIM, 0, len(data))
            disk.write(len(data) * stored, data[:4096])

        await client(address, work)


async def test_one_of_many_writes_that_fails_fails_alone(tmp_path: Path) -> None:
    async with serve(tmp_path, ram(mib=16)) as (shard, _, address):
        shard.spaces.change("swap", Limits(quota_bytes=10 * 4200))

        def work(disk: Nbd) -> list[int]:
            rng = random.Random(5)
            stream = b""
            for n in range(20):
                data = rng.randbytes(4096)
                stream += (
                    struct.pack(">IHHQQI", nbd.REQUEST, 0, nbd.WRITE, 1000 + n, n * 4096, 4096)
                    + data
                )
            disk.sock.sendall(stream)
            return [answer.error for _, answer in sorted(disk.replies(20).items())]

        errors = await client(address, work)
        assert errors.count(0) == 10
        assert errors.count(errno.ENOSPC) == 10


async def test_exports_follow_the_spaces(tmp_path: Path) -> None:
    async with serve(tmp_path) as (shard, _, address):

        def names() -> list[bytes]:
            with Nbd(address) as disk:
                disk.hello()
                return [data[4:] for _, data in disk.option(nbd.LIST)[:-1]]

        def size(name: str) -> int:
            with Nbd(address) as disk:
                return disk.go(name).size

        assert await asyncio.to_thread(names) == [b"swap"]
        assert await asyncio.to_thread(size, "") == SIZE
        shard.spaces.create("big", 65536, 1 << 32)
        assert await asyncio.to_thread(names) == [b"big", b"swap"]
        assert await asyncio.to_thread(size, "big") == 1 << 48
        with pytest.raises(AssertionError, match="no such export"):
            await asyncio.to_thread(size, "")
        shard.spaces.change("swap", Limits(), SLOTS * 2)
        assert await asyncio.to_thread(size, "swap") == SIZE * 2

        disk = await asyncio.to_thread(Nbd, address)
        await asyncio.to_thread(disk.go, "swap")
        await shard.delete_space("swap")
        answer = await asyncio.to_thread(disk.ask, nbd.READ, 0, 4096)
        assert answer.error == errno.ESHUTDOWN
        answer = await asyncio.to_thread(disk.ask, nbd.WRITE, 0, 4096, bytes(4096))
        assert answer.error == errno.ESHUTDOWN
        for command, length in (
            (nbd.READ, 1 << 20), (nbd.READ, 100), (nbd.TRIM, 8192), (nbd.CACHE, 8192),
            (nbd.WRITE_ZEROES, 8192), (nbd.FLUSH, 0), (nbd.READ, 0),
        ):  # fmt: skip
            answer = await asyncio.to_thread(disk.ask, command, 0, length)
            assert answer.error == errno.ESHUTDOWN, command
        disk.sock.close()


async def test_large_pages(tmp_path: Path) -> None:
    async with open_shard(tmp_path / "state", ram(mib=32)) as shard:
        shard.spaces.create("swap", 65536, 64)
        server = NbdServer(shard, inflight_bytes=8 << 20)
        [address] = await server.start(["127.0.0.1:0"], insecure=False)
        rng = random.Random(9)

        def work(disk: Nbd) -> None:
            data = rng.randbytes(300_000)
            disk.write(1000, data)
            assert disk.read(0, 301_000) == bytes(1000) + data
            disk.write(65536 - 10, b"x" * 20)
            assert disk.read(65526, 20) == b"x" * 20

        await client(address, work)
        await server.stop(5.0)


async def test_who_vanishes_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    async with serve(tmp_path, ram(mib=1), objects(tmp_path / "objects")) as (shard, _, address):

        def vanish(seed: int) -> None:
            rng = random.Random(seed)
            with Nbd(address) as disk:
                disk.go("swap", structured=bool(seed % 2))
                # It takes no replies, so the server may stop taking its requests.
                disk.sock.settimeout(0.3)
                for _ in range(rng.randrange(20)):
                    disk.send(nbd.READ, rng.randrange(SLOTS - 64) * 4096, rng.randrange(1, 262144))
                head = struct.pack(">IHHQQI", nbd.REQUEST, 0, nbd.WRITE, 1, 0, 65536)
                with suppress(TimeoutError):
                    disk.sock.sendall((2 * (head + rng.randbytes(65536)))[: rng.randrange(130000)])

        await client(address, lambda d: d.write(0, random.Random(1).randbytes(4 << 20)))
        await asyncio.gather(*(asyncio.to_thread(vanish, seed) for seed in range(24)))
        assert len(await client(address, lambda disk: disk.read(0, 4096))) == 4096
        assert shard.pager.counters["corrupt_pages"] == 0


@pytest.mark.parametrize(
    "noise",
    [b"", b"GET / HTTP/1.1\r\n\r\n", bytes(1000), random.Random(2).randbytes(70000)],
    ids=["silence", "http", "zeros", "random"],
)
async def test_garbage_hangs_up_and_nothing_else(noise: bytes, tmp_path: Path) -> None:
    async with serve(tmp_path) as (_, _, address):

        def early() -> None:
            with Nbd(address) as disk:
                disk.sock.sendall(noise)
                if noise:
                    assert disk.closed()

        def late(disk: Nbd) -> None:
            disk.sock.sendall(noise)
            if noise:
                assert disk.closed()

        await asyncio.to_thread(early)
        await client(address, late)
        assert await client(address, lambda disk: disk.read(0, 100)) == bytes(100)


async def test_a_client_that_takes_no_replies_is_not_read_from(tmp_path: Path) -> None:
    """It asks for far more than any buffer holds; others are served, memory stays bounded."""
    async with serve(tmp_path) as (_, _, address):

        def greedy(disk: Nbd) -> None:
            disk.write(0, random.Random(1).randbytes(4 << 20))
            disk.sock.settimeout(2.0)
            with pytest.raises(TimeoutError):
                for _ in range(100_000):
                    disk.send(nbd.READ, 0, 4 << 20)
            assert _resident_mib() - before < 64
            with Nbd(address) as other:
                other.go("swap")
                assert len(other.read(0, 65536)) == 65536

        before = _resident_mib()
        await client(address, greedy)


def _resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20


async def test_sequential_reads_of_slow_pages_are_read_ahead(tmp_path: Path) -> None:
    tiers = (ram(mib=4), objects(tmp_path / "objects"))
    async with serve(tmp_path, *tiers) as (shard, _, address):
        shard.spaces.change("swap", Limits(tiers=("objects",)))
        model = bytearray(random.Random(1).randbytes(SIZE // 4))
        await client(address, lambda disk: disk.write(0, bytes(model)))

        def sequential(disk: Nbd) -> None:
            for offset in range(0, len(model), 8192):
                if offset % 65536 == 0 and offset:
                    # Overwritten just before it is read: what was read ahead must not be used.
                    where = offset + 16384
                    model[where : where + 4096] = random.Random(offset).randbytes(4096)
                    disk.write(where, bytes(model[where : where + 4096]))
                assert disk.read(offset, 8192) == model[offset : offset + 8192], offset

        await client(address, sequential)
        counters = shard.counters()
        assert counters["readahead_used"] > 500, counters
        assert 0 < counters["readahead_wasted"] <= counters["readahead_pages"]
        before = counters["readahead_pages"]

        def scattered(disk: Nbd) -> None:
            rng = random.Random(2)
            for _ in range(100):
                offset = rng.randrange(0, len(model) // 8192) * 8192
                if rng.random() < 0.02:
                    offset = 0
                assert disk.read(offset, 4096) == model[offset : offset + 4096]

        await client(address, scattered)
        read = shard.counters()["readahead_pages"] - before
        assert read < 600, "random reads are no stream"


@pytest.mark.parametrize(
    ("kib", "skew", "structured"),
    [
        (64, 0, True), (256, 0, True), (512, 0, True), (516, 0, True), (1024, 0, True),
        (1024, 0, False), (64, 512, True),
    ],
)  # fmt: skip
async def test_a_sequential_reader_of_any_size_reads_pages_once(
    kib: int, skew: int, structured: bool, tmp_path: Path
) -> None:
    tiers = (ram(mib=4), objects(tmp_path / "objects"))
    async with serve(tmp_path, *tiers) as (shard, _, address):
        shard.spaces.change("swap", Limits(tiers=("objects",)))
        data = random.Random(1).randbytes(SIZE)
        await client(address, lambda disk: disk.write(0, data))

        def sequential(disk: Nbd) -> None:
            for offset in range(skew, SIZE, kib << 10):
                length = min(kib << 10, SIZE - offset)
                assert disk.read(offset, length) == data[offset : offset + length]

        before = shard.counters()
        await client(address, sequential, structured=structured)
        found = Counter({name: n - before.get(name, 0) for name, n in shard.counters().items()})
        assert found["readahead_used"] > 0.8 * SLOTS, found
        assert found["readahead_wasted"] < 0.05 * SLOTS, found
        assert found["remote_pages_loaded"] < 1.05 * SLOTS, found


async def test_thousands_of_small_requests_in_one_go(tmp_path: Path) -> None:
    """All kinds, as fast as the socket takes them: each is answered, once."""
    async with serve(tmp_path, ram(mib=8, codec="zstd:1")) as (_, _, address):
        rng = random.Random(11)
        model = bytearray(SIZE)
        stream, count = b"", 0
        for slot in rng.sample(range(SLOTS), 3000):
            offset = slot * 4096 + rng.randrange(4000)
            data = rng.randbytes(rng.randrange(1, 90))
            model[offset : offset + len(data)] = data
            stream += struct.pack(
                ">IHHQQI", nbd.REQUEST, 0, nbd.WRITE, count, offset, len(data)
            ) + data  # fmt: skip
            count += 1
        for command in (nbd.FLUSH, nbd.BLOCK_STATUS, nbd.CACHE):
            length = 0 if command == nbd.FLUSH else SIZE
            for _ in range(1000):
                stream += struct.pack(">IHHQQI", nbd.REQUEST, 0, command, count, 0, length)
                count += 1

        def work(disk: Nbd) -> None:
            sender = threading.Thread(target=disk.sock.sendall, args=(stream,))
            sender.start()
            answers = disk.replies(count)
            sender.join()
            assert sorted(answers) == list(range(count))
            assert not any(answer.error for answer in answers.values())
            assert disk.read(0, SIZE) == model

        await client(address, work, contexts=("base:allocation", "vswap:tier"))
