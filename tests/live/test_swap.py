"""A real kernel swaps on vswap, while tiers are drained and compacted and the node is killed
or replaced by a newer build.

Through nbdfuse and a loop device where the kernel has no nbd driver, as on most test machines (for
the driver see test_guest_driver.py). The memory pressure is confined to a control group; swap is
off and everything detached at the end, whatever happens.
"""

from __future__ import annotations

import importlib.metadata
import json
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import redis
from processes import Daemon
from swapping import HOG_MIB, LIMIT_MIB, MIB, Hog, build, swapped_in

from vswap.cli.device import machine
from vswap.cli.device.checks import locked_bytes
from vswap.cli.device.memory_group import MemoryGroup, may_be_swapped
from vswap.cli.embedded import EmbeddedRedis, free_port
from vswap.client import Client
from vswap.client.operator import Operator
from vswap.v1 import common_pb2, coordinator_pb2

pytestmark = [pytest.mark.live, pytest.mark.timeout(600)]

VSWAP = [sys.executable, "-m", "vswap.cli.main"]
NODE = f"swaptest{os.getpid()}"
"""Attachments are the machine's: another run of these tests has other names."""
ATTACHMENT = f"swap@{NODE}"


def vswap(*arguments: str, timeout_s: float = 120) -> str:
    done = subprocess.run(
        [*VSWAP, *arguments], capture_output=True, text=True, check=False, timeout=timeout_s
    )
    assert done.returncode == 0, f"vswap {' '.join(arguments)}: {done.stdout}{done.stderr}"
    return done.stdout


class Cluster:
    """A coordinator, a node with little RAM, two Redis servers and a directory of objects."""

    def __init__(self, root: Path) -> None:
        self._close = ExitStack()
        try:
            self._start(root)
        except BaseException:
            self.close()
            raise

    def _start(self, root: Path) -> None:
        self.redis = {
            name: self._close.enter_context(EmbeddedRedis(maxmemory_bytes=200 * MIB))
            for name in "ab"
        }
        listen = f"127.0.0.1:{free_port()}"
        self.coordinator = self._close.enter_context(
            Daemon("coordinator", root / "coordinator", "--listen", listen)
        )
        self.operator = self._close.enter_context(Operator(listen))
        self.address = listen
        # red-a is small, so that pages lie in the next tier as well.
        for rank, (name, url, mib) in enumerate(
            (("red-a", self.redis["a"].url, 12), ("red-b", self.redis["b"].url, 100),
             ("disk", f"file://{root}/disk", 100)), 20,
        ):  # fmt: skip
            self.operator.add_tier(
                common_pb2.TierSpec(name=name, url=url, capacity_bytes=mib * MIB, rank=rank)
            )
        self.config = config = root / "node.toml"
        config.write_text(
            f'[[tiers]]\nname="ram"\nurl="ram://"\ncodec="zstd:1"\ncapacity_bytes={16 * MIB}\n'
            'rank=0\n[[spaces]]\nname="swap"\nmax_slots=131072\n'
        )
        # Short: the path of a unix socket has its limit.
        shm = Path(f"/dev/shm/vswap-swap-test-{os.getpid()}")
        shm.mkdir()
        self._close.callback(shm.rmdir)
        self._close.callback(lambda: subprocess.run(["umount", shm], check=True))
        # Between two lives of the node nobody locks its pages. Linux before 6.4 does not know how.
        mount = ["mount", "-t", "tmpfs", "-o"]
        if subprocess.run([*mount, "mode=700,noswap", "vswap", shm], check=False).returncode:
            subprocess.run([*mount, "mode=700", "vswap", shm], check=True)
        self.state = shm / "n"
        self.node = self._close.enter_context(
            Daemon(
                "node", self.state, "--name", NODE, "--config", str(config),
                "--coordinator", listen, "--swap-safe",
            )
        )  # fmt: skip
        self.client = self._close.enter_context(Client(self.node.address))

    def revive(self) -> None:
        """What is still on it can only come back from a node that lives."""
        if self.node.process is None or self.node.process.poll() is not None:
            self.node.start()

    def tier_pages(self) -> dict[str, int]:
        return {usage.tier: usage.pages for usage in self.client.status().tiers}

    def stored_bytes(self, tier: str) -> int:
        [stored] = [u.stored_bytes for u in self.client.status().tiers if u.tier == tier]
        return int(stored)

    def moved(self, kind: coordinator_pb2.MoveKind, tier: str) -> int:
        """Pages that jobs on request moved out of segments of a tier."""
        return sum(
            job.pages_moved for job in self.operator.jobs(ended=True)
            if job.spec.kind == kind and job.spec.tier == tier and not job.automatic
        )  # fmt: skip

    def close(self) -> None:
        self._close.close()


