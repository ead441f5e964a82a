"""`vswap check` against a node process and a Redis server."""

from __future__ import annotations

import json
import threading
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
from vswap.client import Client
from vswap.wire.errors import VswapError

MIB = 2**20
SLOTS = 3000

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
    """A coordinator, a Redis server, and a node most of whose pages lie there."""

    def __init__(self, root: Path) -> None:
        self.redis = EmbeddedRedis(maxmemory_bytes=100 * MIB, port=free_port()).start()
        self.keys: Any = redis.Redis.from_url(self.redis.url)
        self.address = f"127.0.0.1:{free_port()}"
        self.coordinator = Daemon(
            "coordinator", root / "coordinator", "--listen", self.address
        ).start()
        self.vswap("tier", "add", "red", self.redis.url, "--capacity", "60MiB", "--timeout", "1s")
        (root / "n.toml").write_text(CONFIG)
        self.node = Daemon(
            "node", root / "n", "--name", "n", "--config", str(root / "n.toml"),
            "--coordinator", self.address,
        ).start()  # fmt: skip
        with Client(self.node.address) as client:
            space = client.space("s")
            for start in range(0, SLOTS, 200):
                slots = np.arange(start, start + 200, dtype=np.uint64)
                space.store(slots, pages(slots, 1))

    def vswap(self, *words: str, code: int = 0) -> str:
        done = run_vswap(*words, coordinator=self.address)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    def stop(self) -> None:
        self.keys.close()
        for daemon in (self.node, self.coordinator):
            daemon.kill()
        self.redis.stop()


def until(what: Callable[[], Any], timeout_s: float = 30) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    try:
        yield made
    finally:
        made.stop()


def test_what_differs_is_shown_and_is_an_exit_code(site: Site) -> None:
    assert "no difference" in site.vswap("check", "n", "--deep")
    told = json.loads(site.vswap("check", "--node-address", site.node.address, "--json"))
    assert told["slots"] == SLOTS
    assert told["listed"] > 0
    assert (told["found"], told["differences"], told["skipped"]) == (0, [], [])
    before = {key: site.keys.get(key) for key in site.keys.keys("vswap/*")}
    with Client(site.node.address) as client:
        client.space("s").free(np.arange(SLOTS // 2, dtype=np.uint64))
    # One that was deleted comes back, as a late write does; one that is in use is gone.
    late = until(lambda: next((key for key in before if not site.keys.exists(key)), None))
    site.keys.set(late, before[late])
    gone = next(key for key in site.keys.keys("vswap/*") if key != late)
    site.keys.delete(gone)
    told = json.loads(site.vswap("check", "n", "--json", code=5))
    serials = {kind: int(key[-16:], 16) for kind, key in (("stray", late), ("missing", gone))}
    found = {item["kind"]: item for item in told["differences"]}
    assert found.keys() == serials.keys()
    for kind, serial in serials.items():
        assert found[kind]["where"] == "red"
        assert f"segment {serial:x} of" in found[kind]["detail"]
    shown = site.vswap("check", "n", code=5)
    assert "2 differences" in shown
    assert "missing" in shown


def test_a_node_that_was_killed_under_load_agrees_with_itself(site: Site) -> None:
    for kill in range(3):
        ended = threading.Event()

        def load(seed: int = kill, ended: threading.Event = ended) -> None:
            rng = np.random.default_rng(seed)
            with Client(site.node.address, retry_s=0) as client:
                while not ended.is_set():
                    slots = np.unique(rng.integers(0, SLOTS, 100)).astype(np.uint64)
                    try:
                        client.space("s").store(slots, pages(slots, 2))
                        client.space("s").free(slots[::3])
                    except VswapError:
                        return

        thread = threading.Thread(target=load)
        thread.start()
        assert "no difference" in site.vswap("check", "n", "--deep")
        site.node.kill()
        ended.set()
        thread.join()
        site.node.start()
        assert "no difference" in site.vswap("check", "--node-address", site.node.address, "--deep")


def test_a_server_that_is_away_is_not_compared(site: Site) -> None:
    site.redis.stop()
    assert "not compared: red" in site.vswap("check", "n", code=4)


@pytest.mark.parametrize("command", ["check", "scrub"])
def test_every_node_is_asked_and_a_dead_one_hides_nothing(
    site: Site, tmp_path: Path, command: str
) -> None:
    other = Daemon(
        "node", tmp_path / "a", "--name", "a", "--config", str(tmp_path / "n.toml"),
        "--coordinator", site.address,
    ).start()  # fmt: skip
    try:
        told = json.loads(site.vswap(command, "--all", "--json"))
        assert [(each["node"], each["done"]) for each in told] == [("a", True), ("n", True)]
        assert told[1]["segments"] > 0
        other.kill()
        told = json.loads(site.vswap(command, "--all", "--json", code=4))
        assert [each["node"] for each in told] == ["n", "a"]
        assert told[0]["done"]
        assert told[1]["error"]
        site.keys.delete(*site.keys.keys("vswap/*"))
        site.vswap(command, "--all", code=5)
    finally:
        other.kill()
    site.vswap(command, "n", "--all", code=2)
