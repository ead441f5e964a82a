"""Partitions in network namespaces: packets vanish, as they do on a real network.

The node lives in a namespace of its own; Redis and the coordinator stay outside, reached over a
veth pair. What iptables drops inside is gone without a reset or an error.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from processes import Daemon
from shards import MIB, pages

from vswap.cli.embedded import EmbeddedRedis, free_port
from vswap.client import Client, Operator
from vswap.v1 import common_pb2
from vswap.wire.errors import TierUnavailable, VswapError

pytestmark = pytest.mark.live

WHERE = np.arange(256, dtype=np.uint64)
MORE = np.arange(1000, 1256, dtype=np.uint64)
OUTSIDE, INSIDE = "10.213.77.1", "10.213.77.2"

CONFIG = """
[[tiers]]
name = "ram"
url = "ram://"
codec = "none"
capacity_bytes = 16777216
rank = 0

[[spaces]]
name = "near"
tiers = ["ram"]

[[spaces]]
name = "far"
tiers = ["red"]
"""


def run(*command: str) -> None:
    subprocess.run(command, check=True)


class Namespace:
    """A network namespace with one address; its packets to ports of the outside can be dropped."""

    def __init__(self) -> None:
        assert os.geteuid() == 0, "network namespaces need root"
        self.name = f"vswap-{os.getpid()}"
        self._veth = f"vs{os.getpid()}"

    def __enter__(self) -> Namespace:
        run("ip", "netns", "add", self.name)
        try:
            run("ip", "link", "add", self._veth, "type", "veth", "peer", "name", "eth0",
                "netns", self.name)  # fmt: skip
            run("ip", "addr", "add", f"{OUTSIDE}/30", "dev", self._veth)
            run("ip", "link", "set", self._veth, "up")
            for command in (
                ["ip", "link", "set", "lo", "up"],
                ["ip", "addr", "add", f"{INSIDE}/30", "dev", "eth0"],
                ["ip", "link", "set", "eth0", "up"],
            ):
                self.run(*command)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        # The pair goes with the namespace; at once, so that the next test may use the addresses.
        subprocess.run(["ip", "link", "del", self._veth], check=False)
        subprocess.run(["ip", "netns", "del", self.name], check=False)

    def run(self, *command: str) -> None:
        run("ip", "netns", "exec", self.name, *command)

    def drop(self, port: int, *, heard: bool = False, told: bool = False) -> None:
        """Drops what comes from that port (``heard``), what goes to it (``told``)."""
        if heard:
            self.run("iptables", "-A", "INPUT", "-p", "tcp", "--sport", str(port), "-j", "DROP")
        if told:
            self.run("iptables", "-A", "OUTPUT", "-p", "tcp", "--dport", str(port), "-j", "DROP")

    def heal(self) -> None:
        self.run("iptables", "-F")


class InsideDaemon(Daemon):
    """A daemon in a namespace; clients reach it through a socket in the file system."""

    namespace = ""

    def launch(self) -> Daemon:
        command = ["ip", "netns", "exec", self.namespace, sys.executable, "-m", "vswap.cli.main",
                   "run", self.kind, "--state", str(self.state), *self._flags]  # fmt: skip
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self.environ
            )
        return self


def until(condition: Callable[[], bool], timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with Namespace() as made:
        yield made


@pytest.mark.parametrize(
    ("heard", "told"), [(True, True), (True, False), (False, True)], ids=["both", "from", "to"]
)
def test_packets_vanish(tmp_path: Path, namespace: Namespace, heard: bool, told: bool) -> None:
    port = free_port()
    listen = f"{OUTSIDE}:{port}"
    config = tmp_path / "node.toml"
    config.write_text(CONFIG)
    coordinator = Daemon(
        "coordinator", tmp_path / "c", "--listen", listen, "--insecure", "--lease", "2s"
    )
    with (
        EmbeddedRedis(
            maxmemory_bytes=200 * MIB, extra=("--bind", f"127.0.0.1 {OUTSIDE}",
                                              "--protected-mode", "no"),
        ) as redis,
        coordinator,
        Operator(listen) as operator,
    ):  # fmt: skip
        operator.add_tier(
            common_pb2.TierSpec(
                name="red", url=f"redis://{OUTSIDE}:{redis.port}", capacity_bytes=100 * MIB,
                rank=20, timeout_s=1,
            )
        )  # fmt: skip
        node = InsideDaemon(
            "node", tmp_path / "n", "--name", "n", "--config", str(config),
            "--coordinator", listen, "--listen", f"unix:{tmp_path}/node.sock",
        )  # fmt: skip
        node.namespace = namespace.name
        with node, Client(node.address, retry_s=0) as client:
            near, far = client.space("near"), client.space("far")
            until(lambda: client.status().coordinator == "connected")
            near.store(WHERE, pages(WHERE, 1))
            far.store(WHERE, pages(WHERE, 1))

            namespace.drop(redis.port, heard=heard, told=told)
            for _ in range(5):
                with pytest.raises(TierUnavailable) as error:
                    far.load(WHERE[:4])
                assert error.value.fields["slots"] == [0, 1, 2, 3]
                assert (near.load(WHERE) == pages(WHERE, 1)).all()
            namespace.heal()

            def served() -> bool:
                try:
                    return bool((far.load(WHERE) == pages(WHERE, 1)).all())
                except VswapError:
                    return False

            until(served)

            namespace.drop(port, heard=heard, told=told)
            until(lambda: client.status().coordinator == "absent")
            assert (far.load(WHERE) == pages(WHERE, 1)).all()
            far.store(MORE, pages(MORE, 2))
            near.store(MORE, pages(MORE, 2))
            namespace.heal()
            until(lambda: client.status().coordinator == "connected")
            until(lambda: operator.cluster().nodes[0].state == "connected")
            assert (far.load(MORE) == pages(MORE, 2)).all()
            assert (near.load(MORE) == pages(MORE, 2)).all()
