"""The demo's cluster: two Redis servers, a directory of objects, a coordinator and nodes."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis

from vswap.cli.demo import plan as plans
from vswap.cli.demo.plan import OBJECTS, REDIS_A, REDIS_B, Plan
from vswap.cli.demo.processes import Daemon
from vswap.cli.demo.stage import Stage
from vswap.cli.embedded import EmbeddedRedis
from vswap.client import AsyncClient, Operator
from vswap.v1 import coordinator_pb2, node_pb2
from vswap.wire.errors import InternalError

_UP_S = 30.0


class Cluster:
    """Processes of their own, all on loopback. Start and stop it from the main thread."""

    def __init__(self, plan: Plan, stage: Stage, *, outlives: bool) -> None:
        self.plan = plan
        self.stage = stage
        self.coordinator_address = ""
        self.node_addresses: list[str] = []
        self.redis: dict[str, EmbeddedRedis] = {}
        self.daemons: list[Daemon] = []
        self._outlives = outlives
        self._operator: Operator | None = None
        self._clients: list[AsyncClient] = []

    # -------------------------------------------------------------- life

    async def start(self, say: Callable[[str], None]) -> None:
        """Start everything and return when every node is connected."""
        directory = self.stage.directory
        for name in (REDIS_A, REDIS_B):
            server = EmbeddedRedis(
                maxmemory_bytes=2 * self.plan.capacity_bytes[name],
                directory=directory / name,
                outlives=self._outlives,
            )
            server.start()
            self.redis[name] = server
            say(f"{name}: {server.url}, process {server.pid}")
        say(f"{OBJECTS}: {directory}/objects")
        urls = {name: server.url for name, server in self.redis.items()}
        coordinator = self._spawn("coordinator", plans.coordinator_toml(self.plan, directory, urls))
        self.coordinator_address = coordinator.address(directory / "coordinator" / "address")
        say(f"coordinator: {self.coordinator_address}, process {coordinator.pid}")
        self._operator = Operator(self.coordinator_address)
        for index in range(self.plan.nodes):
            name = f"node-{index + 1}"
            self._spawn(
                name,
                plans.node_toml(self.plan, name, self.stage.state, self.coordinator_address),
            )
        for daemon in self.daemons[1:]:
            address = daemon.address(self.stage.state / daemon.name / "address")
            self.node_addresses.append(address)
            self._clients.append(AsyncClient(address))
            say(f"{daemon.name}: {address}, process {daemon.pid}")
        await self._connected()

    def _spawn(self, name: str, configuration: str) -> Daemon:
        directory = self.stage.directory
        file = directory / f"{name}.toml"
        file.write_text(configuration)
        kind = "coordinator" if name == "coordinator" else "node"
        daemon = Daemon(
            name,
            ["run", kind, "--config", str(file)],
            directory / "logs" / f"{name}.log",
            self.stage.lock_fd,
            outlives=self._outlives,
        )
        self.daemons.append(daemon)
        return daemon

    async def _connected(self) -> None:
        until_s = time.monotonic() + _UP_S
        while time.monotonic() < until_s:
            self.check()
            cluster = await self.cluster()
            if sum(node.state == "connected" for node in cluster.nodes) == self.plan.nodes:
                return
            await asyncio.sleep(0.05)
        raise InternalError(f"not every node is connected after {_UP_S:.0f} s")

    def check(self) -> None:
        """InternalError if any process has died."""
        for daemon in self.daemons:
            daemon.check()

    async def disconnect(self) -> None:
        """Close connections; the processes go on."""
        if self._operator is not None:
            self._operator.close()
        for client in self._clients:
            await client.close()
        self._clients.clear()

    def stop(self) -> None:
        """Stop every process. Nodes first, so that they can still reach their servers."""
        for daemons in (self.daemons[1:], self.daemons[:1]):
            for daemon in daemons:
                daemon.terminate()
            for daemon in daemons:
                daemon.wait()
        for server in self.redis.values():
            server.stop()
        self.daemons.clear()
        self.redis.clear()

    # -------------------------------------------------------------- views

    async def cluster(self) -> coordinator_pb2.ClusterStatus:
        return await asyncio.to_thread(self.operator.cluster)

    async def nodes(self) -> list[node_pb2.NodeStatus]:
        """Every node's own view of itself."""
        self.check()
        return list(await asyncio.gather(*(client.status() for client in self._clients)))

    @property
    def operator(self) -> Operator:
        assert self._operator is not None
        return self._operator

    def redis_keys(self, name: str) -> tuple[int, int]:
        """What the server itself lists: number of keys, and the sum of their lengths in bytes."""
        server = _connection(self.redis[name].url)
        with server:
            keys = list(server.scan_iter(count=1000))
            pipeline = server.pipeline(transaction=False)
            for key in keys:
                pipeline.strlen(key)
            return int(server.dbsize()), sum(pipeline.execute())

    def redis_memory(self, name: str) -> int:
        """The server's own ``used_memory``."""
        with _connection(self.redis[name].url) as server:
            return int(server.info("memory")["used_memory"])

    def object_files(self) -> tuple[int, int]:
        """Files and bytes below the objects' directory."""
        files = [
            os.path.join(folder, name)
            for folder, _, names in os.walk(self.stage.directory / "objects")
            for name in names
        ]
        return len(files), sum(Path(file).stat().st_size for file in files)


def _connection(url: str) -> Any:
    return redis.Redis.from_url(url)
