"""Overload: more than the node takes, before a slow tier. Callers wait, memory does not grow."""

from __future__ import annotations

import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import flood
import nbd_client as nbd
import pytest
from nbd_client import Nbd
from processes import Daemon, private_mib

from vswap.client import Client

pytestmark = pytest.mark.timeout(240)

MIB = 2**20
INFLIGHT_MIB = 16
BOUND_MIB = 800
"""It peaks at 400 to 600 MiB; where stores are received before there is room for them, beyond."""
LEFT_MIB = 300
WORKERS, DISKS, LENGTH = 12, 4, 256 * 1024


def node(tmp_path: Path) -> Daemon:
    config = tmp_path / "node.toml"
    config.write_text(
        f"""
name = "pressed"
nbd = ["unix:{tmp_path}/nbd.sock"]
inflight_bytes = {INFLIGHT_MIB * MIB}
[faults]
objects = "seed=1,delay_ms=30"
[[tiers]]
name = "ram"
url = "ram://"
codec = "zstd:1"
capacity_bytes = {48 * MIB}
[[tiers]]
name = "objects"
url = "file://{tmp_path}/objects"
capacity_bytes = {1024 * MIB}
rank = 50
[[spaces]]
name = "sdk"
[[spaces]]
name = "disk"
max_slots = {64 * MIB // 4096}
"""
    )
    return Daemon("node", tmp_path / "state", "--config", str(config))


def press(address: str, number: int, until_s: float) -> int:
    """Writes as deep as it goes; returns how many writes failed or are not there in the end."""
    rng = random.Random(number)
    first, model = number * 16 * MIB, dict[int, bytes]()
    failed = 0
    with Nbd(address, timeout_s=120) as disk:
        disk.go("disk")
        while time.monotonic() < until_s:
            batch = {first + n * LENGTH: rng.randbytes(LENGTH) for n in range(64)}
            sender = threading.Thread(
                target=lambda batch=batch: [
                    disk.send(nbd.WRITE, offset, LENGTH, data) for offset, data in batch.items()
                ]
            )
            sender.start()
            failed += sum(answer.error != 0 for answer in disk.replies(len(batch)).values())
            sender.join()
            model.update(batch)
        return failed + sum(disk.read(at, LENGTH) != data for at, data in model.items())


def test_overload_makes_callers_wait_and_memory_does_not_grow(tmp_path: Path) -> None:
    with node(tmp_path) as daemon, Client(daemon.address) as client:
        peak = 0
        for _ in range(2):
            floods = [
                flood.launch(daemon.address, "sdk", n * WORKERS * flood.PAGES, WORKERS, 4)
                for n in range(3)
            ]
            until_s = time.monotonic() + 4
            [address] = client.status().nbd
            with ThreadPoolExecutor(DISKS) as pool:
                presses = [pool.submit(press, address, n, until_s) for n in range(DISKS)]
                while any(f.poll() is None for f in floods) or not all(p.done() for p in presses):
                    peak = max(peak, private_mib(daemon))
                    time.sleep(0.02)
            told = [json.loads(f.communicate()[0]) for f in floods]
            print(peak, told, client.status().counters.get("nbd_write"))
            assert [p.result() for p in presses] == [0] * DISKS
            assert [f.returncode for f in floods] == [0] * len(floods)
            assert all(t["stored"] >= WORKERS and not t.get("wrong") for t in told), told
            assert peak < BOUND_MIB
        # What it took for the load it gives back.
        deadline = time.monotonic() + 30
        while private_mib(daemon) > LEFT_MIB and time.monotonic() < deadline:
            time.sleep(0.5)
        assert private_mib(daemon) <= LEFT_MIB
        assert client.status().counters.get("corrupt_pages", 0) == 0
        assert "unforeseen" not in daemon.output
