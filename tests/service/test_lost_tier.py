"""A tier that is gone without redundancy: its pages are lost, all others are not."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from client_support import run_vswap
from processes import Daemon
from shards import page

from vswap.cli.embedded import EmbeddedRedis, free_port
from vswap.client import Client
from vswap.client.operator import Operator
from vswap.wire.errors import PageLost, VswapError

MIB = 2**20
SLOTS = 4000


class Cluster:
    """A node with little RAM, a Redis server beside an object store for what does not fit."""

    def __init__(self, root: Path) -> None:
        self.redis = EmbeddedRedis(maxmemory_bytes=100 * MIB, port=free_port()).start()
        self.address = f"127.0.0.1:{free_port()}"
        self.coordinator = Daemon(
            "coordinator", root / "coordinator", "--listen", self.address, "--lease", "1s"
        ).start()
        self.operator = Operator(self.address)
        self.vswap("tier", "add", "red", self.redis.url, "--capacity", "4MiB", "--rank", "20",
                   "--timeout", "1s")  # fmt: skip
        self.vswap("tier", "add", "disk", f"file://{root}/disk", "--capacity", "60MiB",
                   "--rank", "30")  # fmt: skip
        config = root / "n.toml"
        config.write_text(
            '[[tiers]]\nname="ram"\nurl="ram://"\ncodec="none"\ncapacity_bytes=2097152\n'
            'rank=0\n[[spaces]]\nname="s"\n'
        )
        self.node = Daemon(
            "node", root / "n", "--name", "n", "--config", str(config),
            "--coordinator", self.address,
        ).start()  # fmt: skip
        self.client = Client(self.node.address, retry_s=0)
        for start in range(0, SLOTS, 200):
            slots = np.arange(start, start + 200, dtype=np.uint64)
            pages = np.stack([page(s, 1) for s in slots.tolist()])
            until(lambda slots=slots, pages=pages: self.stored(slots, pages))  # type: ignore[misc]
        until(lambda: self.usage("disk").pages and self.usage("red").pages)

    def stored(self, slots: Any, pages: Any) -> bool:
        try:
            self.client.space("s").store(slots, pages)
        except VswapError:
            return False
        return True

    def vswap(self, *words: str, code: int = 0) -> str:
        done = run_vswap(*words, coordinator=self.address)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def usage(self, tier: str) -> Any:
        return next(i.usage for i in self.operator.cluster().tiers if i.tier.spec.name == tier)

    def readable(self) -> tuple[int, set[int]]:
        """How many slots load as they were stored, and which are lost. Anything else fails."""
        good, lost = 0, set()
        for slot in range(SLOTS):
            try:
                [got] = self.client.space("s").load(np.array([slot], np.uint64))
            except PageLost as error:
                lost.update(error.fields["slots"])
            else:
                assert (got == page(slot, 1)).all()
                good += 1
        return good, lost

    def stop(self) -> None:
        self.client.close()
        self.operator.close()
        for daemon in (self.node, self.coordinator):
            if daemon.process is not None and daemon.process.poll() is None:
                daemon.process.kill()
                daemon.process.wait()
        self.redis.stop()


def until(what: Callable[[], object], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    try:
        yield made
    finally:
        made.stop()


@pytest.mark.timeout(300)
def test_a_dead_server_is_given_up_on_request(cluster: Cluster) -> None:
    held = cluster.usage("red").pages
    cluster.redis.stop()
    assert "could not be read" in cluster.vswap("scrub", "n", "--tier", "red", code=4)
    # Without a word of the operator nothing is given up.
    assert "--yes" in cluster.vswap("drain", "red", "--lost", code=3)
    told = cluster.vswap("drain", "red", "--lost", "--yes")
    good, lost = cluster.readable()
    assert 0 < len(lost) <= held
    assert good + len(lost) == SLOTS
    assert f"{len(lost):,} pages given up" in told
    until(lambda: cluster.usage("red").lost_pages == len(lost))
    assert f"{len(lost):,} pages are lost" in cluster.vswap("tier", "list")
    assert f"{len(lost):,} pages are lost" in cluster.vswap("status")
    [space] = json.loads(cluster.vswap("space", "list", "--node", "n", "--json"))
    assert space["unreadable_pages"] == len(lost)
    # They are known as lost after a kill too; a store or a free mends a slot.
    cluster.node.kill()
    cluster.node.start()
    cluster.client.close()
    cluster.client = Client(cluster.node.address)
    assert cluster.readable() == (good, lost)
    first, *rest = sorted(lost)
    cluster.client.space("s").store(np.array([first], np.uint64), page(first, 1)[None])
    cluster.client.space("s").free(np.array(rest, np.uint64))
    until(lambda: cluster.usage("red").lost_pages == 0)
    cluster.vswap("tier", "remove", "red")


def test_a_server_that_comes_back_empty_is_noticed_and_can_be_drained(cluster: Cluster) -> None:
    cluster.redis.stop(keep_directory=True)
    cluster.redis.start()
    # One load meets it; a listing then tells how much is missing.
    good, lost = cluster.readable()
    assert lost
    assert good + len(lost) == SLOTS
    until(lambda: cluster.usage("red").lost_pages == len(lost))
    assert "lost; loads of them fail" in cluster.vswap("scrub", "n", code=5)
    # A drain does not give up what it cannot read...
    cluster.vswap("drain", "red", "--detach")
    until(lambda: "n waits" in cluster.operator.jobs()[0].reason)
    [job] = cluster.operator.jobs()
    cluster.vswap("job", "cancel", job.id)
    # ...unless it is told to.
    cluster.vswap("drain", "red", "--lost", "--yes")
    assert cluster.readable() == (good, lost)
