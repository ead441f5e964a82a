"""Fault plans as a feature: of a running node, and for the time of a load run."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from client_support import run_vswap
from processes import Daemon
from shards import pages

from vswap.cli import exits
from vswap.client import Client
from vswap.wire.errors import PageCorrupt, Refused, UnknownTier, VswapError

CONFIG = """
[[tiers]]
name = "ram"
url = "ram://"
capacity_bytes = 8388608
rank = 0

[[tiers]]
name = "disk"
url = "file://{root}/disk"
capacity_bytes = 268435456
rank = 1

[[tiers]]
name = "pair"
urls = ["file://{root}/one", "file://{root}/two"]
redundancy = "mirror:2"
capacity_bytes = 268435456
rank = 2

[[spaces]]
name = "far"
tiers = ["disk"]

[[spaces]]
name = "pair"
tiers = ["pair"]
"""
WHERE = np.arange(64, dtype=np.uint64)


def make(root: Path, *flags: str) -> Daemon:
    file = root / "node.toml"
    file.write_text(CONFIG.format(root=root))
    return Daemon("node", root / "state", "--name", "n", "--config", str(file), *flags)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Daemon]:
    with make(tmp_path, "--fault", "disk=seed=3,flip=1") as daemon:
        yield daemon


def vswap(node: Daemon, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_vswap(*arguments, "--node-address", node.address)


def test_a_plan_from_the_start_is_shown_and_can_be_taken_away(node: Daemon) -> None:
    with Client(node.address, retry_s=0) as client:
        far = client.space("far")
        far.store(WHERE, pages(WHERE, 1))
        with pytest.raises(PageCorrupt):
            far.load(WHERE)
        shown = vswap(node, "node", "show", "n").stdout
        assert "FAULTS ARE INJECTED into tier disk: seed=3,flip=1" in shown
        assert "disk_injected_flip" in shown
        off = vswap(node, "node", "fault", "n", "disk", "off")
        assert "disk on n: off (before: seed=3,flip=1)" in off.stdout
        assert (far.load(WHERE) == pages(WHERE, 1)).all()
        assert "FAULTS" not in vswap(node, "node", "show", "n").stdout
        wrong = vswap(node, "node", "fault", "n", "disk", "flop=1")
        assert wrong.returncode == exits.USAGE
        assert "flop" in wrong.stderr
        with pytest.raises(Refused, match="RAM"):
            client.set_fault("ram", "flip=1")
        with pytest.raises(UnknownTier):
            client.set_fault("tape", "flip=1")


def test_one_server_of_several_lies(tmp_path: Path) -> None:
    flags = "--fault", "pair/1=seed=3,flip=1", "--allow-faults"
    with make(tmp_path, *flags) as node, Client(node.address, retry_s=0) as client:
        pair = client.space("pair")
        # Segments are read from either server in turn.
        for version in range(4):
            pair.store(WHERE, pages(WHERE, version))
            assert (pair.load(WHERE) == pages(WHERE, version)).all()
        shown = vswap(node, "node", "show", "n").stdout
        assert "FAULTS ARE INJECTED into tier pair/1: seed=3,flip=1" in shown
        vswap(node, "node", "fault", "n", "pair/1", "off")
        # What it acknowledged and did not keep, the other server has.
        vswap(node, "node", "fault", "n", "pair/2", "vanish=1")
        for version in range(4, 8):
            pair.store(WHERE, pages(WHERE, version))
            assert (pair.load(WHERE) == pages(WHERE, version)).all()
        counters = client.status().counters
        assert counters["pair/1_injected_flip"]
        assert counters["pair/2_injected_vanish"]
        client.set_fault("pair/2", "off")
        load = run_vswap(
            "loadgen", "--node-address", node.address, "--space", "pair", "--pages", "256",
            "--ops", "1000", "--fault", "pair/2=flip=0.5,error=0.2", "--content", "random",
        )  # fmt: skip
        assert "0 wrong, 0 lost" in load.stderr
        assert not client.status().faults
        with pytest.raises(Refused, match="2 servers"):
            client.set_fault("pair/3", "flip=1")
        with pytest.raises(Refused, match="no servers"):
            client.set_fault("disk/1", "flip=1")


def test_a_node_that_is_not_for_tests_refuses(tmp_path: Path) -> None:
    with make(tmp_path) as node, Client(node.address) as client:
        assert not client.status().faults_allowed
        refused = vswap(node, "node", "fault", "n", "disk", "flip=1")
        assert refused.returncode == exits.REFUSED
        assert "--allow-faults" in refused.stderr


def test_load_with_faults_restores_what_was_there(tmp_path: Path) -> None:
    with make(tmp_path, "--allow-faults") as node, Client(node.address) as client:
        load = [
            "loadgen", "--node-address", node.address, "--space", "far", "--pages", "512",
            "--fault", "disk=seed=1,delay=0.2,delay_ms=1,lost=0.02", "--no-read-back",
            "--content", "random",
        ]  # fmt: skip
        done = run_vswap(*load, "--ops", "2000")
        assert "faults are injected into tier disk" in done.stderr
        assert "0 wrong, 0 lost" in done.stderr
        assert not client.status().faults
        assert client.status().counters["disk_injected_delay"]
        client.set_fault("disk", "delay=0.5,delay_ms=1")
        for number in (signal.SIGINT, signal.SIGTERM):
            run = subprocess.Popen(
                [sys.executable, "-m", "vswap.cli.main", *load, "--seconds", "600"],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            try:
                deadline = time.monotonic() + 60
                while "lost" not in client.status().faults["disk"]:
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
                run.send_signal(number)
                assert run.wait(60) != 0
            finally:
                run.kill()
                run.wait()
            assert dict(client.status().faults) == {"disk": "delay=0.5,delay_ms=1"}


@pytest.mark.parametrize(
    ("plan", "word"),
    [
        ("ram=flip=1", "RAM"),
        ("tape=flip=1", "tape"),
        ("disk=flop=1", "flop"),
        ("disk", "TIER=PLAN"),
        ("disk/1=flip=1", "disk/1"),
        ("pair/3=flip=1", "pair/3"),
        ("pair/x=flip=1", "pair/x"),
    ],
)
def test_a_plan_that_makes_no_sense_keeps_the_node_from_starting(
    tmp_path: Path, plan: str, word: str
) -> None:
    daemon = make(tmp_path, "--fault", plan)
    with pytest.raises(AssertionError):
        daemon.start()
    assert word in daemon.output


def test_never_wrong_bytes_under_every_fault_at_once(node: Daemon) -> None:
    with Client(node.address, retry_s=0) as client:
        far = client.space("far")
        client.set_fault("disk", "off")
        far.store(WHERE, pages(WHERE, 1))
        client.set_fault("disk", "seed=9,error=0.1,lost=0.1,flip=0.2,short=0.1,stale=0.2,swap=0.2")
        right = 0
        for slot in np.tile(WHERE, 8).tolist():
            try:
                loaded = far.load([slot])
            except VswapError:
                continue
            assert (loaded == pages(np.array([slot], np.uint64), 1)).all()
            right += 1
        assert right
