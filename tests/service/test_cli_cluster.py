"""The command against real daemons: a coordinator, a node, a Redis server and a directory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from client_support import run_vswap

from vswap.cli import exits
from vswap.cli.demo.processes import Daemon
from vswap.cli.embedded import EmbeddedRedis
from vswap.client import AsyncClient, Client
from vswap.wire.errors import SlotNotFound

PAGES = 6000
VSWAP = [sys.executable, "-m", "vswap.cli.main"]


class Small:
    """A coordinator, a node with 8 MiB of RAM, and shared tiers "red" and "disk"."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.lock_fd = os.open(directory, os.O_RDONLY)
        self.redis = EmbeddedRedis(directory=directory).start()
        self.coordinator = self.daemon(
            "coordinator", "--listen", "127.0.0.1:0", "--state", f"{directory}/c"
        )
        self.address = self.coordinator.address(directory / "c" / "address")
        self.vswap("tier", "add", "red", self.redis.url, "--capacity", "100M", "--rank", "20")
        self.vswap(
            "tier", "add", "disk", f"file://{directory}/disk", "--capacity", "100M", "--rank", "30"
        )
        config = directory / "node.toml"
        config.write_text(
            'name = "n1"\nlisten = "127.0.0.1:0"\n'
            f'coordinator = "{self.address}"\nstate_dir = "{directory}/n1"\n'
            '[[tiers]]\nname = "ram"\nurl = "ram://"\ncapacity_bytes = 8388608\nrank = 0\n'
            '[[spaces]]\nname = "default"\n'
        )
        self.node = self.daemon("node", "--config", str(config))
        self.node_address = self.node.address(directory / "n1" / "address")

    def daemon(self, kind: str, *arguments: str) -> Daemon:
        log = self.directory / f"{kind}.log"
        return Daemon(kind, ["run", kind, *arguments], log, self.lock_fd, outlives=False)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return run_vswap(*arguments, coordinator=self.address)

    def vswap(self, *arguments: str) -> str:
        done = self.run(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def json(self, *arguments: str) -> Any:
        return json.loads(self.vswap(*arguments, "--json"))

    def tier(self, name: str) -> Any:
        return next(t for t in self.json("tier", "list") if t["tier"]["spec"]["name"] == name)

    def settled(self, name: str) -> Any:
        """The tier as the coordinator sees it, once reports have caught up with the node."""
        until_s = time.monotonic() + 20
        while time.monotonic() < until_s:
            info = self.tier(name)
            shown = self.json("node", "show", "n1")
            own = next(t for t in shown["tiers"] if t["tier"] == name)
            if info["usage"]["pages"] == own["pages"] > 0:
                return info
            time.sleep(0.1)
        raise AssertionError(f"{name}: {info['usage']} against {own}")

    def refused(self, code: int, *arguments: str) -> str:
        done = self.run(*arguments)
        assert done.returncode == code, (done.stdout, done.stderr)
        assert len(done.stderr.splitlines()) == 1
        return done.stderr

    def stop(self) -> None:
        for daemon in (self.node, self.coordinator):
            daemon.terminate()
            daemon.wait()
        self.redis.stop()
        os.close(self.lock_fd)


@pytest.fixture(scope="module")
def small() -> Iterator[Small]:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="vswap-test-") as directory:
        cluster = Small(Path(directory))
        try:
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture(scope="module")
def pages(small: Small) -> dict[int, bytes]:
    """Pages that half compress, more than the node's RAM holds, by slot."""
    rng = np.random.default_rng(1)
    array = rng.integers(0, 256, (PAGES, 4096), dtype=np.uint8)
    array[:, 2048:] = 7
    with Client(small.node_address) as client:
        space = client.space()
        for start in range(0, PAGES, 500):
            space.store(range(start, start + 500), array[start : start + 500])
    return {slot: array[slot].tobytes() for slot in range(PAGES)}


@pytest.fixture
def whole(small: Small, pages: dict[int, bytes]) -> Iterator[None]:
    """Whatever the test does, every page is still there afterwards."""
    yield
    with Client(small.node_address) as client:
        space = client.space()
        for start in range(0, PAGES, 1000):
            loaded = space.load(range(start, start + 1000))
            for slot, page in zip(range(start, start + 1000), loaded, strict=True):
                assert page.tobytes() == pages[slot]


def test_lists_and_their_json(small: Small, pages: dict[int, bytes]) -> None:
    assert [node["name"] for node in small.json("node", "list")] == ["n1"]
    assert small.json("node", "show", "n1")["coordinator"] == "connected"
    tier = small.settled("red")
    assert tier["tier"]["spec"]["capacity_bytes"] == 100 << 20
    assert tier["tier"]["state"] == "active"
    assert tier["usage"]["pages"] > 0
    status = small.json("status")
    assert status["cluster"]["nodes"][0]["pages"] == PAGES
    assert status["jobs"] == []
    text = small.vswap("status")
    for word in ("n1", "connected", "ram", "red", "disk", "fill"):
        assert word in text
    assert small.json("space", "list")[0]["pages"] == PAGES
    assert "red" in small.vswap("tier", "list")


