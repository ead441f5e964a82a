"""A real kernel swaps on vswap, while tiers are drained and compacted and the node is killed.

Through nbdfuse and a loop device, since few test machines have the kernel's nbd driver. The memory
pressure is confined to a control group; swap is off and everything detached at the end, whatever
happens.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis
from processes import Daemon

from vswap.cli.device.memory_group import MemoryGroup
from vswap.cli.embedded import EmbeddedRedis, free_port
from vswap.client import Client
from vswap.client.operator import Operator
from vswap.v1 import common_pb2

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]

MIB = 2**20
VSWAP = [sys.executable, "-m", "vswap.cli.main"]
HOG_MIB, LIMIT_MIB = 128, 40


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
        config = root / "node.toml"
        config.write_text(
            f'[[tiers]]\nname="ram"\nurl="ram://"\ncodec="zstd:1"\ncapacity_bytes={16 * MIB}\n'
            'rank=0\n[[spaces]]\nname="swap"\nmax_slots=131072\n'
        )
        # Short: the path of a unix socket has its limit.
        self.state = Path(f"/dev/shm/vswap-swap-test-{os.getpid()}")
        self._close.callback(shutil.rmtree, self.state, ignore_errors=True)
        self._close.callback(self.state.with_suffix(".log").unlink, missing_ok=True)
        self.node = self._close.enter_context(
            Daemon(
                "node", self.state, "--name", "n1", "--config", str(config),
                "--coordinator", listen, "--swap-safe",
            )
        )  # fmt: skip
        self.client = self._close.enter_context(Client(self.node.address))

    def tier_pages(self) -> dict[str, int]:
        return {usage.tier: usage.pages for usage in self.client.status().tiers}

    def close(self) -> None:
        self._close.close()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    assert os.geteuid() == 0, "a machine that swaps needs root"
    made = Cluster(tmp_path)
    before = Path("/proc/swaps").read_text()
    try:
        yield made
    finally:
        subprocess.run([*VSWAP, "detach", "swap"], capture_output=True, check=False, timeout=240)
        made.close()
        assert Path("/proc/swaps").read_text() == before


@pytest.fixture(scope="module")
def hog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("hog") / "hog"
    source = Path(__file__).with_name("hog.c")
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-o", program, source], check=True)
    return program


class Hog:
    """The hog in a control group of its own; use as a context."""

    def __init__(self, program: Path, root: Path) -> None:
        self._stop = root / "stop"
        self._out = root / "hog.out"
        self._group = MemoryGroup.at(f"vswap-test-{os.getpid()}")
        self._program = program

    def __enter__(self) -> Hog:
        self._group.make(LIMIT_MIB * MIB)
        with open(self._out, "w") as out:
            self.process = subprocess.Popen(
                [str(self._program), str(HOG_MIB), str(self._stop)], stdout=out,
                preexec_fn=lambda: self._group.enter(os.getpid()),
            )  # fmt: skip
        return self

    @property
    def passes(self) -> int:
        return self._out.read_text().count("\n")

    def wait_for_passes(self, count: int, timeout_s: float = 120) -> None:
        until_s = time.monotonic() + timeout_s
        while self.passes < count:
            assert self.process.poll() is None, self._out.read_text()
            assert time.monotonic() < until_s, f"too slow: {self._out.read_text()}"
            time.sleep(0.05)

    def finish(self) -> str:
        self._stop.touch()
        assert self.process.wait(180) == 0, self._out.read_text()
        return self._out.read_text()

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._group.remove()


def swapped_in() -> int:
    for line in Path("/proc/vmstat").read_text().splitlines():
        if line.startswith("pswpin "):
            return int(line.split()[1])
    raise AssertionError("no pswpin in /proc/vmstat")


def attach(cluster: Cluster) -> str:
    return vswap(
        "attach", "swap", "--swap", "--priority", "100", "--node-address", cluster.node.address
    ).strip()


def test_a_kernel_swaps_while_tiers_are_drained_and_compacted(
    cluster: Cluster, hog: Path, tmp_path: Path
) -> None:
    device = attach(cluster)
    assert device in Path("/proc/swaps").read_text()
    before = swapped_in()
    with Hog(hog, tmp_path) as running:
        running.wait_for_passes(1)
        spread = cluster.tier_pages()
        assert sum(pages > 0 for pages in spread.values()) >= 3, spread
        passes = running.passes
        drained = vswap("drain", "red-a", "--coordinator", cluster.address)
        vswap("compact", "red-b", "--coordinator", cluster.address)
        assert running.process.poll() is None, "the hog was done before the drain"
        assert cluster.tier_pages()["red-a"] == 0, drained
        with redis.Redis.from_url(cluster.redis["a"].url) as server:
            assert server.dbsize() == 0
        running.wait_for_passes(passes + 2)
        told = running.finish()
    print(told, f"{swapped_in() - before} pages swapped in, {spread}")
    assert told.splitlines()[-1].endswith(" bad 0")
    assert swapped_in() - before > (HOG_MIB - LIMIT_MIB) * 256
    vswap("detach", "swap")
    assert device not in Path("/proc/swaps").read_text()
    assert cluster.client.status().pages == 0, "what was swapped means nothing any more"
    assert cluster.client.status().counters.get("corrupt_pages", 0) == 0


def test_a_node_that_is_killed_is_a_pause(cluster: Cluster, hog: Path, tmp_path: Path) -> None:
    attach(cluster)
    with Hog(hog, tmp_path) as running:
        running.wait_for_passes(1)
        for _ in range(2):
            time.sleep(0.7)
            cluster.node.kill()
            time.sleep(1.0)
            cluster.node.start()
        told = running.finish()
    assert told.splitlines()[-1].endswith(" bad 0"), told
    vswap("detach", "swap")


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
    out = vswap(
        "exec", "--memory", "64M", "--swap-space", "swap", "--node-address", cluster.node.address,
        "--", sys.executable, "-c", PROGRAM, timeout_s=240,
    )  # fmt: skip
    assert "bad 0" in out
    assert swapped_in() - before > 3 * 64 * 256
    assert "/dev/loop" not in Path("/proc/swaps").read_text()
    failed = subprocess.run(
        [*VSWAP, "exec", "--memory", "64M", "--swap-space", "swap",
         "--node-address", cluster.node.address, "--", "sh", "-c", "exit 7"],
        check=False, timeout=120,
    )  # fmt: skip
    assert failed.returncode == 7


def test_what_a_killed_attach_left_is_undone(cluster: Cluster) -> None:
    """Killed at many moments: detach undoes it, and then it works."""
    for delay_s in (0.9, 1.05, 1.2, 1.35, 1.5):
        process = subprocess.Popen(
            [*VSWAP, "attach", "swap", "--swap", "--node-address", cluster.node.address],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(delay_s)
        process.kill()
        process.wait()
        if list(Path("/run/vswap/attached").glob("swap@n1.json")):
            vswap("detach", "swap")
        assert "vswap/mounts/swap@n1" not in Path("/proc/mounts").read_text()
        assert "/dev/loop" not in Path("/proc/swaps").read_text()
    attach(cluster)
    vswap("detach", "swap")
