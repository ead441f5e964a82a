"""Between a block device and its node: a node that dies and comes back is a pause, not an error.

Its standard input is a socket, on which it serves NBD: to ``nbdfuse --command``, or to `vswap
attach`, which hands the socket to the kernel once it has heard the greeting. It hands requests and
replies on, many at once; while the node is away it keeps the requests, and asks them again. Errors
that the node answers, such as ENOSPC, are handed on at once and hold up nothing else. (nbdkit's
filter for the purpose serves one request at a time, and repeats also these, for minutes.)

If a node answers that does not have the space any more (it was deleted, or another shard or space
of the same name is there), the pages are gone, and everything fails from then on: zeros in place of
what was stored would be a silent loss. A node knows all its spaces before it serves any.
"""

from __future__ import annotations

import asyncio
import functools
import socket
import sys
from collections.abc import Callable

import uvloop

from vswap.cli.device import export
from vswap.cli.device.traffic import Malformed, Traffic
from vswap.node.harden import harden
from vswap.wire.errors import UnknownSpace, VswapError

PATIENCE_S = 300.0
"""How long requests wait for a node that is away. Afterwards they fail, until it is back."""
_AGAIN_S = 0.1


class _Side(asyncio.Protocol):
    """One of the two connections: tells the relay what arrives."""

    def __init__(self, received: Callable[[bytes], None], lost: Callable[[], object]) -> None:
        self._received = received
        self._lost = lost

    def data_received(self, data: bytes) -> None:
        self._received(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._lost()


class Relay:
    """Serves one device, from one node. Event loop only."""

    def __init__(self, address: str, space: str, *, patience_s: float = PATIENCE_S) -> None:
        self._address = address
        self._space = space
        self._patience_s = patience_s
        self._traffic = Traffic()
        self._device: asyncio.WriteTransport | None = None
        self._node: asyncio.WriteTransport | None = None
        self._export: export.Export | None = None
        self._hopeless = False
        """Requests fail at once: the node has been away for too long, or its pages are gone."""
        self.done = asyncio.Event()

    async def run(self, device: socket.socket, size_bytes: int) -> None:
        """Until the device says good-bye. Raises VswapError if the node cannot be reached now."""
        loop = asyncio.get_running_loop()
        node = await self._connect()
        assert self._export is not None
        self._device, _ = await loop.create_connection(
            lambda: _Side(self._from_device, self.done.set), sock=device
        )
        self._device.write(export.greeting(size_bytes, self._export.flags))
        keeper = asyncio.create_task(self._keep_connected(node))
        await self.done.wait()
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)

    # ---------------------------------------------------------------- bytes

    def _from_device(self, data: bytes) -> None:
        assert self._device is not None
        requests = self._traffic.asked(data)
        if self._node is not None:
            self._node.write(requests)
        elif self._hopeless:
            self._device.write(self._traffic.fail())
        if self._traffic.ended:
            self.done.set()

    def _from_node(self, data: bytes) -> None:
        assert self._device is not None
        try:
            self._device.write(self._traffic.answered(data))
        except Malformed as error:
            _say(f"{self._address}: {error}")
            self._traffic.leaving = True
        if self._traffic.leaving and self._node is not None:
            self._node.abort()

    # ---------------------------------------------------------------- the node

    async def _keep_connected(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            lost = asyncio.Event()
            node, _ = await loop.create_connection(
                functools.partial(_Side, self._from_node, functools.partial(self._lose, lost)),
                sock=connection,
            )
            # Not before both are there: from here on requests go straight through.
            self._hopeless = False
            node.write(self._traffic.again())
            if not lost.is_set():
                self._node = node
            await lost.wait()
            _say(f"{self._address} is away; {len(self._traffic)} requests wait")
            connection = await self._return()
            _say(f"{self._address} is back")

    def _lose(self, lost: asyncio.Event) -> None:
        # In the same turn: a write to what is closed would be the end of the device.
        self._node = None
        lost.set()

    async def _return(self) -> socket.socket:
        """Waits for the node."""
        assert self._device is not None
        loop = asyncio.get_running_loop()
        until_s = loop.time() + self._patience_s
        while True:
            try:
                return await self._connect()
            except (_Gone, UnknownSpace) as error:
                if not self._hopeless:
                    _say(f"everything fails from now on: {error}")
                until_s = 0
            except VswapError as error:
                if loop.time() > until_s and not self._hopeless:
                    _say(f"requests fail from now on: {error}")
            if loop.time() > until_s:
                self._hopeless = True
                self._device.write(self._traffic.fail())
            await asyncio.sleep(_AGAIN_S)

    async def _connect(self) -> socket.socket:
        connection, found = await asyncio.to_thread(export.connect, self._address, self._space)
        first = self._export = self._export or found
        if found.description != first.description or found.size_bytes < first.size_bytes:
            connection.close()
            raise _Gone(f"{self._space} is another space now ({found.description})")
        connection.setblocking(False)
        return connection


class _Gone(Exception):
    """The node answers, but the pages of the device are not there any more."""


def _say(text: str) -> None:
    print(f"vswap: {text}", file=sys.stderr, flush=True)


def main(address: str, space: str, size_bytes: str) -> int:
    """Over standard input, which is a socket."""
    for what, why in harden().items():
        _say(f"no {what}: {why}")
    device = socket.socket(fileno=0)
    device.setblocking(False)
    try:
        uvloop.run(Relay(address, space).run(device, int(size_bytes)))
    except VswapError as error:
        _say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
