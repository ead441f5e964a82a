"""Streams of requests, damaged and cut anywhere, at a server: each is answered as the protocol
says, once, and only what was written changes."""

from __future__ import annotations

import asyncio
import errno
import random
import struct
from collections.abc import AsyncIterator, Container
from contextlib import asynccontextmanager
from pathlib import Path

import nbd_client as nbd
import numpy as np
import pytest
from nbd_client import Answer, Nbd
from nbd_stream import HEADER, Told, Understood, pieces, request, understand
from shards import open_shard, ram

from vswap.node.frontends.nbd.server import NbdServer
from vswap.node.pager import Pager
from vswap.node.shard import Shard
from vswap.node.spaces import Space
from vswap.tiers.record import U8, U64

SLOTS = 96
SIZE = SLOTS * 4096
_STREAMS = 400


@asynccontextmanager
async def serve(tmp_path: Path, codec: str) -> AsyncIterator[tuple[Shard, Space, str]]:
    async with open_shard(tmp_path / "state", ram(mib=16, codec=codec)) as shard:
        space = shard.spaces.create("swap", max_slots=SLOTS)
        server = NbdServer(shard, inflight_bytes=8 << 20)
        [address] = await server.start([f"unix:{tmp_path}/nbd.sock"], insecure=False)
        yield shard, space, address
        await server.stop(5.0)
        assert not shard.handles.pins.any(), "a pin was left behind"


def make_stream(rng: random.Random) -> bytes:
    """Some requests, among them long writes in a row; often with a damaged header, or cut off."""
    stream = bytearray()
    headers = []
    cookie = 0
    while cookie < rng.randrange(1, 24):
        command = rng.choice((nbd.READ, nbd.WRITE, nbd.WRITE, *range(8), 99))
        length = rng.choice((0, 1, 512, 4096, 4096, 5000, 8192, 32768, 65536, 131072))
        flags = rng.choice((0, 0, 0, 0, nbd.FUA, nbd.DF, nbd.NO_HOLE, nbd.FAST_ZERO, nbd.REQ_ONE))
        if command == nbd.FLUSH or (command == nbd.DISC and rng.random() < 0.8):
            command, length = nbd.FLUSH, 0
        for _ in range(rng.choice((1, 1, 5))):
            cookie += 1
            offset = rng.randrange(SIZE) if rng.random() < 0.2 else rng.randrange(SLOTS) << 12
            if command == nbd.FLUSH:
                offset = 0
            elif rng.random() < 0.9:
                offset = min(offset, SIZE - length)
            headers.append(len(stream))
            stream += request(command, offset, length, flags=flags, cookie=cookie)
            if command == nbd.WRITE:
                stream += bytes([cookie % 255 + 1]) * length
    damage = rng.random()
    if damage < 0.5:
        # Not the cookie: it tells which request an answer is for.
        at = rng.choice(headers) + rng.choice((*range(8), *range(16, HEADER.size)))
        stream[at] ^= 1 << rng.randrange(8)
    elif damage < 0.6:
        at = rng.randrange(len(stream))
        stream[at:at] = rng.randbytes(rng.randrange(1, 9))
    elif damage < 0.8:
        del stream[rng.randrange(len(stream)) :]
    return bytes(stream)


async def converse(address: str, parts: list[bytes], *, structured: bool) -> bytes:
    """Negotiates and sends the parts; returns all that comes back after the negotiation."""
    reader, writer = await asyncio.open_unix_connection(address.removeprefix("unix:"))
    try:
        options: list[tuple[int, bytes]] = [(nbd.GO, nbd.info_query("swap"))]
        if structured:
            contexts = nbd.meta_query("swap", "base:allocation")
            options[:0] = [(nbd.STRUCTURED_REPLY, b""), (nbd.SET_META, contexts)]
        await reader.readexactly(18)
        writer.write(struct.pack(">I", 3))
        for option, data in options:
            writer.write(struct.pack(">QII", nbd.IHAVEOPT, option, len(data)) + data)
        last = 0
        while last < len(options):
            *_, kind, length = struct.unpack(">QIII", await reader.readexactly(20))
            await reader.readexactly(length)
            last += kind == nbd.ACK

        async def send() -> None:
            try:
                for part in parts:
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(0)
                writer.write_eof()
            except OSError:
                # It hung up on garbage.
                pass

        sending = asyncio.create_task(send())
        said = bytearray()
        try:
            while more := await reader.read(1 << 20):
                said += more
        except ConnectionError:
            pass
        await sending
        return bytes(said)
    finally:
        writer.close()


