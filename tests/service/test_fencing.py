"""Nodes that seem dead, nodes of one name, clusters on one server: all keep to what is theirs.

Real processes on one Redis server, whose keys tell who deleted and wrote what.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from client_support import run_vswap
from processes import Daemon
from shards import pages

from vswap.cli.embedded import EmbeddedRedis, free_port
from vswap.client import Client, Operator
from vswap.wire.errors import OutOfTiers, PageLost

MIB = 2**20
SLOTS = np.arange(2000, dtype=np.uint64)
CONFIG = """
[[tiers]]
name = "ram"
url = "ram://"
codec = "none"
capacity_bytes = 2097152
rank = 0

[[spaces]]
name = "s"
"""


class Site:
    """A Redis server, and clusters on it; every coordinator's lease is one second."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.redis = EmbeddedRedis(maxmemory_bytes=200 * MIB, port=free_port()).start()
        self.server: Any = redis.Redis.from_url(self.redis.url)
        self.daemons: list[Daemon] = []
        (root / "node.toml").write_text(CONFIG)

    def cluster(self, name: str, environ: dict[str, str] | None = None) -> str:
        """A new cluster with the server as its tier ``red``; its coordinator's address."""
        address = f"127.0.0.1:{free_port()}"
        flags = ("--listen", address, "--lease", "1s")
        self.started(Daemon("coordinator", self.root / name, *flags, environ=environ))
        vswap(address, "tier", "add", "red", self.redis.url, "--capacity", "60MiB",
              "--rank", "20")  # fmt: skip
        return address

    def daemon(
        self, coordinator: str, name: str, state: str = "", environ: dict[str, str] | None = None
    ) -> Daemon:
        daemon = Daemon(
            "node", self.root / (state or name), "--name", name,
            "--config", str(self.root / "node.toml"), "--coordinator", coordinator,
            environ=environ,
        )  # fmt: skip
        self.daemons.append(daemon)
        return daemon

    def node(
        self, coordinator: str, name: str, state: str = "", environ: dict[str, str] | None = None
    ) -> Daemon:
        """A node with pages in its RAM and on the server."""
        daemon = self.daemon(coordinator, name, state, environ).start()
        with Client(daemon.address) as client:
            for start in range(0, len(SLOTS), 200):
                some = SLOTS[start : start + 200]
                client.space("s").store(some, pages(some, 1))
        assert self.keys(daemon)
        return daemon

    def started(self, daemon: Daemon) -> Daemon:
        self.daemons.append(daemon)
        return daemon.start()

    def keys(self, node: Daemon) -> set[bytes]:
        """What the server has of a node."""
        with Client(node.address) as client:
            uuid = client.status().shard_uuid
        return self.keys_of(uuid)

    def keys_of(self, uuid: str) -> set[bytes]:
        return set(self.server.keys(f"vswap/*/{uuid}/*"))

    def stop(self) -> None:
        for daemon in self.daemons:
            if daemon.process is not None and daemon.process.poll() is None:
                daemon.process.send_signal(signal.SIGCONT)
                daemon.kill()
        self.server.close()
        self.redis.stop()


