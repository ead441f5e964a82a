"""The relay between a block device and a real node that is killed, filled up, and made anew."""

from __future__ import annotations

import asyncio
import errno
import random
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbd_client as nbd
import pytest
from processes import Daemon

from vswap.cli.device import export
from vswap.cli.device.relay import Relay
from vswap.client import Client
from vswap.wire.errors import UnknownSpace, Unreachable

PAGE = 4096
SLOTS = 2048
CONFIG = f"""
[[tiers]]
name = "ram"
url = "ram://"
codec = "none"
capacity_bytes = {16 * 2**20}
[[spaces]]
name = "swap"
max_slots = {4 * SLOTS}
"""


class Device(nbd.Nbd):
    """What nbdfuse is to a relay."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.settimeout(30)
        self.structured = False
        self._cookie = 0
        self._lengths = {}
        magic, _, self.size, _, self.flags = struct.unpack(">8sQQHH124x", self.take(152))
        assert magic == b"NBDMAGIC"


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Daemon]:
    config = tmp_path / "node.toml"
    config.write_text(CONFIG)
    with Daemon("node", tmp_path / "state", "--name", "n1", "--config", str(config)) as daemon:
        yield daemon


def where(node: Daemon) -> str:
    return f"unix:{node.state}/nbd.sock"


@contextmanager
def relayed(node: Daemon) -> Iterator[Device]:
    """A device behind a relay in a process of its own, which ends well."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "vswap.cli.device.relay", where(node), "swap"]
    with ours, subprocess.Popen([*command, str(SLOTS * PAGE)], stdin=theirs.fileno()) as process:
        theirs.close()
        try:
            device = Device(ours)
            yield device
            device.send(nbd.DISC)
            assert process.wait(10) == 0
        finally:
            process.kill()


def test_a_node_that_is_killed_is_a_pause(node: Daemon) -> None:
    rng = random.Random(1)
    model: dict[int, bytes] = {}
    killed = threading.Event()

    def kill() -> None:
        for _ in range(3):
            time.sleep(0.4)
            node.kill()
            time.sleep(0.2)
            node.start()
        time.sleep(0.4)
        killed.set()

    with relayed(node) as device:
        assert device.size == SLOTS * PAGE
        killer = threading.Thread(target=kill)
        killer.start()
        rounds = 0
        while not killed.is_set():
            rounds += 1
            reads, writes = {}, {}
            for slot in rng.sample(range(SLOTS), 32):
                if rng.random() < 0.5:
                    data = rng.randbytes(64) * 64
                    writes[device.send(nbd.WRITE, slot * PAGE, PAGE, data)] = slot, data
                else:
                    reads[device.send(nbd.READ, slot * PAGE, PAGE)] = slot
            answers = device.replies(32)
            assert not any(answer.error for answer in answers.values())
            for cookie, slot in reads.items():
                [(_, data)] = answers[cookie].pieces
                assert data == model.get(slot, bytes(PAGE))
            model.update(dict(writes.values()))
        killer.join()
        assert rounds > 20
        for slot, data in model.items():
            assert device.read(slot * PAGE, PAGE) == data


def test_a_clean_restart_is_a_pause_too(node: Daemon) -> None:
    with relayed(node) as device:
        device.write(0, b"kept" * 1024)
        assert node.stop() == 0
        (node.state / "address").unlink(missing_ok=True)
        cookie = device.send(nbd.READ, 0, PAGE)
        node.start()
        assert device.replies(1)[cookie].pieces == [(-1, b"kept" * 1024)]


def test_pages_that_are_gone_are_errors_and_never_zeros(node: Daemon) -> None:
    with relayed(node) as device:
        device.write(0, b"gone" * 1024)
        node.kill()
        # As after a reboot: a space of the same name, made by the configuration, and empty.
        shutil.rmtree(node.state)
        node.start()
        assert device.ask(nbd.READ, 0, PAGE).error == errno.EIO
        assert device.ask(nbd.WRITE, 0, PAGE, bytes(PAGE)).error == errno.EIO