def test_tiers_can_be_changed_and_refuse_nonsense(small: Small) -> None:
    changed = small.json(
        "tier", "set", "disk", "--capacity", "200M", "--high", "0.8", "--low", "0.5"
    )
    assert changed["spec"]["capacity_bytes"] == 200 << 20
    assert changed["spec"]["rank"] == 30
    assert "nope" in small.refused(exits.USAGE, "tier", "set", "nope", "--rank", "1")
    assert "nope" in small.refused(exits.USAGE, "drain", "nope")
    assert "red" in small.refused(exits.REFUSED, "tier", "add", "red", small.redis.url)
    small.refused(exits.UNREACHABLE, "tier", "add", "dead", "redis://127.0.0.1:1")
    small.refused(exits.USAGE, "tier", "add", "odd", "gopher://x")
    small.refused(exits.REFUSED, "tier", "remove", "red")
    small.refused(exits.USAGE, "job", "show", "none")
    small.refused(exits.USAGE, "node", "forget", "none", "--yes")
    small.refused(exits.REFUSED, "node", "forget", "n1", "--yes")


def test_a_dry_run_changes_nothing(small: Small, pages: dict[int, bytes], whole: None) -> None:
    generation = small.json("status")["cluster"]["generation"]
    plan = small.json("drain", "red", "--dry-run")
    assert plan["state"] == "planned"
    assert plan["room_bytes"]["disk"] > 0
    usage = small.tier("red")["usage"]
    assert (plan["pages_left"], plan["bytes_left"]) == (usage["pages"], usage["live_bytes"])
    assert plan["pages_left"] > 0
    assert "nothing was changed" in small.vswap("drain", "red", "--dry-run")
    assert small.tier("red")["tier"]["state"] == "active"
    assert small.json("status")["cluster"]["generation"] == generation
    assert small.json("job", "list", "--all") == []


def test_ctrl_c_leaves_the_drain_running(
    small: Small, pages: dict[int, bytes], whole: None
) -> None:
    process = subprocess.Popen(
        [*VSWAP, "drain", "red", "--rate", "1MiB/s"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "VSWAP_COORDINATOR": small.address},
    )
    assert process.stderr is not None
    assert "drain red" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == exits.INTERRUPTED, said
    jobs = small.json("job", "list")
    assert [job["state"] for job in jobs] == ["running"]
    assert f"vswap job cancel {jobs[0]['id']}" in said
    assert small.tier("red")["tier"]["state"] == "draining"
    small.refused(exits.REFUSED, "drain", "red")
    assert small.json("job", "cancel", jobs[0]["id"])["state"] == "cancelled"
    assert small.tier("red")["tier"]["state"] == "active"
    assert small.json("job", "list") == []


def test_migrate_and_compact(small: Small, pages: dict[int, bytes], whole: None) -> None:
    job = small.json("migrate", "--from", "red", "--to", "disk", "--bytes", "2MiB")
    assert job["state"] == "done"
    assert job["bytes_moved"] >= 1 << 20
    assert job["bytes_moved"] < 4 << 20
    job = small.json("migrate", "--from", "disk", "--to", "red", "--bytes", "1MiB")
    assert job["pages_moved"] > 0
    assert small.json("compact", "disk")["state"] == "done"


def test_drain_to_the_end_and_activate(small: Small, pages: dict[int, bytes], whole: None) -> None:
    detached = small.json("drain", "red", "--detach")
    watched = small.run("job", "watch", detached["id"], "--json")
    assert watched.returncode == 0, watched.stderr
    assert json.loads(watched.stdout)["state"] == "done"
    assert small.tier("red")["tier"]["state"] == "drained"
    assert json.loads(small.run("job", "show", detached["id"], "--json").stdout)["state"] == "done"
    assert "done" in small.vswap("job", "list", "--all")
    assert small.json("activate", "red")["state"] == "active"


def test_a_drain_without_room_is_refused_with_the_figures(
    small: Small, pages: dict[int, bytes], whole: None
) -> None:
    small.vswap("migrate", "--from", "disk", "--to", "red")
    small.vswap("tier", "set", "disk", "--capacity", "1M")
    small.settled("red")
    said = small.refused(exits.REFUSED, "drain", "red")
    assert "disk" in said
    assert small.tier("red")["tier"]["state"] == "active"
    small.vswap("tier", "set", "disk", "--capacity", "200M")


def test_a_second_node_of_the_name_is_refused(small: Small) -> None:
    command = [
        *VSWAP, "run", "node", "--name", "n1", "--listen", "127.0.0.1:0",
        "--coordinator", small.address, "--state", f"{small.directory}/other",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == exits.REFUSED
    assert "n1" in done.stderr


def test_loadgen_finds_the_nodes_by_itself(small: Small) -> None:
    done = small.run(
        "loadgen", "--pages", "1000", "--ops", "3000", "--first-slot", "100000", "--content",
        "random", "--free", "--json", "-",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["wrong_pages"] == result["failed_ops"] == 0
    assert {"ram", "red", "disk", "fill"} <= set(result["tiers"])


async def test_both_clients_against_a_real_node(small: Small) -> None:
    slots = np.arange(500_000, 500_064, dtype=np.uint64)
    pages = np.random.default_rng(2).integers(0, 256, (64, 4096), dtype=np.uint8)
    pages[::4] = 9
    async with AsyncClient(small.node_address) as client:
        space = await client.space()
        await space.store(slots, pages)
        assert (await space.load(slots[::-1]) == pages[::-1]).all()
        assert set((await space.locate(slots))[::4]) == {"fill"}
        with Client(small.node_address) as other:
            mine = other.space()
            loaded = mine.load_exclusive(slots)
            assert (loaded.pages == pages).all()
            await space.store(slots[:4], pages[4:8])
            assert loaded.confirm() == 60
        assert (await space.load(slots[:4]) == pages[4:8]).all()
        with pytest.raises(SlotNotFound):
            await space.load(slots[4:])
        assert await space.free(slots) == 4
