"""A node whose Redis, coordinator or client cannot be reached: the rest goes on, and it heals."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from client_support import run_vswap
from processes import Daemon
from proxy import DOWN, UP, Proxy
from shards import MIB, pages

from vswap.cli.embedded import EmbeddedRedis, free_port
from vswap.client import Client, Operator
from vswap.v1 import common_pb2
from vswap.wire.errors import OutcomeUnknown, TierUnavailable

NEAR = np.arange(256, dtype=np.uint64)
FAR = np.arange(256, dtype=np.uint64)
MORE = np.arange(1000, 1256, dtype=np.uint64)
TIMEOUT_S = 1.0

CONFIG = """
[[tiers]]
name = "ram"
url = "ram://"
codec = "none"
capacity_bytes = 67108864
rank = 0

[[tiers]]
name = "red"
url = "{url}"
capacity_bytes = 67108864
rank = 1
timeout_s = {timeout_s}

[[tiers]]
name = "disk"
url = "file://{root}/disk"
capacity_bytes = 67108864
rank = 2

[[spaces]]
name = "near"
tiers = ["ram"]

[[spaces]]
name = "far"
tiers = ["red"]

[[spaces]]
name = "either"
tiers = ["red", "disk"]
"""


def until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def redis() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(maxmemory_bytes=200 * MIB) as server:
        yield server


class Site:
    """A node between two proxies: clients reach it through one, it reaches Redis by the other."""

    def __init__(self, root: Path, redis_address: str) -> None:
        self.backend = Proxy(redis_address).__enter__()
        file = root / "node.toml"
        file.write_text(
            CONFIG.format(root=root, url=f"redis://{self.backend.address}", timeout_s=TIMEOUT_S)
        )
        self.node = Daemon("node", root / "state", "--name", "n", "--config", str(file)).start()
        self.client = Client(self.node.address, retry_s=0)
        for name in ("near", "far"):
            self.client.space(name).store(NEAR, pages(NEAR, 1))

    def close(self) -> None:
        self.client.close()
        self.node.__exit__(None, None, None)
        self.backend.__exit__(None, None, None)

    def check_others(self) -> None:
        """RAM pages are served, stores pass over the sick tier."""
        assert (self.client.space("near").load(NEAR) == pages(NEAR, 1)).all()
        either = self.client.space("either")
        either.store(MORE, pages(MORE, 2))
        assert (either.load(MORE) == pages(MORE, 2)).all()
        self.client.space("near").store(MORE, pages(MORE, 3))

    def fails_clearly(self) -> None:
        with pytest.raises(TierUnavailable) as error:
            self.client.space("far").load(FAR[:4])
        assert error.value.fields["slots"] == [0, 1, 2, 3]
        assert error.value.fields["tier"] == "red"

    def heals(self) -> None:
        def served() -> bool:
            try:
                loaded = self.client.space("far").load(FAR)
            except TierUnavailable as error:
                time.sleep(error.fields.get("retry_after_s", 0.05))
                return False
            return bool((loaded == pages(FAR, 1)).all())

        until(served)
        self.client.space("far").store(MORE, pages(MORE, 4))


@pytest.fixture
def site(tmp_path: Path, redis: EmbeddedRedis) -> Iterator[Site]:
    made = Site(tmp_path, f"127.0.0.1:{redis.port}")
    yield made
    made.close()


# ---------------------------------------------------------------- node and Redis


@pytest.mark.parametrize("directions", [(UP, DOWN), (UP,), (DOWN,)], ids=["both", "to", "from"])
def test_a_redis_server_behind_a_partition(site: Site, directions: tuple[str, ...]) -> None:
    site.backend.hang(*directions)
    for _ in range(4):
        site.fails_clearly()
    site.check_others()
    # By now it is left alone: who asks is told when to come again.
    with pytest.raises(TierUnavailable, match="left alone"):
        for _ in range(8):
            try:
                site.client.space("far").load(FAR[:1])
            except TierUnavailable as error:
                if "retry_after_s" in error.fields:
                    raise
    shown = run_vswap("node", "show", "--node-address", site.node.address).stdout
    assert "not available" in shown
    site.backend.heal()
    site.heals()


def test_a_redis_server_that_refuses_then_answers_half(site: Site) -> None:
    site.backend.refuse()
    for _ in range(4):
        site.fails_clearly()
    site.check_others()
    site.backend.heal()
    site.heals()
    site.backend.cut(after_bytes=1000)
    with pytest.raises(TierUnavailable):
        site.client.space("far").load(FAR)
    site.backend.heal()
    site.heals()


def test_ram_is_served_while_redis_is_stopped(tmp_path: Path) -> None:
    with EmbeddedRedis(maxmemory_bytes=200 * MIB) as server:
        site = Site(tmp_path, f"127.0.0.1:{server.port}")
        try:
            os.kill(server.pid, signal.SIGSTOP)
            stop = threading.Event()
            failures: list[str] = []

            def ask() -> None:
                with Client(site.node.address, retry_s=0) as client:
                    far = client.space("far")
                    while not stop.is_set():
                        try:
                            far.load(FAR[:8])
                        except TierUnavailable as error:
                            failures.append(error.message)
                            stop.wait(0.01)

            askers = [threading.Thread(target=ask) for _ in range(8)]
            for asker in askers:
                asker.start()
            try:
                for _ in range(6):
                    site.check_others()
                until(lambda: any("left alone" in message for message in failures))
                for _ in range(6):
                    site.check_others()
            finally:
                stop.set()
                for asker in askers:
                    asker.join()
                os.kill(server.pid, signal.SIGCONT)
            site.heals()
        finally:
            site.close()


# ---------------------------------------------------------------- client and node


def test_a_client_behind_a_partition_repeats_what_was_not_answered(site: Site) -> None:
    with (
        Proxy(site.node.address) as link,
        Client(link.address, deadline_s=1, retry_s=30) as client,
        Client(link.address, deadline_s=1, retry_s=0) as hasty,
    ):
        near = client.space("near")
        for directions in ((UP, DOWN), (UP,), (DOWN,)):
            link.hang(*directions)
            with pytest.raises(OutcomeUnknown):
                hasty.space("near")
            healer = threading.Timer(1.5, link.heal)
            healer.start()
            near.store(MORE, pages(MORE, 7))
            healer.join()
            assert (near.load(MORE) == pages(MORE, 7)).all()


# ---------------------------------------------------------------- node and coordinator


def test_nodes_that_cannot_reach_their_coordinator(tmp_path: Path, redis: EmbeddedRedis) -> None:
    """One cannot be heard nor hear, the other one only not hear."""
    listen = f"127.0.0.1:{free_port()}"
    config = tmp_path / "node.toml"
    config.write_text(
        '[[tiers]]\nname="ram"\nurl="ram://"\ncodec="none"\ncapacity_bytes=4194304\nrank=0\n'
        '[[spaces]]\nname="s"\n'
    )
    where = np.arange(2048, dtype=np.uint64)
    part, rest = where[:256], where[256:1024]
    with contextlib.ExitStack() as stack:
        stack.enter_context(Daemon("coordinator", tmp_path / "c", "--listen", listen,
                                   "--lease", "2s"))  # fmt: skip
        operator = stack.enter_context(Operator(listen))
        for name, rank, url in (("red", 20, redis.url), ("disk", 30, f"file://{tmp_path}/disk")):
            operator.add_tier(
                common_pb2.TierSpec(name=name, url=url, capacity_bytes=100 * MIB, rank=rank)
            )
        links: dict[str, Proxy] = {}
        clients: dict[str, Client] = {}
        for name in ("mute", "deaf"):
            link = links[name] = stack.enter_context(Proxy(listen))
            node = Daemon(
                "node", tmp_path / name, "--name", name, "--config", str(config),
                "--coordinator", link.address,
            )  # fmt: skip
            stack.enter_context(node)
            clients[name] = stack.enter_context(Client(node.address))

        def states() -> dict[str, str]:
            return {node.name: node.state for node in operator.cluster().nodes}

        def seen(state: str) -> bool:
            return all(client.status().coordinator == state for client in clients.values())

        until(lambda: seen("connected"))
        for client in clients.values():
            for start in range(0, len(where), 256):
                some = where[start : start + 256]
                client.space("s").store(some, pages(some, 1))
        links["mute"].hang(UP, DOWN)
        links["deaf"].hang(DOWN)
        until(lambda: states()["mute"] == "absent")
        assert states()["deaf"] == "connected"
        for client in clients.values():
            # The data plane is untouched, within the bytes granted.
            client.space("s").store(part, pages(part, 2))
            assert (client.space("s").load(part) == pages(part, 2)).all()
        # By the timeout of a ping: it would take a minute without.
        until(lambda: seen("absent"), timeout_s=45)
        for link in links.values():
            link.heal()
        until(lambda: seen("connected") and set(states().values()) == {"connected"})
        # Jobs go on with nodes that came back.
        done = run_vswap("drain", "red", coordinator=listen)
        assert done.returncode == 0, done.stderr
        for client in clients.values():
            assert (client.space("s").load(part) == pages(part, 2)).all()
            assert (client.space("s").load(rest) == pages(rest, 1)).all()