def assert_detached() -> None:
    assert ATTACHMENT not in Path("/proc/mounts").read_text()
    loops = subprocess.run(["losetup", "-l"], capture_output=True, text=True, check=True).stdout
    assert ATTACHMENT not in loops
    assert not Path(f"/run/vswap/attached/{ATTACHMENT}.json").exists()
    owners = [path.read_text() for path in Path("/sys/block").glob("nbd*/backend")]
    assert f"vswap {ATTACHMENT}\n" not in owners
    assert not MemoryGroup.at(f"vswap-device-{ATTACHMENT}").path.exists()


def detach() -> None:
    vswap("detach", "swap", "--node", NODE)
    assert_detached()


def detach_if_attached(cluster: Cluster) -> None:
    if not Path(f"/run/vswap/attached/{ATTACHMENT}.json").exists():
        return
    try:
        cluster.revive()
    finally:
        # Without the node it takes minutes, and ends all the same.
        vswap("detach", "swap", "--node", NODE, timeout_s=400)


def execute(cluster: Cluster, *program: str, memory: str = "64M") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*VSWAP, "exec", "--memory", memory, "--swap-space", "swap",
         "--node-address", cluster.node.address, "--", *program],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def swap_used_pages(device: str) -> int:
    lines = Path("/proc/swaps").read_text().splitlines()[1:]
    used_kib = {line.split()[0]: int(line.split()[3]) for line in lines}
    return used_kib[device] // 4


def kernel_log() -> str:
    return subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout


def wait_for(what: Callable[[], bool], timeout_s: float = 30) -> None:
    until_s = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < until_s
        time.sleep(0.05)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    assert os.geteuid() == 0, "a machine that swaps needs root"
    made = Cluster(tmp_path)
    with ExitStack() as last:
        last.callback(assert_detached)
        last.callback(made.close)
        last.callback(detach_if_attached, made)
        yield made


@pytest.fixture(scope="module")
def hog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("hog"))


def steps() -> list[dict[str, Any]]:
    return list(json.loads(Path(f"/run/vswap/attached/{ATTACHMENT}.json").read_text())["steps"])


def serving() -> list[int]:
    """What stands between the kernel and the node: the relay, and nbdfuse."""
    [pid] = [step["pid"] for step in steps() if step["kind"] in ("mount", "relay")]
    return [pid, *machine.children(pid)]


def attach(cluster: Cluster) -> str:
    return vswap(
        "attach", "swap", "--swap", "--priority", "100", "--node-address", cluster.node.address
    ).strip()


def test_a_kernel_swaps_while_tiers_are_drained_and_compacted(
    cluster: Cluster, hog: Path, tmp_path: Path
) -> None:
    device = attach(cluster)
    assert device in Path("/proc/swaps").read_text()
    for pid in serving():
        assert locked_bytes(pid) or not may_be_swapped(pid)
    before = swapped_in()
    with Hog(hog, tmp_path) as running:
        running.wait_for_passes(1)
        began_s = time.monotonic()
        running.wait_for_passes(2)
        pass_s = time.monotonic() - began_s
        spread = cluster.tier_pages()
        assert sum(pages > 0 for pages in spread.values()) >= 3, spread
        # Slowly: it is to take about as long as the hog takes for all of its memory.
        rate = f"{int(cluster.stored_bytes('red-a') / pass_s)}B"
        swapped = swapped_in()
        drained = vswap("drain", "red-a", "--rate", rate, "--coordinator", cluster.address,
                        timeout_s=240)  # fmt: skip
        assert swapped_in() - swapped > 1000, "next to nothing was swapped during the drain"
        assert cluster.moved(coordinator_pb2.MOVE_KIND_DRAIN, "red-a") > 0
        # Again and again, during a whole pass at least.
        passes, until_s = running.passes, time.monotonic() + 120
        compact = coordinator_pb2.MOVE_KIND_COMPACT
        while running.passes < passes + 2 or not cluster.moved(compact, "red-b"):
            assert time.monotonic() < until_s, (running.passes, cluster.operator.jobs(ended=True))
            vswap("compact", "red-b", "--coordinator", cluster.address)
        assert cluster.tier_pages()["red-a"] == 0, drained
        with redis.Redis.from_url(cluster.redis["a"].url) as server:
            assert server.dbsize() == 0
        running.wait_for_passes(running.passes + 2)
        used = swap_used_pages(device)
        told = running.finish()
    print(told, f"{swapped_in() - before} pages swapped in, {spread}")
    assert told.splitlines()[-1].endswith(" bad 0")
    assert swapped_in() - before > (HOG_MIB - LIMIT_MIB) * 256
    # The hog's memory was freed, so its slots were, while swap is still on. The kernel discards
    # whole clusters (512 slots): one page that stays in its swap cache keeps the others of its own.
    wait_for(lambda: cluster.client.status().pages - swap_used_pages(device) < used / 4)
    detach()
    assert cluster.client.status().pages == 0, "what was swapped means nothing any more"
    assert cluster.client.status().counters.get("corrupt_pages", 0) == 0


