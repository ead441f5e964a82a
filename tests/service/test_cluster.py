"""A cluster of separate processes: live drains, outages of the control plane, compaction."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from client_support import run_vswap
from numpy.typing import NDArray
from processes import Daemon
from shards import page

from vswap.cli import exits
from vswap.cli.embedded import EmbeddedRedis, free_port
from vswap.client import Client
from vswap.client.operator import Operator
from vswap.v1 import common_pb2, coordinator_pb2
from vswap.wire.errors import OutOfTiers, SlotNotFound

MIB = 2**20
LEASE_S = 1.0
SLOTS = 6000
Job, Spec = coordinator_pb2.Job, coordinator_pb2.JobSpec
DONE, RUNNING, BLOCKED, CANCELLED = (
    coordinator_pb2.JOB_STATE_DONE, coordinator_pb2.JOB_STATE_RUNNING,
    coordinator_pb2.JOB_STATE_BLOCKED, coordinator_pb2.JOB_STATE_CANCELLED,
)  # fmt: skip


class Cluster:
    """A coordinator, two nodes with little RAM, two Redis servers, a directory of objects."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.redis = {name: EmbeddedRedis(maxmemory_bytes=200 * MIB).start() for name in "ab"}
        self.coordinator_address = f"127.0.0.1:{free_port()}"
        self.coordinator = Daemon(
            "coordinator", root / "coordinator",
            "--listen", self.coordinator_address, "--lease", f"{LEASE_S}s",
        ).start()  # fmt: skip
        self.operator = Operator(self.coordinator_address)
        for rank, name in enumerate("ab", 20):
            self.add_tier(f"red-{name}", self.redis[name].url, rank, 100)
        self.add_tier("disk", f"file://{root}/disk", 30, 100)
        self.nodes = {name: self.make_node(name).start() for name in ("n1", "n2")}
        self.clients = {name: Client(node.address) for name, node in self.nodes.items()}
        self.versions: dict[tuple[str, int], int] = {}

    def add_tier(self, name: str, url: str, rank: int, mib: int) -> None:
        self.operator.add_tier(
            common_pb2.TierSpec(name=name, url=url, capacity_bytes=mib * MIB, rank=rank)
        )

    def make_node(self, name: str) -> Daemon:
        config = self.root / f"{name}.toml"
        config.write_text(
            '[[tiers]]\nname="ram"\nurl="ram://"\ncodec="zstd:1"\ncapacity_bytes=2097152\n'
            'rank=0\n[[spaces]]\nname="s"\n'
        )
        return Daemon(
            "node", self.root / name, "--name", name, "--config", str(config),
            "--coordinator", self.coordinator_address,
        )  # fmt: skip

    def store(self, node: str, slots: NDArray[np.uint64], version: int) -> None:
        content = np.stack([page(slot, version) for slot in slots.tolist()])
        self.clients[node].space("s").store(slots, content)
        self.versions.update({(node, slot): version for slot in slots.tolist()})

    def check(self, node: str, slots: NDArray[np.uint64]) -> None:
        loaded = self.clients[node].space("s").load(slots)
        for slot, got in zip(slots.tolist(), loaded, strict=True):
            assert (got == page(slot, self.versions[node, slot])).all(), (node, slot)

    def check_all(self) -> None:
        for node in self.clients:
            mine = sorted(slot for name, slot in self.versions if name == node)
            slots = np.array(mine, np.uint64)
            for start in range(0, len(slots), 1000):
                self.check(node, slots[start : start + 1000])

    def fill(self) -> None:
        for node in self.nodes:
            for start in range(0, SLOTS, 500):
                self.store(node, np.arange(start, start + 500, dtype=np.uint64), 1)

    def spread(self) -> None:
        """Pages into every shared tier."""
        for source, to in (("red-a", "red-b"), ("red-a", "disk")):
            self.run_job(
                Spec(kind=coordinator_pb2.MOVE_KIND_MIGRATE, tier=source, destination=to,
                     byte_budget=3 * MIB)
            )  # fmt: skip

    def run_job(self, spec: Any, timeout_s: float = 60) -> Any:
        job = self.operator.start_job(spec)
        return self.wait_job(job.id, DONE, timeout_s=timeout_s)

    def job(self, job_id: str) -> Any:
        return next(job for job in self.operator.jobs(ended=True) if job.id == job_id)

    def wait_job(self, job_id: str, state: int, timeout_s: float = 60) -> Any:
        return until(lambda: (j := self.job(job_id)).state == state and j, timeout_s,
                     lambda: str(self.job(job_id)))  # fmt: skip

    def tier(self, name: str) -> Any:
        return next(t for t in self.operator.cluster().tiers if t.tier.spec.name == name)

    def keys(self, name: str) -> int:
        count: Any = redis.Redis.from_url(self.redis[name].url).dbsize()
        return int(count)

    def stop(self) -> None:
        for client in self.clients.values():
            client.close()
        self.operator.close()
        for daemon in (*self.nodes.values(), self.coordinator):
            if daemon.process is not None and daemon.process.poll() is None:
                daemon.process.kill()
                daemon.process.wait()
        for server in self.redis.values():
            server.stop()


