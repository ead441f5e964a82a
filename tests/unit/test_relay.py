"""What a relay does in the very turn in which its node hangs up."""

from __future__ import annotations

import asyncio
import socket

import pytest
import uvloop

from vswap.cli.device import export
from vswap.cli.device.relay import Relay
from vswap.node.frontends.nbd import wire
from vswap.node.frontends.nbd.wire import Command

PAGE = 4096
READS = 20


def read(cookie: int) -> bytes:
    return wire.REQUEST.pack(wire.REQUEST_MAGIC, 0, Command.READ, cookie, 0, PAGE)


def test_requests_that_arrive_while_the_node_hangs_up_are_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes: list[socket.socket] = []

    def connect(address: str, name: str) -> tuple[socket.socket, export.Export]:
        ours, theirs = socket.socketpair()
        nodes.append(theirs)
        return ours, export.Export(2**20, 0, "number 1 of shard 1")

    async def hang_up_while_it_asks() -> set[int]:
        device, theirs = socket.socketpair()
        task = asyncio.create_task(Relay("nowhere", "swap").run(theirs, 2**20))
        loop = asyncio.get_running_loop()
        await asyncio.to_thread(device.recv, 152)
        while not nodes:
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        nodes[0].close()
        for cookie in range(READS):
            # One a turn: some of them come between the end of the connection and all that follows.
            device.send(read(cookie))
            await asyncio.sleep(0)
        while len(nodes) < 2:
            await asyncio.sleep(0.01)
        asked: set[int] = set()
        nodes[1].setblocking(False)
        while len(asked) < READS:
            request = await loop.sock_recv(nodes[1], wire.REQUEST.size)
            asked.add(wire.REQUEST.unpack(request)[3])
        device.close()
        await task
        nodes[1].close()
        return asked

    monkeypatch.setattr(export, "connect", connect)
    asked = uvloop.run(asyncio.wait_for(hang_up_while_it_asks(), 20))
    assert asked == set(range(READS))
