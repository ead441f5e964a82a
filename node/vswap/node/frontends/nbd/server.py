"""The NBD server of a node: every space is an export of the same name.

Block N of the device is slot N of the space, wherever the page lies. All connections to an export
see the same pages at once, so clients may use several (multi-conn).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
from collections import Counter
from collections.abc import Sequence

import structlog

from vswap.node.device import Device
from vswap.node.frontends.nbd.budget import Budget
from vswap.node.frontends.nbd.connection import Connection
from vswap.node.frontends.nbd.handshake import Offer
from vswap.node.readahead import ReadAhead
from vswap.node.shard import Shard
from vswap.wire.errors import BadConfig
from vswap.wire.listen import check_free, check_listen

_BACKLOG = 128
_MAX_CONNECTIONS = 1024
_OTHER_FILES = 512
"""Descriptors that are left to tiers and other services. A connection takes two."""

logger = structlog.get_logger("vswap.node.nbd")


class NbdServer:
    """Listens on any number of addresses. Event loop only.

    ``inflight_bytes`` bounds what the requests of all clients hold; who comes later waits.
    """

    def __init__(self, shard: Shard, *, inflight_bytes: int) -> None:
        self._shard = shard
        self._budget = Budget(inflight_bytes)
        self._connections: set[Connection] = set()
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = max(min(_MAX_CONNECTIONS, (files - _OTHER_FILES) // 2), 1)
        self._servers: list[asyncio.Server] = []
        self._devices: dict[int, Device] = {}
        self.counters: Counter[str] = Counter()
        shard.frontends.append(self.counters)

    async def start(self, addresses: Sequence[str], *, insecure: bool) -> list[str]:
        """Serves; returns the addresses with the ports they got. Raises BadConfig."""
        return [await self._listen(address, insecure) for address in addresses]

    async def _listen(self, address: str, insecure: bool) -> str:
        check_listen(address, insecure=insecure)
        loop = asyncio.get_running_loop()
        try:
            check_free(address)
            listening = _socket(address)
            server = await loop.create_server(self._accept, sock=listening, backlog=_BACKLOG)
        except OSError as error:
            why = error.strerror or str(error)
            raise BadConfig(f"cannot listen for NBD on {address}: {why}", key="nbd") from error
        self._servers.append(server)
        if address.startswith("unix:"):
            return address
        return f"{address.rpartition(':')[0]}:{listening.getsockname()[1]}"

    def _accept(self) -> Connection:
        connection = Connection(
            self, self._device, self._budget, self.counters, self._connections.discard
        )
        self.counters["nbd_connections"] += 1
        if len(self._connections) >= self._most:
            logger.warning("too many NBD clients", limit=self._most)
            asyncio.get_running_loop().call_soon(connection.abort)
        self._connections.add(connection)
        return connection

    async def stop(self, grace_s: float) -> None:
        """Takes no more connections and requests; lets those under way end, for a while."""
        for server in self._servers:
            for listening in server.sockets:
                if listening.family == socket.AF_UNIX:
                    with contextlib.suppress(OSError):
                        os.unlink(listening.getsockname())
            server.close()
        for connection in list(self._connections):
            connection.finish()
        until = asyncio.get_running_loop().time() + grace_s
        while self._connections and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(0.02)
        for connection in list(self._connections):
            connection.abort()

    # ---------------------------------------------------------------- exports

    def names(self) -> list[str]:
        return sorted(space.name for space in self._shard.spaces)

    def find(self, name: str) -> Offer | None:
        """The empty name stands for the only space there is."""
        names = self.names()
        if not name and len(names) == 1:
            name = names[0]
        if name not in names:
            return None
        space = self._shard.spaces.get(name)
        identity = f"number {space.number} of shard {self._shard.uuid}"
        return Offer(name, space.max_slots * space.page_bytes, space.page_bytes, identity)

    def _device(self, name: str) -> Device:
        """The device of a space; one for all its connections."""
        space = self._shard.spaces.get(name)
        for number in [n for n in self._devices if n not in self._shard.spaces.by_number]:
            del self._devices[number]
        device = self._devices.get(space.number)
        if device is None:
            shard = self._shard
            ahead = ReadAhead(shard.pager, shard.handles, shard.tiers, space, self.counters)
            device = Device(shard.pager, shard.promoter, ahead, space)
            self._devices[space.number] = device
        return device


def _socket(address: str) -> socket.socket:
    """A bound socket. One in the file system is nobody else's from the first moment on: pages are
    as private as memory. What a dead process left there is replaced."""
    if not address.startswith("unix:"):
        host, _, port = address.rpartition(":")
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        family, kind, protocol, _, where = found[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(where)
        return bound
    path = address.removeprefix("unix:")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    bound = socket.socket(socket.AF_UNIX)
    mask = os.umask(0o177)
    try:
        bound.bind(path)
    finally:
        os.umask(mask)
    return bound