def until(what: Callable[[], Any], timeout_s: float = 30, say: Callable[[], str] = str) -> Any:
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(StopIteration):
            found = what()
            if found:
                return found
        assert time.monotonic() < deadline, say()
        time.sleep(0.05)


def drain(tier: str, rate: int = 0) -> Any:
    return Spec(kind=coordinator_pb2.MOVE_KIND_DRAIN, tier=tier, rate_bytes_s=rate)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    try:
        made.fill()
        yield made
    finally:
        made.stop()


def test_every_page_keeps_its_number_through_migrate_drain_and_compact(cluster: Cluster) -> None:
    cluster.spread()
    before = cluster.keys("a")
    assert before > 0
    stop = threading.Event()
    done: list[int] = []

    def work(node: str) -> None:
        rng = np.random.default_rng(len(node))
        version = 2
        while not stop.is_set():
            first = int(rng.integers(0, SLOTS // 2))
            slots = np.arange(first, first + 16, dtype=np.uint64)
            cluster.store(node, slots, version)
            cluster.check(node, slots)
            done.append(len(slots) * 2)
            version += 1

    threads = [threading.Thread(target=work, args=(node,)) for node in cluster.nodes]
    for thread in threads:
        thread.start()
    job = cluster.run_job(drain("red-a", rate=4 * MIB))
    stop.set()
    for thread in threads:
        thread.join()
    assert job.pages_moved > 0
    assert sum(done) > 500
    assert cluster.keys("a") == 0
    assert cluster.tier("red-a").tier.state == common_pb2.TIER_STATE_DRAINED
    freed = np.arange(SLOTS // 2, SLOTS // 2 + 700, dtype=np.uint64)
    for node, client in cluster.clients.items():
        assert client.space("s").free(freed) == 700
        for slot in freed.tolist():
            del cluster.versions[node, slot]
    for tier in ("red-b", "disk"):
        cluster.run_job(
            Spec(kind=coordinator_pb2.MOVE_KIND_COMPACT, tier=tier, target_utilisation=0.95)
        )
    cluster.check_all()
    for client in cluster.clients.values():
        with pytest.raises(SlotNotFound):
            client.space("s").load(freed)
    cluster.operator.activate_tier("red-a")
    cluster.store("n1", np.arange(SLOTS, SLOTS + 500, dtype=np.uint64), 9)
    cluster.check_all()


def test_a_cancelled_drain_leaves_the_tier_active(cluster: Cluster) -> None:
    cluster.spread()
    job = cluster.operator.start_job(drain("red-a", rate=100_000))
    until(lambda: cluster.job(job.id).pages_moved > 0)
    assert cluster.tier("red-a").tier.state == common_pb2.TIER_STATE_DRAINING
    cluster.operator.cancel_job(job.id)
    assert cluster.wait_job(job.id, CANCELLED)
    assert cluster.tier("red-a").tier.state == common_pb2.TIER_STATE_ACTIVE
    assert cluster.keys("a") > 0
    cluster.check_all()
    cluster.run_job(drain("red-a"))
    assert cluster.keys("a") == 0
    cluster.check_all()


def test_a_drain_survives_a_kill_of_the_coordinator(cluster: Cluster) -> None:
    cluster.spread()
    job = cluster.operator.start_job(drain("red-a", rate=500_000))
    until(lambda: cluster.job(job.id).pages_moved > 0)
    cluster.coordinator.kill()
    cluster.store("n1", np.arange(100, dtype=np.uint64), 5)
    cluster.check("n1", np.arange(100, dtype=np.uint64))
    cluster.coordinator.start()
    cluster.wait_job(job.id, DONE)
    assert cluster.keys("a") == 0
    cluster.check_all()


def test_an_unreachable_node_keeps_the_drain_open_and_is_named(cluster: Cluster) -> None:
    cluster.spread()
    job = cluster.operator.start_job(drain("red-a", rate=200_000))
    until(lambda: cluster.job(job.id).pages_moved > 0)
    cluster.nodes["n2"].kill()
    open_ = until(lambda: (j := cluster.job(job.id)).state == BLOCKED and j)
    assert "n2" in open_.reason
    assert cluster.keys("a") > 0
    cluster.nodes["n2"].start()
    cluster.clients["n2"].close()
    cluster.clients["n2"] = Client(cluster.nodes["n2"].address)
    cluster.wait_job(job.id, DONE)
    assert cluster.keys("a") == 0
    cluster.check_all()


def test_a_drain_that_cannot_fit_is_refused_with_figures(cluster: Cluster) -> None:
    for tier in ("red-b", "disk"):
        cluster.operator.set_tier(tier, capacity_bytes=1 * MIB)
    with pytest.raises(OutOfTiers) as refused:
        cluster.operator.start_job(drain("red-a"))
    assert refused.value.fields["need"] > sum(refused.value.fields["room"].values())
    assert "MiB" in refused.value.message
    assert cluster.tier("red-a").tier.state == common_pb2.TIER_STATE_ACTIVE
    assert not cluster.operator.jobs()


def test_the_data_plane_does_not_miss_the_coordinator(cluster: Cluster) -> None:
    cluster.coordinator.kill()
    moved = cluster.clients["n1"].status().counters["evacuated_pages"]
    deadline = time.monotonic() + 5 * LEASE_S
    version = 2
    while time.monotonic() < deadline:
        for node in cluster.nodes:
            first = version * 400 % (SLOTS - 400)
            slots = np.arange(first, first + 400, dtype=np.uint64)
            cluster.store(node, slots, version)
            cluster.check(node, slots)
            cluster.clients[node].space("s").free(slots[:50])
            for slot in slots[:50].tolist():
                del cluster.versions[node, slot]
        version += 1
    status = cluster.clients["n1"].status()
    assert status.coordinator == "absent"
    assert status.counters["evacuated_pages"] > moved
    cluster.coordinator.start()
    until(lambda: all(node.state == "connected" for node in cluster.operator.cluster().nodes))
    cluster.check_all()
    until(lambda: cluster.clients["n1"].status().coordinator == "connected")
    cluster.store("n1", np.arange(SLOTS, SLOTS + 2000, dtype=np.uint64)[:1000], 7)
    cluster.check_all()


@pytest.mark.parametrize("tier", ["red-a", "disk"])
def test_compaction_brings_a_tier_from_40_to_85_percent(cluster: Cluster, tier: str) -> None:
    if tier == "disk":
        cluster.run_job(
            Spec(kind=coordinator_pb2.MOVE_KIND_MIGRATE, tier="red-a", destination="disk")
        )

    def listed() -> int:
        if tier == "disk":
            files = (cluster.root / "disk").rglob("*")
            return sum(path.stat().st_size for path in files if path.is_file())
        server: Any = redis.Redis.from_url(cluster.redis["a"].url)
        return sum(server.strlen(key) for key in server.keys("vswap/*"))

    def used() -> int:
        if tier == "disk":
            return listed()
        info: Any = redis.Redis.from_url(cluster.redis["a"].url).info("memory")
        return int(info["used_memory"])

    empty_redis = EmbeddedRedis().start()
    base: Any = redis.Redis.from_url(empty_redis.url).info("memory")
    empty_redis.stop()

    def live() -> int:
        return int(cluster.tier(tier).usage.live_bytes)

    time.sleep(2 * LEASE_S)
    rng = np.random.default_rng(0)
    for node, client in cluster.clients.items():
        space = client.space("s")
        places = space.locate(np.arange(SLOTS))
        there = np.array([i for i, place in enumerate(places) if place == tier], np.uint64)
        gone = rng.permutation(there)[: int(len(there) * 0.62)]
        space.free(gone)
        for slot in gone.tolist():
            del cluster.versions[node, slot]
    time.sleep(LEASE_S)
    assert live() / listed() < 0.45
    cluster.run_job(Spec(kind=coordinator_pb2.MOVE_KIND_COMPACT, tier=tier))
    time.sleep(LEASE_S)
    assert live() / listed() >= 0.85
    overhead = int(base["used_memory"]) if tier != "disk" else 0
    assert used() - overhead <= live() / 0.85 * 1.05
    cluster.check_all()


def test_a_node_retires_for_good(cluster: Cluster) -> None:
    cluster.spread()
    client, node, other = cluster.clients["n1"], cluster.nodes["n1"], cluster.nodes["n2"]
    shards = {info.name: info.shard_uuid for info in cluster.operator.cluster().nodes}

    def left_behind() -> list[str]:
        server: list[Any] = [redis.Redis.from_url(each.url) for each in cluster.redis.values()]
        keys = [key.decode() for each in server for key in each.keys("vswap/*")]
        files = [str(path) for path in (cluster.root / "disk").rglob("*") if path.is_file()]
        return [name for name in [*keys, *files] if shards["n1"] in name]

    def leave() -> Any:
        return run_vswap("node", "leave", "n1", coordinator=cluster.coordinator_address)

    client.create_space("t").store([7], page(7, 1)[None])
    refused = leave()
    assert refused.returncode == exits.REFUSED
    assert f"{SLOTS + 1} pages (s {SLOTS} pages in " in refused.stderr
    assert "t 1 pages in " in refused.stderr
    cluster.check("n1", np.arange(SLOTS, dtype=np.uint64)[:500])
    assert left_behind()

    client.delete_space("s")
    client.space("t").free([7])
    cluster.coordinator.kill()
    until(lambda: client.status().coordinator == "absent")
    refused = leave_directly(node)
    assert refused.returncode == exits.REFUSED
    assert "while the coordinator is away" in refused.stderr
    client.space("t").store([7], page(7, 2)[None])
    client.space("t").free([7])
    cluster.coordinator.start()
    until(lambda: client.status().coordinator == "connected")

    done = leave()
    assert done.returncode == 0, done.stderr
    assert "n1 has left" in done.stdout
    assert node.wait() == 0
    assert [info.name for info in cluster.operator.cluster().nodes] == ["n2"]
    assert not left_behind()
    assert not (node.state / "shard").exists()
    # What others have stays, and the name and the state directory are free for a new node.
    cluster.versions = {key: value for key, value in cluster.versions.items() if key[0] == "n2"}
    cluster.check("n2", np.arange(SLOTS, dtype=np.uint64)[:500])
    node.start()
    until(lambda: len(cluster.operator.cluster().nodes) == 2)
    assert shards["n1"] not in {info.shard_uuid for info in cluster.operator.cluster().nodes}
    assert other.process is not None
    assert other.process.poll() is None


def leave_directly(node: Daemon) -> Any:
    return run_vswap("node", "leave", "--node-address", node.address)
