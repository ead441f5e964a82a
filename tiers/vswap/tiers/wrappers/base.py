"""What every wrapper shares: a backend that passes all calls on to another one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from vswap.tiers.backend import Backend, Buffer, Listed, Read, SegmentName, Usage
from vswap.wire.errors import VswapError


class Wrapper(Backend):
    """Same contract as ``inner``; subclasses change what they are about."""

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.segment_bytes = inner.segment_bytes
        self.gap_bytes = inner.gap_bytes
        self.stripes = inner.stripes

    async def open(self) -> None:
        await self.inner.open()

    async def close(self) -> None:
        await self.inner.close()

    async def put(self, name: SegmentName, data: Buffer) -> None:
        await self.inner.put(name, data)

    async def get(self, reads: Sequence[Read]) -> list[Buffer | VswapError]:
        return await self.inner.get(reads)

    async def alternatives(self, read: Read) -> AsyncIterator[Buffer]:
        async for other in self.inner.alternatives(read):
            yield other

    async def delete(self, names: Sequence[SegmentName]) -> None:
        await self.inner.delete(names)

    async def list(self, prefix: str) -> AsyncIterator[Listed]:
        async for listed in self.inner.list(prefix):
            yield listed

    async def usage(self) -> Usage:
        return await self.inner.usage()

    async def check(self) -> None:
        await self.inner.check()

    async def life(self) -> str:
        return await self.inner.life()
