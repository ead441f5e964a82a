"""Redis servers killed under load: nothing wrong, nothing lost, no failed request; and repair."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from client_support import run_vswap
from numpy.typing import NDArray
from processes import Daemon
from shards import page

from vswap.cli.embedded import EmbeddedRedis, free_port
from vswap.client import Client
from vswap.client.operator import Operator
from vswap.v1 import common_pb2

MIB = 2**20
SLOTS = 5000
STRIPES = 4
"""Each worker has slots of its own, so that it knows what it stored last."""


class Cluster:
    """A coordinator, a node with little RAM, and one tier over several Redis servers."""

    def __init__(self, root: Path, redundancy: str, count: int) -> None:
        self.root = root
        self.servers = [
            EmbeddedRedis(maxmemory_bytes=100 * MIB, port=free_port()).start() for _ in range(count)
        ]
        self.spare = EmbeddedRedis(maxmemory_bytes=100 * MIB).start()
        self.address = f"127.0.0.1:{free_port()}"
        self.coordinator = Daemon(
            "coordinator", root / "coordinator", "--listen", self.address, "--lease", "1s"
        ).start()
        self.operator = Operator(self.address)
        urls = [word for server in self.servers for word in ("--url", server.url)]
        self.vswap(
            "tier", "add", "red", *urls, "--redundancy", redundancy, "--capacity", "60MiB",
            "--rank", "20", "--timeout", "1s",
        )  # fmt: skip
        config = root / "n.toml"
        config.write_text(
            '[[tiers]]\nname="ram"\nurl="ram://"\ncodec="zstd:1"\ncapacity_bytes=2097152\n'
            'rank=0\n[[spaces]]\nname="s"\n'
        )
        self.node = Daemon(
            "node", root / "n", "--name", "n", "--config", str(config),
            "--coordinator", self.address,
        ).start()  # fmt: skip
        self.versions = np.zeros(SLOTS, np.int64)
        self.client = self.connect()

    def connect(self) -> Client:
        """Whose calls fail when the node's do."""
        return Client(self.node.address, retry_s=0)

    def vswap(self, *words: str) -> str:
        done = run_vswap(*words, coordinator=self.address)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def store(self, client: Client, slots: NDArray[np.uint64], version: int) -> None:
        client.space("s").store(slots, np.stack([page(s, version) for s in slots.tolist()]))
        self.versions[slots] = version

    def check(self, client: Client, slots: NDArray[np.uint64]) -> None:
        loaded = client.space("s").load(slots)
        for slot, got in zip(slots.tolist(), loaded, strict=True):
            assert (got == page(slot, int(self.versions[slot]))).all(), slot

    def check_all(self) -> None:
        for start in range(0, SLOTS, 500):
            self.check(self.client, np.arange(start, min(start + 500, SLOTS), dtype=np.uint64))

    @property
    def usage(self) -> Any:
        [info] = self.operator.cluster().tiers
        return info.usage

    def until(self, what: Any, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while not what():
            assert time.monotonic() < deadline, (self.usage, self.operator.jobs(ended=True))
            time.sleep(0.05)

    def whole(self) -> bool:
        """Nothing degraded, by a report that is younger than what happened before."""
        return (
            not self.usage.degraded_segments
            and all(server.up for server in self.usage.servers)
            and not self.operator.jobs()
        )

    def until_whole(self) -> None:
        time.sleep(1)
        self.until(self.whole)

    def stop(self) -> None:
        self.client.close()
        self.operator.close()
        for daemon in (self.node, self.coordinator):
            if daemon.process is not None and daemon.process.poll() is None:
                daemon.process.kill()
                daemon.process.wait()
        for server in (*self.servers, self.spare):
            server.stop()


class Load:
    """Workers that store, load and check until they are told to stop, or something is wrong."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._stop = threading.Event()
        self.failures: list[BaseException] = []
        self.loads: list[tuple[float, float]] = []
        """(when it began, seconds it took)"""
        self._threads = [threading.Thread(target=self._work, args=(i,)) for i in range(STRIPES)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _work(self, stripe: int) -> None:
        mine = np.arange(stripe, SLOTS, STRIPES, dtype=np.uint64)
        rng = np.random.default_rng(stripe)
        version = 2
        try:
            with self._cluster.connect() as client:
                while not self._stop.is_set():
                    version += 1
                    self._cluster.store(client, rng.permutation(mine)[:24], version)
                    for _ in range(3):
                        slots = rng.permutation(mine)[:8]
                        start = time.monotonic()
                        loaded = client.space("s").load(slots)
                        self.loads.append((start, time.monotonic() - start))
                        for slot, got in zip(slots.tolist(), loaded, strict=True):
                            wanted = page(slot, int(self._cluster.versions[slot]))
                            assert (got == wanted).all(), slot
        except BaseException as error:
            self.failures.append(error)

    def figures(self, since: float, until: float) -> str:
        took = [seconds for start, seconds in self.loads if since <= start < until]
        p50, p99 = np.percentile(took, (50, 99)) * 1e3
        return f"{len(took)} loads of 8 pages, p50 {p50:.2f} ms, p99 {p99:.2f} ms"


KINDS = {"mirror:2": (2, 1), "rs:4+2": (6, 2)}


@pytest.fixture
def setting(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Cluster, int]]:
    redundancy = request.param
    count, lost = KINDS[redundancy]
    made = Cluster(tmp_path, redundancy, count)
    try:
        for start in range(0, SLOTS, 500):
            made.store(made.client, np.arange(start, start + 500, dtype=np.uint64), 1)
        yield made, lost
    finally:
        made.stop()


@pytest.mark.parametrize("setting", KINDS, indirect=True)
def test_servers_killed_under_load_and_then_the_others(setting: tuple[Cluster, int]) -> None:
    cluster, lost = setting
    with Load(cluster) as load:
        marks = [time.monotonic()]
        time.sleep(1.5)
        marks.append(time.monotonic())
        for server in cluster.servers[:lost]:
            server.kill()
        time.sleep(1.5)
        marks.append(time.monotonic())
        cluster.until(lambda: sum(not server.up for server in cluster.usage.servers) == lost)
        # They come back empty, and are made whole while the load goes on.
        for server in cluster.servers[:lost]:
            server.start()
        cluster.until_whole()
    assert not load.failures
    print(f"\nhealthy:  {load.figures(marks[0], marks[1])}")
    print(f"degraded: {load.figures(marks[1], marks[2])}")
    repaired = [job for job in cluster.operator.jobs(ended=True) if job.automatic]
    for job in repaired:
        print(f"rebuilt:  {job.bytes_moved / MIB:.1f} MiB in {job.ended_at - job.created_at:.1f} s")
    assert sum(job.pages_moved for job in repaired) > 0
    cluster.check_all()
    # Now the loss of others loses nothing either.
    for server in cluster.servers[-lost:]:
        server.kill()
    cluster.check_all()
    status = cluster.client.status()
    assert status.counters.get("corrupt_pages", 0) == 0
    assert "vswap repair" not in cluster.vswap("tier", "list")


@pytest.mark.parametrize("setting", ["mirror:2"], indirect=True)
def test_a_stopped_server_holds_nobody_up_for_long(setting: tuple[Cluster, int]) -> None:
    """It accepts connections and never answers: after one timeout it is left out."""
    cluster, lost = setting
    for server in cluster.servers[:lost]:
        assert server.process is not None
        server.process.send_signal(19)
    with Load(cluster) as load:
        cluster.until(lambda: not cluster.usage.servers[0].up)
        time.sleep(1)
    assert not load.failures
    for server in cluster.servers[:lost]:
        assert server.process is not None
        server.process.send_signal(18)
    cluster.until_whole()
    cluster.check_all()


@pytest.mark.parametrize("setting", ["rs:4+2"], indirect=True)
def test_a_server_is_replaced_and_a_node_is_killed_meanwhile(setting: tuple[Cluster, int]) -> None:
    cluster, _ = setting
    cluster.servers[0].kill()
    slots = np.arange(SLOTS // 2, dtype=np.uint64)
    for start in range(0, len(slots), 500):
        cluster.store(cluster.client, slots[start : start + 500], 2)
    cluster.node.kill()
    cluster.node.start()
    cluster.client.close()
    cluster.client = cluster.connect()
    cluster.check_all()
    shown = cluster.vswap("tier", "list")
    assert "degraded" in shown
    cluster.vswap(
        "tier", "set", "red", "--replace", f"{cluster.servers[0].url}={cluster.spare.url}"
    )
    cluster.until_whole()
    keys: Any = redis.Redis.from_url(cluster.spare.url).dbsize()
    assert keys > 0
    cluster.vswap("repair", "red")
    cluster.servers[1].kill()
    cluster.check_all()
    [tier] = cluster.operator.cluster().tiers
    assert tier.tier.spec.urls[0] == cluster.spare.url
    assert tier.tier.state == common_pb2.TIER_STATE_ACTIVE