def test_a_node_that_is_killed_is_a_pause(cluster: Cluster, hog: Path, tmp_path: Path) -> None:
    device = attach(cluster)
    log = kernel_log()
    with Hog(hog, tmp_path) as running:
        running.wait_for_passes(1)
        for _ in range(2):
            time.sleep(0.7)
            cluster.node.kill()
            time.sleep(1.0)
            cluster.node.start()
        told = running.finish()
    assert told.splitlines()[-1].endswith(" bad 0"), told
    new = [line for line in kernel_log().splitlines() if line not in log]
    assert not [line for line in new if "error" in line and Path(device).name in line]
    detach()


class Pulse:
    """Reads blocks of a device past every cache, one after another; use as a context."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.slowest_s = 0.0
        self.reads = self.failed = 0

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        with mmap.mmap(-1, 4096) as page, ExitStack() as last:
            device = os.open(self._device, os.O_RDONLY | os.O_DIRECT)
            last.callback(os.close, device)
            while not self._over.wait(0.002):
                began = time.monotonic()
                try:
                    os.preadv(device, [page], self.reads % 64 * 4096)
                except OSError:
                    self.failed += 1
                self.slowest_s = max(self.slowest_s, time.monotonic() - began)
                self.reads += 1


def newer_build(root: Path) -> tuple[Path, str]:
    """A build of this source with a version of its own: (where it is installed, the version)."""
    source = Path(__file__).parents[2]
    copy, target = root / "source", root / "newer"
    for part in ("proto", "tiers", "node", "coordinator", "client"):
        shutil.copytree(source / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("README.md", "LICENSE"):
        shutil.copy(source / part, copy / part)
    text = (source / "pyproject.toml").read_text()
    version = f"{importlib.metadata.version('vswap')}.post1"
    text, count = re.subn('(?m)^version = ".*"$', f'version = "{version}"', text)
    assert count == 1
    (copy / "pyproject.toml").write_text(text)
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
         "--no-deps", "--target", target, copy],
        check=True,
    )  # fmt: skip
    return target, version


def test_a_newer_build_takes_over(cluster: Cluster, hog: Path, tmp_path: Path) -> None:
    """A rolling upgrade, and back again: SIGTERM, and the other build is started."""
    target, version = newer_build(tmp_path)
    device = attach(cluster)
    log = kernel_log()
    with Hog(hog, tmp_path) as running, Pulse(device) as pulse:
        running.wait_for_passes(1)
        for environ, runs in (
            ({"PYTHONPATH": str(target)}, version),
            ({}, importlib.metadata.version("vswap")),
        ):
            pulse.slowest_s = 0.0
            time.sleep(1)
            before_s = pulse.slowest_s
            began = time.monotonic()
            assert cluster.node.stop() == 0, cluster.node.output
            stopped = time.monotonic()
            cluster.node.environ = {**os.environ, **environ}
            cluster.node.start()
            started = time.monotonic()
            with Client(cluster.node.address) as client:
                assert client.status().version == runs
            running.wait_for_passes(running.passes + 1)
            print(
                f"to {runs}: stopped in {stopped - began:.2f} s, started in "
                f"{started - stopped:.2f} s; a read of the device waited {pulse.slowest_s:.2f} s "
                f"at most, {before_s:.2f} s before"
            )
        told = running.finish()
    assert told.splitlines()[-1].endswith(" bad 0"), told
    assert (pulse.failed, pulse.reads > 100) == (0, True)
    new = [line for line in kernel_log().splitlines() if line not in log]
    assert not [line for line in new if "error" in line and Path(device).name in line]
    detach()


def test_pages_that_are_gone_kill_and_never_read_as_zeros(
    cluster: Cluster, hog: Path, tmp_path: Path
) -> None:
    """As after a reboot of the node's machine: a node that answers, without the pages."""
    attach(cluster)
    with Hog(hog, tmp_path) as running:
        running.wait_for_passes(1)
        cluster.node.kill()
        shutil.rmtree(cluster.state)
        # A coordinator would not take it for the same; a node alone asks nobody.
        new = Daemon("node", cluster.state, "--name", NODE, "--config", str(cluster.config))
        with new:
            assert running.process.wait(60) == -signal.SIGBUS
            assert all(line.endswith(" bad 0") for line in running.told.splitlines())
            detach()


