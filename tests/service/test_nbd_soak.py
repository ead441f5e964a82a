"""A node under clients that come in hundreds, misbehave and vanish: nothing leaks or stops."""

from __future__ import annotations

import random
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import nbd_client as nbd
import psutil
import pytest
from nbd_client import Nbd
from processes import Daemon

from vswap.client import Client

pytestmark = pytest.mark.timeout(180)
SIZE = 64 << 20


def node(tmp_path: Path) -> Daemon:
    config = tmp_path / "node.toml"
    config.write_text(
        f"""
name = "soak"
nbd = ["unix:{tmp_path}/nbd.sock", "127.0.0.1:0"]
[[tiers]]
name = "ram"
url = "ram://"
codec = "zstd:1"
capacity_bytes = 33554432
[[tiers]]
name = "objects"
url = "file://{tmp_path}/objects"
capacity_bytes = 268435456
rank = 50
[[spaces]]
name = "swap"
max_slots = {SIZE // 4096}
"""
    )
    return Daemon("node", tmp_path / "state", "--config", str(config))


OWN = 3 << 20
"""Bytes at the beginning that each client has for itself: what it reads there is what it wrote.
The rest is where clients vanish in the middle of changes."""
CLIENTS = 12


def rampage(address: str, number: int, seed: int, until_s: float) -> None:
    """Connects, does something, legal or not, and vanishes; again and again. Raises where it gets
    another answer than it must get."""
    rng = random.Random(seed)
    start = number * OWN
    with Nbd(address) as disk:
        model = bytearray(disk.go("swap").read(start, OWN))
    while time.monotonic() < until_s:
        with Nbd(address) as disk:
            kind = rng.randrange(8)
            if kind == 0:
                send_garbage(disk, rng.randbytes(rng.randrange(200)))
                continue
            disk.go("swap", structured=rng.random() < 0.7)
            offset = rng.randrange(CLIENTS * OWN, SIZE - (1 << 20))
            if kind == 1:
                for _ in range(rng.randrange(1, 64)):
                    disk.send(nbd.READ, rng.randrange(SIZE - 4096), 4096)
            elif kind == 2:
                head = struct.pack(">IHHQQI", nbd.REQUEST, 0, nbd.WRITE, 1, offset, 1 << 20)
                disk.sock.sendall(head + rng.randbytes(rng.randrange(1 << 19)))
            elif kind == 3:
                at, data = rng.randrange(OWN - (1 << 18)), rng.randbytes(rng.randrange(1, 1 << 18))
                disk.write(start + at, data)
                model[at : at + len(data)] = data
            elif kind == 4:
                disk.send(nbd.TRIM, offset, rng.randrange(1, 1 << 20))
            elif kind == 5:
                disk.send(nbd.READ, offset, 1 << 20)
                disk.take(rng.randrange(100_000))
            elif kind == 6:
                at, length = rng.randrange(OWN - (1 << 20)), rng.randrange(1, 1 << 20)
                assert disk.read(start + at, length) == model[at : at + length]
            else:
                send_garbage(disk, rng.randbytes(rng.randrange(1, 5000)))


def send_garbage(disk: Nbd, garbage: bytes) -> None:
    # The server may hang up before it has all of it.
    with suppress(BrokenPipeError, ConnectionResetError):
        disk.sock.sendall(garbage)


def storm(address: str, seconds: float, seed: int) -> None:
    """All clients at once. Raises what any of them raised."""
    until_s = time.monotonic() + seconds
    with ThreadPoolExecutor(CLIENTS) as pool:
        running = [
            pool.submit(rampage, address, n, seed * 100 + n, until_s) for n in range(CLIENTS)
        ]
        for one in running:
            one.result()


def churn(address: str, connections: int, seed: int) -> None:
    """Clients that connect, ask for something and vanish in the middle, one after the other.

    They store nothing: what that takes of the allocator is more than a small leak.
    """
    rng = random.Random(seed)
    for _ in range(connections):
        with Nbd(address) as disk:
            disk.go("swap")
            offset = rng.randrange(SIZE - (1 << 20)) & ~4095
            disk.send(nbd.READ, offset, rng.randrange(1, 1 << 18))
            head = struct.pack(">IHHQQI", nbd.REQUEST, 0, nbd.WRITE, 1, offset, 1 << 17)
            disk.sock.sendall(head + rng.randbytes(rng.randrange(4096)))


