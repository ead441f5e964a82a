"""Clients that hang up, that take no replies, or that are too many: what becomes of the others."""

from __future__ import annotations

import asyncio
import resource
import struct
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import nbd_client as nbd
import numpy as np
import pytest
from nbd_client import Nbd
from shards import objects, open_shard, pages, ram

from vswap.node.faults import Faults
from vswap.node.frontends.nbd import connection
from vswap.node.frontends.nbd.server import NbdServer
from vswap.node.seams import Seams
from vswap.node.spaces import Limits

SLOTS = 4096
MIB = 2**20


def request(command: int, cookie: int, offset: int, data: bytes | int) -> bytes:
    payload = data if isinstance(data, bytes) else b""
    length = len(payload) or int(data)
    return struct.pack(">IHHQQI", nbd.REQUEST, 0, command, cookie, offset, length) + payload


@pytest.mark.parametrize("command", [nbd.WRITE, nbd.TRIM], ids=["write", "trim"])
async def test_what_a_client_asked_before_it_hung_up_undoes_nothing(
    command: int, tmp_path: Path
) -> None:
    """It hangs up with a request that the node has not read, repeats it over another connection,
    and overwrites the page there: the first one must not be done after that."""
    seams = Seams()
    seams.faults = Faults({})
    tiers = (ram(mib=4), objects(tmp_path / "objects"))
    async with open_shard(tmp_path / "state", *tiers, seams=seams) as shard:
        shard.spaces.create("swap", 4096, SLOTS, Limits(tiers=("objects",)))
        server = NbdServer(shard, inflight_bytes=8 * MIB)
        [address] = await server.start([f"unix:{tmp_path}/nbd.sock"], insecure=False)
        space = shard.spaces.get("swap")
        slots = np.arange(256, dtype=np.uint64)
        await shard.pager.store(space, slots, pages(slots, 1))
        shard.spaces.change("swap", Limits())
        seams.faults.set("objects", "delay=1,delay_ms=1500")
        old, new, where = b"A" * 4096, b"B" * 4096, 1000 * 4096
        asked = request(command, 1, where, old if command == nbd.WRITE else 4096)

        def work() -> bytes:
            first = Nbd(address).go("swap")
            # Parts of pages of a slow tier, a task each: it is not read from while they go on.
            first.sock.sendall(
                b"".join(request(nbd.READ, 100 + n, n * 4096 + 512, 512) for n in range(256))
            )
            time.sleep(0.3)
            first.sock.sendall(asked)
            time.sleep(0.1)
            first.sock.close()
            with Nbd(address) as second:
                second.go("swap")
                second.sock.sendall(asked)
                assert not second.replies(1)[1].error
                second.write(where, new)
                time.sleep(2.5)
                return second.read(where, 4096)

        try:
            assert await asyncio.to_thread(work) == new
        finally:
            await server.stop(5.0)
        assert not shard.handles.pins.any()


@contextmanager
def stuck(address: str, count: int, send: bytes) -> Iterator[None]:
    """Clients that ask and take no replies."""
    with ExitStack() as stack:
        for _ in range(count):
            client = stack.enter_context(Nbd(address, timeout_s=1.0))
            client.go("swap", contexts=("base:allocation", "vswap:tier"))
            with pytest.raises((TimeoutError, ConnectionError)):
                for _ in range(10_000):
                    client.sock.sendall(send)
        yield


READS = request(nbd.READ, 1, 0, 4 * MIB)
STATUS = request(nbd.BLOCK_STATUS, 1, 0, SLOTS * 4096)


@asynccontextmanager
async def serve(tmp_path: Path) -> AsyncIterator[tuple[NbdServer, str]]:
    """A space of which every other page is stored, so that it has many extents."""
    async with open_shard(tmp_path / "state", ram(mib=32)) as shard:
        space = shard.spaces.create("swap", max_slots=SLOTS)
        server = NbdServer(shard, inflight_bytes=8 * MIB)
        [address] = await server.start([f"unix:{tmp_path}/nbd.sock"], insecure=False)
        slots = np.arange(0, SLOTS, 2, dtype=np.uint64)
        await shard.pager.store(space, slots, pages(slots, 1))
        try:
            yield server, address
        finally:
            await server.stop(5.0)
        assert not shard.handles.pins.any()


@pytest.mark.parametrize("asked", [READS, STATUS], ids=["read", "status"])
async def test_clients_that_take_no_replies_hold_up_nobody(asked: bytes, tmp_path: Path) -> None:
    """They hold all that clients together may hold; memory stays bounded all the same."""

    def work(address: str) -> None:
        before = _resident_mib()
        with stuck(address, 6, asked):
            assert _resident_mib() - before < 64
            with Nbd(address) as other:
                other.go("swap")
                assert len(other.read(0, 8 * MIB)) == 8 * MIB

    async with serve(tmp_path) as (_, address):
        await asyncio.to_thread(work, address)


async def test_who_takes_no_replies_while_others_wait_is_hung_up_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_PATIENCE_S", 0.5)

    def work(server: NbdServer, address: str) -> None:
        with stuck(address, 6, READS):
            until_s = time.monotonic() + 20
            while not server.counters["nbd_stuck"]:
                assert time.monotonic() < until_s
                time.sleep(0.1)

    async with serve(tmp_path) as (server, address):
        await asyncio.to_thread(work, server, address)


async def test_no_more_clients_than_there_are_files_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is one too many is hung up on; the others, and the tiers, have what they need."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (532, 532))

    def work(address: str) -> None:
        with ExitStack() as stack:
            clients = [stack.enter_context(Nbd(address)).go("swap") for _ in range(10)]
            with pytest.raises(ConnectionError):
                Nbd(address).go("swap")
            assert clients[-1].read(0, 4096) == clients[0].read(0, 4096)
        with Nbd(address) as again:
            again.go("swap")

    async with serve(tmp_path) as (_, address):
        await asyncio.to_thread(work, address)


def _resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20
