"""A node under clients that come in hundreds, misbehave and vanish: nothing leaks or stops."""

from __future__ import annotations

import random
import struct
import threading
import time
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


def rampage(address: str, seed: int, until_s: float) -> None:
    """Connects, does something, legal or not, and vanishes; again and again."""
    rng = random.Random(seed)
    while time.monotonic() < until_s:
        with suppress(OSError, AssertionError, struct.error), Nbd(address, timeout_s=2.0) as disk:
            kind = rng.randrange(7)
            if kind == 0:
                disk.sock.sendall(rng.randbytes(rng.randrange(200)))
                continue
            disk.go("swap", structured=rng.random() < 0.7)
            offset = rng.randrange(SIZE - (1 << 20))
            if kind == 1:
                for _ in range(rng.randrange(1, 64)):
                    disk.send(nbd.READ, rng.randrange(SIZE - 4096), 4096)
            elif kind == 2:
                head = struct.pack(">IHHQQI", nbd.REQUEST, 0, nbd.WRITE, 1, offset, 1 << 20)
                disk.sock.sendall(head + rng.randbytes(rng.randrange(1 << 19)))
            elif kind == 3:
                disk.write(offset, rng.randbytes(rng.randrange(1, 1 << 18)))
            elif kind == 4:
                disk.send(nbd.TRIM, offset, rng.randrange(1, 1 << 20))
            elif kind == 5:
                disk.send(nbd.READ, offset, 1 << 20)
                disk.take(rng.randrange(100_000))
            else:
                disk.sock.sendall(rng.randbytes(rng.randrange(1, 5000)))


def storm(address: str, seconds: float, seed: int) -> None:
    until_s = time.monotonic() + seconds
    threads = [
        threading.Thread(target=rampage, args=(address, seed * 100 + n, until_s)) for n in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_nothing_leaks_when_clients_vanish(tmp_path: Path) -> None:
    with node(tmp_path) as daemon, Client(daemon.address) as client:
        unix, tcp = client.status().nbd
        assert daemon.process is not None
        process = psutil.Process(daemon.process.pid)
        # What the allocator keeps for itself is grown by then.
        storm(unix, 6.0, 1)
        files, memory = process.num_fds(), process.memory_info()
        storm(unix, 4.0, 2)
        storm(tcp, 4.0, 3)
        until_s = time.monotonic() + 10
        while client.status().counters["pinned_segments"] > 0:
            assert time.monotonic() < until_s, client.status().counters
            time.sleep(0.1)
        assert process.num_fds() <= files + 2
        grown = process.memory_info().rss - process.memory_info().shared
        assert grown - (memory.rss - memory.shared) < 96 << 20
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
        until_s = time.monotonic() + 10
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
