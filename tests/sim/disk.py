"""A client of a space as a block device, which reads and writes halves of pages.

Each half has a history of its own: a change of one that takes the other along shows as an older
version that is there again.
"""

from __future__ import annotations

import asyncio

import numpy as np
from sim.history import PAGE_BYTES, History, page, version_of
from sim.life import ATTEMPTS, Client
from sim.machines import DISK, Node
from sim.world import World

from vswap.node.shard import Shard
from vswap.node.spaces import Space
from vswap.tiers.record import U64
from vswap.wire.errors import PageLost, VswapError

HALF = PAGE_BYTES // 2
PAGES = 24


class DiskClient(Client):
    """Alone with others on the same disk. What fails may have been done in part."""

    space = DISK

    def __init__(self, world: World, node: Node, seed: int) -> None:
        super().__init__(world, node, seed)
        self._history: History = world.disks[node.name]

    async def _act(self) -> None:
        rng = self._rng
        count = rng.choice((1, 1, 2, 3, 8, 16))
        first = rng.randrange(2 * PAGES - count)
        if rng.random() < 0.5:
            first &= ~1
        kind = rng.random()
        if kind < 0.45:
            await self.write(first, count)
        elif kind < 0.55:
            await self.zero(first, count, hole=rng.random() < 0.5)
        else:
            await self.read(first, count)

    async def write(self, first: int, count: int) -> None:
        halves = [*range(first, first + count)]
        write = self._history.begin_store(halves)
        data = np.concatenate([page(half, write.version, HALF) for half in halves])

        async def work(shard: Shard) -> None:
            """As a server of block devices: whole pages at once, others edited one by one."""
            device = self.node.disk
            assert device is not None
            start, end = device.inner(first * HALF, count * HALF)
            if start < end:
                slots = np.arange(start, end, dtype=np.uint64)
                skip = (2 * start - first) * HALF
                whole = data[skip : skip + len(slots) * PAGE_BYTES].reshape(-1, PAGE_BYTES)
                if not device.write_now(slots, whole):
                    await device.write_slots(slots, whole)
            for half in {halves[0], halves[-1]}:
                if not start <= half // 2 < end:
                    at = (half - first) * HALF
                    edit = (half % 2 * HALF, data[at : at + HALF].data)
                    await device.edit(half // 2, [edit])

        try:
            await self._call(work, lambda: self._history.settle(write))
        except VswapError:
            return
        self._history.acknowledge(write)

    async def zero(self, first: int, count: int, *, hole: bool) -> None:
        write = self._history.begin_free([*range(first, first + count)])

        async def work(shard: Shard) -> None:
            assert self.node.disk is not None
            await self.node.disk.zero(first * HALF, count * HALF, hole=hole)

        try:
            await self._call(work, lambda: self._history.settle(write))
        except VswapError:
            return
        self._history.acknowledge(write)

    async def clear(self) -> None:
        await self.zero(0, 2 * PAGES, hole=True)

    async def read(self, first: int, count: int, *, insist: bool = False) -> bool:
        """Whether it came to an answer."""

        async def read(space: Space, slots: U64) -> memoryview:
            assert self.node.disk is not None
            return await self.node.disk.read(first * HALF, count * HALF)

        async def work(shard: Shard) -> bytes:
            device = self.node.disk
            assert device is not None
            slots = device.slots(first * HALF, count * HALF)
            pages = device.peek(slots)
            if device.fill_in(slots, pages):
                start = first % 2 * HALF
                return b"".join(p for p in pages if p is not None)[start : start + count * HALF]
            return bytes(await self._loaded(shard, slots, read))

        for i in range(40 if insist else ATTEMPTS):
            begun = self._history.now()
            try:
                data = await self._call(work, lambda: None)
            except PageLost:
                self._history.missing += 1
                return True
            except VswapError as error:
                self.last = error
                await asyncio.sleep(0.1 * 2 ** min(i, 4) * self._rng.random())
                continue
            halves = np.frombuffer(data, np.uint8).reshape(count, HALF)
            for half, content in zip(range(first, first + count), halves, strict=True):
                version = version_of(half, content) if content.any() else 0
                self._history.saw(half, version, begun)
            return True
        return False