def own_bytes(pid: int) -> int:
    """Memory of a process that is no file's."""
    status = Path(f"/proc/{pid}/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(line.split()[1]) << 10


def wait_for_the_old_state(
    client: Client, process: psutil.Process, files: int, memory_bytes: int
) -> None:
    until_s = time.monotonic() + 30
    while (
        client.status().counters["pinned_segments"] > 0
        or process.num_fds() > files + 2
        or own_bytes(process.pid) > memory_bytes
    ):
        told = process.num_fds(), own_bytes(process.pid) >> 20, client.status().counters
        assert time.monotonic() < until_s, (files, memory_bytes >> 20, told)
        time.sleep(0.1)


def test_nothing_leaks_when_clients_vanish(tmp_path: Path) -> None:
    with node(tmp_path) as daemon, Client(daemon.address) as client:
        unix, tcp = client.status().nbd
        assert daemon.process is not None
        process = psutil.Process(daemon.process.pid)
        # What the allocator keeps for itself is grown by then; every 2 s the rest is given back.
        storm(unix, 5.0, 1)
        churn(unix, 300, 2)
        time.sleep(3.0)
        files, memory = process.num_fds(), own_bytes(process.pid)
        churn(unix, 1500, 3)
        wait_for_the_old_state(client, process, files, memory + (24 << 20))
        storm(unix, 3.0, 4)
        storm(tcp, 3.0, 5)
        # Storms leave the allocator with more than a leak would show in; the churn is for leaks.
        wait_for_the_old_state(client, process, files, memory + (96 << 20))
        with Nbd(unix) as disk:
            disk.go("swap").write(0, b"still here")
            assert disk.read(0, 10) == b"still here"
        assert client.status().counters["nbd_connections"] > 100
        assert client.status().counters.get("corrupt_pages", 0) == 0
        assert "unforeseen" not in daemon.output, daemon.output


def test_two_hundred_connections_at_once(tmp_path: Path) -> None:
    with node(tmp_path) as daemon, Client(daemon.address) as client:
        unix, _ = client.status().nbd
        assert daemon.process is not None
        process = psutil.Process(daemon.process.pid)
        files = process.num_fds()
        disks = [Nbd(unix).go("swap") for _ in range(200)]
        wanted = {n: random.Random(n).randbytes(20_000) for n in range(200)}
        cookies = {}
        for n, disk in enumerate(disks):
            cookies[n] = disk.send(nbd.WRITE, n * 30_000, 20_000, wanted[n])
        for n, disk in enumerate(disks):
            assert disk.replies(1)[cookies[n]].error == 0
        for n, disk in enumerate(disks):
            disk.send(nbd.READ, n * 30_000, 20_000)
        for n, disk in enumerate(disks):
            [answer] = disk.replies(1).values()
            assert answer.pieces[0][1] == wanted[n]
        for disk in disks:
            disk.sock.close()
        until_s = time.monotonic() + 30
        while process.num_fds() > files:
            assert time.monotonic() < until_s, process.num_fds()
            time.sleep(0.05)
        assert daemon.stop() == 0


def test_who_is_there_when_the_node_stops_gets_its_answers(tmp_path: Path) -> None:
    with node(tmp_path) as daemon, Client(daemon.address) as client:
        unix, _ = client.status().nbd
        disk = Nbd(unix).go("swap")
        data = random.Random(1).randbytes(4 << 20)
        cookie = disk.send(nbd.WRITE, 0, len(data), data)
        assert disk.replies(1)[cookie].error == 0
        assert daemon.stop() == 0
        assert disk.closed()
    with daemon, Nbd(unix) as disk:
        assert disk.go("swap").read(0, len(data)) == data
        # Killed: what was acknowledged is there in the next life too.
        disk.write(100, b"acknowledged")
        daemon.kill()
    with daemon, Nbd(unix) as disk:
        assert disk.go("swap").read(100, 12) == b"acknowledged"
