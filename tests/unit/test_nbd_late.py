"""What a block device's client asked before it hung up, and that had begun: it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shards import open_shard, pages, ram, slots

from vswap.node.frontends.nbd import wire
from vswap.node.frontends.nbd.replies import Replies
from vswap.node.frontends.nbd.server import NbdServer
from vswap.node.frontends.nbd.session import Session
from vswap.node.frontends.nbd.wire import Command
from vswap.tiers.backend import Buffer


class Link:
    """A connection whose client may be gone."""

    busy = gone = False

    def __init__(self) -> None:
        self.tasks: list[asyncio.Task[None]] = []

    def send(self, *parts: Buffer) -> None:
        pass

    def spawn(self, work: Coroutine[Any, Any, None], cost_bytes: int) -> None:
        self.tasks.append(asyncio.create_task(work))

    async def drained(self) -> None:
        pass


@pytest.mark.parametrize(
    ("command", "flags"),
    [(Command.TRIM, 0), (Command.WRITE_ZEROES, 0), (Command.WRITE_ZEROES, wire.NO_HOLE)],
)
async def test_the_rest_of_a_long_range_is_left_alone(
    command: Command, flags: int, tmp_path: Path
) -> None:
    """The client was gone when another one stored a page there: that one stays."""
    async with open_shard(tmp_path / "state", ram(mib=8)) as shard:
        space = shard.spaces.create("swap", max_slots=1 << 20)
        server = NbdServer(shard, inflight_bytes=1 << 20)
        offer = server.find("swap")
        assert offer is not None
        link = Link()
        session = Session(
            link, server._device("swap"), offer, frozenset(),
            Replies(structured=False, page_bytes=4096), server.counters,
        )  # fmt: skip
        asked = wire.REQUEST.pack(wire.REQUEST_MAGIC, flags, command, 7, 0, (1 << 32) - 4096)
        session.feed(memoryview(asked))
        session.serve_some()
        await asyncio.sleep(0)
        link.gone = True
        where = slots((1 << 20) - 2)
        await shard.pager.store(space, where, pages(where, 1))
        await asyncio.gather(*link.tasks)
        assert np.array_equal(await shard.pager.load(space, where), pages(where, 1))