class _Said:
    """What came from a server, as a socket."""

    def __init__(self, data: bytes) -> None:
        self._data, self.at = data, 0

    def recv(self, most: int) -> bytes:
        part = self._data[self.at : self.at + most]
        self.at += len(part)
        return part

    @property
    def left(self) -> int:
        return len(self._data) - self.at


def answers(said: bytes, expected: Understood, *, structured: bool) -> dict[int, Answer]:
    """By cookie; each at most once. Of what was cut off in the middle nothing."""
    disk = Nbd.__new__(Nbd)
    source = _Said(said)
    disk.sock, disk.structured = source, structured  # type: ignore[assignment]
    disk._lengths = {one.cookie: one.length for one in expected.requests if one.command == nbd.READ}
    found: dict[int, Answer] = {}
    under_way: dict[int, Answer] = {}
    try:
        while source.left:
            cookie, answer, last = disk._reply(under_way)
            assert cookie not in found, "answered twice"
            if last:
                found[cookie] = answer
    except ConnectionError:
        assert expected.garbage, "cut off in the middle of an answer"
    return found


def check(one: Told, answer: Answer) -> None:
    """An answer is the one that the request must have."""
    error = one.error
    if one.command == nbd.WRITE_ZEROES and one.flags & nbd.FAST_ZERO and not error:
        error = errno.ENOTSUP if (one.offset | one.length) & 4095 else 0
    assert answer.error == error, one
    if not error and one.command == nbd.READ:
        assert sum(len(data) for _, data in answer.pieces) == one.length
    if not error and one.command == nbd.BLOCK_STATUS:
        assert list(answer.extents) == [1]


def check_content(content: U8, expected: Understood, answered: Container[int]) -> None:
    """Bytes that one request changed are what it made of them; those that none did are zero."""
    changes = np.zeros(SIZE, np.uint8)
    values = np.zeros(SIZE, np.uint8)
    begun = [expected.begun] if expected.begun else []
    for one in [*expected.requests, *begun]:
        first, end = one.offset, one.offset + one.length
        if one.error or one.command not in (nbd.WRITE, nbd.TRIM, nbd.WRITE_ZEROES):
            continue
        if one.command == nbd.TRIM:
            first, end = -(-first // 4096) * 4096, end // 4096 * 4096
        if end <= first:
            continue
        # Who was not told of success may have changed some of it.
        changes[first:end] += 1 if answered_well(one, answered) else 2
        values[first:end] = 0
        if one.command == nbd.WRITE and one is not expected.begun:
            values[first:end] = np.frombuffer(one.data, np.uint8)
    sure = changes < 2
    assert np.array_equal(content[sure], values[sure])


def answered_well(one: Told, answered: Container[int]) -> bool:
    slow = one.command == nbd.WRITE_ZEROES and one.flags & nbd.FAST_ZERO
    return one.cookie in answered and not slow


@pytest.mark.parametrize("codec", ["none", "zstd:1"])
async def test_damaged_streams(codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(codec)
    received = 0
    store_now = Pager.store_now

    def watched(
        self: Pager, space: Space, slots: U64, pages: U8, hashes: U64 | None = None
    ) -> bool:
        nonlocal received
        received += hashes is not None
        return store_now(self, space, slots, pages, hashes)

    monkeypatch.setattr(Pager, "store_now", watched)
    every = np.arange(SLOTS, dtype=np.uint64)
    garbage = answered = 0
    async with serve(tmp_path, codec) as (shard, space, address):
        tasks = len(asyncio.all_tasks())
        for number in range(_STREAMS):
            structured = number % 2 == 0
            stream = make_stream(rng)
            expected = understand(stream, SIZE, structured=structured)
            said = await converse(address, pieces(rng, stream, 8), structured=structured)
            found = answers(said, expected, structured=structured)
            asked = {one.cookie: one for one in expected.requests}
            if expected.begun and expected.begun.error:
                # It may be refused before all of its data is there.
                asked[expected.begun.cookie] = expected.begun
                found.setdefault(expected.begun.cookie, Answer(expected.begun.error))
            for cookie, answer in found.items():
                check(asked[cookie], answer)
            if expected.garbage:
                garbage += 1
            else:
                assert set(found) == set(asked)
            answered += len(found)
            # What an aborted client asked for may still be under way.
            while len(asyncio.all_tasks()) > tasks:
                await asyncio.sleep(0)
            content = await shard.pager.read(space, every)
            check_content(content.reshape(-1), expected, found)
            await shard.pager.free(space, every)
        assert not shard.pager.counters["corrupt_pages"]
    assert garbage > 20
    assert answered > 5 * _STREAMS
    # Long writes were received where they will lie.
    assert received > _STREAMS // 10 if codec == "none" else not received