def vswap(coordinator: str, *words: str, code: int = 0) -> str:
    done = run_vswap(*words, coordinator=coordinator)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def until(what: Callable[[], object], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def state_of(coordinator: str, name: str) -> str:
    with Operator(coordinator) as operator:
        return next((str(n.state) for n in operator.cluster().nodes if n.name == name), "unknown")


def all_right(coordinator: str, node: Daemon) -> None:
    with Client(node.address) as client:
        assert (client.space("s").load(SLOTS) == pages(SLOTS, 1)).all()
    assert "no difference" in vswap(coordinator, "check", "--node-address", node.address, "--deep")


@contextlib.contextmanager
def frozen(node: Daemon) -> Iterator[None]:
    """As good as dead for the others, and yet alive."""
    assert node.process is not None
    node.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        node.process.send_signal(signal.SIGCONT)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    try:
        yield made
    finally:
        made.stop()


def test_a_node_that_seems_dead_loses_nothing(site: Site) -> None:
    coordinator = site.cluster("c")
    node = site.node(coordinator, "n")
    before = site.keys(node)
    with frozen(node):
        until(lambda: state_of(coordinator, "n") == "absent")
        # Its name is its own for as long as nobody has forgotten it.
        other = site.daemon(coordinator, "n", "other").launch()
        assert other.wait() != 0
        assert "node forget" in other.output
        # Nor does a new life of the coordinator, with its sweep, take what is an absent node's.
        site.daemons[0].kill()
        site.daemons[0].start()
        until(lambda: state_of(coordinator, "n") == "absent")
        assert set(site.server.keys("vswap/*")) == before
    until(lambda: state_of(coordinator, "n") == "connected")
    assert site.keys(node) >= before
    all_right(coordinator, node)


def test_only_forgetting_takes_what_a_node_left(site: Site) -> None:
    """And forgotten, it writes nothing that nobody would look after, however alive it is."""
    coordinator = site.cluster("c")
    node = site.node(coordinator, "n")
    with Client(node.address) as client:
        uuid = client.status().shard_uuid
    with frozen(node):
        until(lambda: state_of(coordinator, "n") == "absent")
        assert site.keys_of(uuid)
        vswap(coordinator, "node", "forget", "n", "--yes")
        assert not site.keys_of(uuid)
        heir = site.node(coordinator, "n", "heir")
        kept = site.keys(heir)
    until(lambda: "was forgotten" in node.output)
    with Client(node.address, retry_s=0) as client:
        space = client.space("s")
        good = 0
        for slot in SLOTS.tolist():
            with contextlib.suppress(PageLost):
                assert (space.load([slot]) == pages(np.array([slot], np.uint64), 1)).all()
                good += 1
        assert 0 < good < len(SLOTS)
        with pytest.raises(OutOfTiers):
            for start in range(0, len(SLOTS), 200):
                some = SLOTS[start : start + 200]
                space.store(some + np.uint64(10_000), pages(some, 2))
    # Nor in another life, with nobody there to say it again.
    site.daemons[0].kill()
    node.kill()
    node.start()
    with Client(node.address, retry_s=0) as client:
        client.space("s").free(SLOTS)
        with pytest.raises(OutOfTiers):
            for start in range(0, len(SLOTS), 200):
                some = SLOTS[start : start + 200]
                client.space("s").store(some + np.uint64(20_000), pages(some, 2))
    assert not site.keys_of(uuid)
    assert site.keys(heir) >= kept
    all_right(coordinator, heir)


def test_two_clusters_on_one_server_leave_each_other_alone(site: Site) -> None:
    first, second = site.cluster("c1"), site.cluster("c2")
    # Of one name even.
    mine, other = site.node(first, "n", "n1"), site.node(second, "n", "n2")
    kept = site.keys(other)
    # All that deletes: a drain with its last look at the server, and a tombstone.
    vswap(first, "tier", "add", "disk", f"file://{site.root}/disk", "--capacity", "60MiB")
    vswap(first, "drain", "red")
    assert not site.keys(mine)
    all_right(first, mine)
    vswap(first, "activate", "red")
    more = site.node(first, "more")
    with Client(more.address) as client:
        uuid = client.status().shard_uuid
    more.kill()
    until(lambda: state_of(first, "more") == "absent")
    vswap(first, "node", "forget", "more", "--yes")
    assert not site.keys_of(uuid)
    assert site.keys(other) == kept
    all_right(second, other)


JUMPING = """
import random, time
_real, _rng = time.time, random.Random()
time.time = lambda: _real() + _rng.choice((-1e7, -3600.0, 0.0, 3600.0, 1e7))
"""


def test_clocks_that_jump_do_no_harm(site: Site) -> None:
    """By months, with every look at them, in the coordinator and in the node."""
    (site.root / "jumping").mkdir()
    (site.root / "jumping" / "sitecustomize.py").write_text(JUMPING)
    path = os.pathsep.join(filter(None, [str(site.root / "jumping"), os.environ.get("PYTHONPATH")]))
    coordinator = site.cluster("c", {"PYTHONPATH": path})
    node = site.node(coordinator, "n", environ={"PYTHONPATH": path})
    vswap(coordinator, "tier", "add", "disk", f"file://{site.root}/disk", "--capacity", "60MiB")
    for _ in range(12):
        assert state_of(coordinator, "n") == "connected"
        time.sleep(0.1)
    vswap(coordinator, "drain", "red")
    assert not site.keys(node)
    for daemon in (node, site.daemons[0]):
        daemon.kill()
        daemon.start()
    until(lambda: state_of(coordinator, "n") == "connected")
    all_right(coordinator, node)