PROGRAM = """
import numpy as np
pages = 64 * 4 * 256
a = np.zeros((pages, 512), np.uint64)
seed = np.random.default_rng(1).integers(0, 2**63, 170, dtype=np.uint64)
a[:, :170] = seed
a[:, 511] = np.arange(pages)
bad = 0
for turn in range(2):
    for i in range(0, pages, 256):
        part = a[i : i + 256]
        bad += int((part[:, :170] != seed).any(axis=1).sum())
        bad += int((part[:, 511] != np.arange(i, i + len(part))).sum())
print("bad", bad)
raise SystemExit(bad != 0)
"""


def test_exec_gives_a_program_more_memory_than_it_may_have(cluster: Cluster) -> None:
    before = swapped_in()
    process = execute(cluster, sys.executable, "-c", PROGRAM)
    out, errors = process.communicate(timeout=240)
    assert (process.returncode, out) == (0, "bad 0\n"), errors
    assert swapped_in() - before > 3 * 64 * 256
    assert_detached()


def test_exec_passes_exit_codes_and_signals_on(cluster: Cluster) -> None:
    process = execute(cluster, "sh", "-c", "exit 7")
    process.communicate(timeout=60)
    assert process.returncode == 7
    for number in (signal.SIGTERM, signal.SIGINT):
        process = execute(cluster, "sh", "-c", "echo here; exec sleep 60")
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode == 128 + number
        assert_detached()
    process = execute(cluster, "/no/such/program")
    _, told = process.communicate(timeout=60)
    assert process.returncode == 127, told
    assert_detached()


def test_the_last_of_several_execs_detaches(cluster: Cluster) -> None:
    first = execute(cluster, "sh", "-c", "echo here; exec sleep 3")
    second = execute(cluster, "sh", "-c", "echo here; exec sleep 60")
    for process in (first, second):
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
    refused = subprocess.run(
        [*VSWAP, "detach", "swap", "--node", NODE], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 3, refused.stderr
    first.communicate(timeout=60)
    assert "swap" in {step["kind"] for step in steps()}
    second.terminate()
    second.communicate(timeout=60)
    assert_detached()


def test_a_full_cluster_spoils_nothing(cluster: Cluster, hog: Path, tmp_path: Path) -> None:
    """Writes meet ENOSPC: the kernel keeps the pages, and then kills what needs them."""
    for tier in ("red-b", "disk"):
        vswap("space", "set", "swap", "--tier-max", f"{tier}=0", "--node-address",
              cluster.node.address)  # fmt: skip
    (tmp_path / "stop").touch()
    began_s = time.monotonic()
    process = execute(cluster, str(hog), "256", str(tmp_path / "stop"), memory="40M")
    out, errors = process.communicate(timeout=200)
    print(process.returncode, out, errors, f"{time.monotonic() - began_s:.1f} s")
    assert process.returncode in (128 + signal.SIGKILL, 128 + signal.SIGBUS), (out, errors)
    assert all(line.endswith(" bad 0") for line in out.splitlines())
    assert_detached()


def test_attaching_twice_is_refused(cluster: Cluster) -> None:
    attach(cluster)
    again = subprocess.run(
        [*VSWAP, "attach", "swap", "--swap", "--node-address", cluster.node.address],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert again.returncode == 3
    assert "attached already" in again.stderr
    detach()


def test_what_a_killed_attach_left_is_undone(cluster: Cluster) -> None:
    """Killed at many moments: detach undoes it, and then it works. A polite end undoes itself."""
    for number in (signal.SIGKILL, signal.SIGTERM):
        for delay_s in (0.9, 1.05, 1.2, 1.35, 1.5):
            process = subprocess.Popen(
                [*VSWAP, "attach", "swap", "--swap", "--node-address", cluster.node.address],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            time.sleep(delay_s)
            process.send_signal(number)
            process.wait()
            if Path(f"/run/vswap/attached/{ATTACHMENT}.json").exists():
                whole = "swap" in {step["kind"] for step in steps()}
                assert number == signal.SIGKILL or whole, "half done, and not undone"
                vswap("detach", "swap", "--node", NODE)
            assert_detached()
    attach(cluster)
    detach()