def test_a_space_that_is_deleted_is_an_error_soon(node: Daemon) -> None:
    with relayed(node) as device:
        device.write(0, bytes(range(256)) * 16)
        with Client(node.address) as client:
            client.delete_space("swap")
            began_s = time.monotonic()
            assert device.ask(nbd.READ, 0, PAGE).error == errno.EIO
            # Nor does another one of the same name bring anything back.
            client.create_space("swap", page_bytes=PAGE, max_slots=4 * SLOTS)
            assert device.ask(nbd.READ, 0, PAGE).error == errno.EIO
        assert time.monotonic() - began_s < 5


def test_a_full_node_is_an_error_at_once_and_holds_up_nothing(node: Daemon) -> None:
    with relayed(node) as device:
        began_s = time.monotonic()
        errors = set()
        page = random.Random(2)
        for slot in range(0, SLOTS, 2):
            data = page.randbytes(2 * PAGE)
            errors.add(device.ask(nbd.WRITE, slot * PAGE, 2 * PAGE, data).error)
        assert errors == {0}, "a device as small as this fits"
    with nbd.Nbd(where(node)) as other:
        other.go("swap", structured=False)
        for slot in range(SLOTS, 4 * SLOTS, 16):
            if other.ask(nbd.WRITE, slot * PAGE, 16 * PAGE, page.randbytes(16 * PAGE)).error:
                break
        else:
            pytest.fail("the node never filled up")
    with relayed(node) as device:
        device.do(nbd.TRIM, 0, 4 * PAGE)
        refused = [
            device.send(nbd.WRITE, n * 64 * PAGE, 64 * PAGE, page.randbytes(64 * PAGE))
            for n in range(8)
        ]
        read = device.send(nbd.READ, 600 * PAGE, PAGE)
        answers = device.replies(9)
        assert len(answers[read].pieces[0][1]) == PAGE
        assert errno.ENOSPC in {answers[cookie].error for cookie in refused}
    assert time.monotonic() - began_s < 30


async def test_what_waits_for_too_long_fails_until_the_node_is_back(node: Daemon) -> None:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    relay = asyncio.create_task(Relay(where(node), "swap", patience_s=0.5).run(theirs, 16 * PAGE))

    def work() -> None:
        with Device(ours) as device:
            device.write(0, b"kept" * 1024)
            node.kill()
            began_s = time.monotonic()
            assert device.ask(nbd.READ, 0, PAGE).error == errno.EIO
            assert time.monotonic() - began_s >= 0.4
            began_s = time.monotonic()
            assert device.ask(nbd.READ, 0, PAGE).error == errno.EIO
            assert time.monotonic() - began_s < 0.3
            node.start()
            until_s = time.monotonic() + 10
            while device.ask(nbd.READ, 0, PAGE).error:
                assert time.monotonic() < until_s
            assert device.read(0, PAGE) == b"kept" * 1024

    await asyncio.to_thread(work)
    # The device hung up.
    await asyncio.wait_for(relay, 5)


def test_a_relay_whose_device_never_came_ends_by_itself(node: Daemon) -> None:
    """As when `vswap attach` is killed before the kernel has the connection."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "vswap.cli.device.relay", where(node), "swap"]
    with subprocess.Popen([*command, str(SLOTS * PAGE)], stdin=theirs.fileno()) as process:
        theirs.close()
        with ours:
            ours.settimeout(30)
            offer = export.take_greeting(ours)
            assert offer.size_bytes == SLOTS * PAGE
        assert process.wait(10) == 0
    # HAS_FLAGS, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES: what the kernel makes use of.
    assert offer.flags & 0b1101101 == 0b1101101


def test_what_cannot_be_opened(node: Daemon) -> None:
    with pytest.raises(UnknownSpace, match="no such export"):
        export.connect(where(node), "other")
    with pytest.raises(Unreachable):
        export.connect(where(node) + "x", "swap")
    connection, found = export.connect(where(node), "swap")
    connection.close()
    assert found.size_bytes == 4 * SLOTS * PAGE
    assert "of shard" in found.description
