"""A real cluster to be killed: processes, Redis servers, and the jobs that run meanwhile."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import redis
from chaos import disk
from chaos.doomed import DoomedNode
from chaos.load import Load
from processes import Daemon
from proxy import DOWN, Proxy

from vswap.cli.embedded import EmbeddedRedis, free_port
from vswap.client import Client
from vswap.client.operator import Operator
from vswap.v1 import coordinator_pb2
from vswap.v1.common_pb2 import TIER_STATE_DRAINED, TierSpec
from vswap.wire.errors import VswapError

MIB = 2**20
SPACES = {"s": 1500, "z": 300, "d": 500}
"""Slots of the spaces that SDK clients share, the second one's pages being compressed from the
start, and of the one that is a block device."""
_CONFIG = """
[[tiers]]
name = "ram"
url = "ram://"
codec = "none"
capacity_bytes = 1048576
rank = 0
[[tiers]]
name = "zram"
url = "ram://"
codec = "zstd:1"
capacity_bytes = 1572864
rank = 1
[[spaces]]
name = "s"
[[spaces]]
name = "z"
tiers = ["zram", "red", "disk"]
[[spaces]]
name = "d"
max_slots = 500
"""
_SWAP = """
[[spaces]]
name = "k"
max_slots = 131072
"""
_DOWN_S = 1.5, 3.0
"""How long Redis servers are away: nodes ask an idle one every second."""


class Cluster:
    """A coordinator, a node with little RAM, a Redis tier ``red`` and an object store ``disk``."""

    def __init__(
        self, root: Path, redundancy: str, *, doomed: bool = False, swap: bool = False
    ) -> None:
        """``doomed``: the node can be told to die at a crash point. ``swap``: a kernel may swap on
        the space ``k``."""
        count = {"none": 1, "mirror:2": 2, "rs:4+2": 6}[redundancy]
        self.redundancy = redundancy
        self.servers = [
            EmbeddedRedis(maxmemory_bytes=100 * MIB, port=free_port()).start() for _ in range(count)
        ]
        self.address = f"127.0.0.1:{free_port()}"
        self.coordinator = Daemon(
            "coordinator", root / "coordinator", "--listen", self.address, "--lease", "1s"
        ).start()
        self.operator = Operator(self.address)
        urls = [server.url for server in self.servers]
        self.operator.add_tier(
            TierSpec(
                name="red", url=urls[0] if count == 1 else "", urls=urls if count > 1 else [],
                redundancy=redundancy, capacity_bytes=40 * MIB, rank=20, timeout_s=2.0,
                codec="zstd:1",
            )
        )  # fmt: skip
        self.objects = root / "disk"
        self.operator.add_tier(
            TierSpec(
                name="disk", url=f"file://{root}/disk", capacity_bytes=200 * MIB, rank=40,
                codec="zstd:1",
            )
        )  # fmt: skip
        config = root / "n.toml"
        config.write_text(_CONFIG + (_SWAP if swap else ""))
        # Attachments are the machine's: another run has other names.
        self.name = f"chaos{os.getpid()}"
        self.node = (DoomedNode if doomed else Daemon)(
            "node", root / "n", "--name", self.name, "--config", str(config),
            "--coordinator", self.address, "--listen", f"127.0.0.1:{free_port()}",
            *(["--swap-safe"] if swap else []),
        ).start()  # fmt: skip
        self.nbd = f"unix:{root / 'n' / 'nbd.sock'}"
        self.proxy = Proxy(self.node.address).__enter__()
        self.restarts_s: list[float] = []

    # ---------------------------------------------------------------- load

    def load(self, rng: random.Random, retry_s: float, each: int = 2) -> Load:
        """So many clients of each space, one of ``z``; where they may retry, one more loses
        replies, and spaces come and go."""
        load = Load(retry_s)

        def some() -> random.Random:
            return random.Random(rng.getrandbits(32))

        for _ in range(each):
            load.add(load.share, self.node.address, "s", SPACES["s"], some())
            load.add(disk.use, load, self.nbd, "d", SPACES["d"], some())
        load.add(load.share, self.node.address, "z", SPACES["z"], some())
        if retry_s:
            load.add(load.share, self.proxy.address, "s", SPACES["s"], some())
            load.add(load.come_and_go, self.node.address, f"t{rng.getrandbits(32):x}")
            load.add(self._lose_replies, load, some())
        return load

    def _lose_replies(self, load: Load, rng: random.Random) -> None:
        while not load.over.wait(rng.uniform(0.02, 0.1)):
            kind = rng.random()
            if kind < 0.4:
                self.proxy.cut()
            elif kind < 0.8:
                self.proxy.cut(after_bytes=rng.randint(1, 20_000))
            else:
                self.proxy.hang(DOWN)
                load.over.wait(0.05)
                self.proxy.heal()
        self.proxy.heal()

    # ---------------------------------------------------------------- jobs

    def disturb(self, rng: random.Random) -> str:
        """Starts some job, so that a kill may come in the middle of it; returns which."""
        if rng.random() < 0.2:
            capacity = rng.randint(150, 200) * MIB
            self._quietly(lambda: self.operator.set_tier("disk", capacity_bytes=capacity))
            return "another capacity"
        spec = rng.choice(
            [
                None,
                coordinator_pb2.JobSpec(kind="MOVE_KIND_DRAIN", tier="red"),
                coordinator_pb2.JobSpec(kind="MOVE_KIND_COMPACT", tier="red"),
                coordinator_pb2.JobSpec(
                    kind="MOVE_KIND_MIGRATE", tier="red", destination="disk", byte_budget=2 * MIB
                ),
                coordinator_pb2.JobSpec(
                    kind="MOVE_KIND_MIGRATE", tier="disk", destination="red", byte_budget=2 * MIB
                ),
            ]
        )
        if spec is None:
            return "nothing"
        try:
            return self.operator.start_job(spec).id
        except VswapError as error:
            return f"nothing ({error})"

    def lose_a_server(self, rng: random.Random) -> None:
        """A Redis server comes back empty, and is repaired."""
        server = rng.choice(self.servers)
        server.kill()
        server.start()

    def settle(self) -> None:
        """Waits until every job has ended; takes a drained tier back into use."""
        self.until(lambda: not self.operator.jobs())
        for info in self.operator.cluster().tiers:
            if info.tier.state == TIER_STATE_DRAINED:
                self.operator.activate_tier(info.tier.spec.name)

    def empty(self) -> None:
        """Frees everything. Raises AssertionError if anything is left on any backend."""
        with self.connect() as client:
            for name, slots in SPACES.items():
                client.space(name).free(np.arange(slots, dtype=np.uint64))
            self.until(lambda: not client.status().pages)
            self.until(lambda: not self._left(), told=self._left)

    def _left(self) -> list[str]:
        """What lies on the backends, but for files that count as abandoned only later."""
        left = [str(path) for path in self.objects.rglob("*") if path.is_file()]
        left = [path for path in left if not path.endswith(".part")]
        for server in self.servers:
            with redis.Redis.from_url(server.url) as other:
                left += [key.decode() for key in other.scan_iter()]
        return left

    def _quietly(self, what: Callable[[], object]) -> None:
        with contextlib.suppress(VswapError):
            what()

    def until(
        self, what: Callable[[], object], timeout_s: float = 60,
        told: Callable[[], object] | None = None,
    ) -> None:  # fmt: skip
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                if what():
                    return
            except VswapError:
                pass
            assert time.monotonic() < deadline, told() if told else self.operator.jobs()
            time.sleep(0.05)

    # ---------------------------------------------------------------- victims

    def kill(self, victim: str, rng: random.Random) -> None:
        """Kills with -9 and starts again: a daemon at once, Redis servers, which come back empty,
        after a while in which they are missed."""
        since = time.monotonic()
        if victim == "redis":
            dead = rng.sample(self.servers, {"mirror:2": 1, "rs:4+2": 2}[self.redundancy])
            for server in dead:
                server.kill()
            time.sleep(rng.uniform(*_DOWN_S))
            for server in dead:
                server.start()
            return
        daemon = self.node if victim == "node" else self.coordinator
        daemon.kill()
        daemon.start()
        self.restarts_s.append(time.monotonic() - since)

    def rebuild(self) -> tuple[int, float]:
        """Waits until no segment of ``red`` is degraded and all its servers are up; returns the
        most bytes that were degraded on the way, and how long it took."""
        since, most = time.monotonic(), 0

        def whole() -> bool:
            nonlocal most
            # The node's own word: the coordinator's is a report old.
            [red] = [usage for usage in client.status().tiers if usage.tier == "red"]
            most = max(most, red.degraded_bytes)
            return not red.degraded_segments and all(server.up for server in red.servers)

        with self.connect() as client:
            self.until(whole, timeout_s=120)
        return most, time.monotonic() - since

    def connect(self) -> Client:
        return Client(self.node.address, retry_s=30)

    def stop(self) -> None:
        self.operator.close()
        self.proxy.__exit__(None, None, None)
        for daemon in (self.node, self.coordinator):
            if daemon.process is not None and daemon.process.poll() is None:
                daemon.process.kill()
                daemon.process.wait()
        for server in self.servers:
            server.stop()
