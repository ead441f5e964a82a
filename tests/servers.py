"""Servers for tests: real backends that can be killed, wiped, and made to lie."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from vswap.tiers.backend import Buffer, Listed, Read, SegmentName, prefix
from vswap.tiers.wrappers.base import Wrapper
from vswap.wire.errors import BackendRefused, OutcomeUnknown, TierUnavailable, VswapError


class Server(Wrapper):
    """A backend that can be killed, wiped, and made to lie."""

    dead = False
    refuses = False
    unfit = False
    flips = False
    lives = 1
    asked = 0
    gate: asyncio.Event | None = None
    """Until it is set, the server does not answer."""

    late: list[tuple[SegmentName, Buffer]] | None = None
    """Takes what is put and given up, for :meth:`land`."""

    async def _answers(self) -> None:
        if self.gate is not None:
            await self.gate.wait()

    async def open(self) -> None:
        await self._answers()
        if self.dead:
            raise TierUnavailable("refused")
        await self.check()
        await super().open()

    async def put(self, name: SegmentName, data: Buffer) -> None:
        await self._answers()
        if self.refuses:
            raise TierUnavailable("out of memory")
        if self.dead:
            raise OutcomeUnknown("connection lost")
        if self.late is not None:
            self.late.append((name, bytes(data)))
            raise OutcomeUnknown("no answer in time")
        await super().put(name, data)

    async def get(self, reads: Sequence[Read]) -> list[Buffer | VswapError]:
        await self._answers()
        if self.dead:
            return [TierUnavailable("refused")] * len(reads)
        self.asked += len(reads)
        answers = await super().get(reads)
        return [flipped(answer) if self.flips else answer for answer in answers]

    async def delete(self, names: Sequence[SegmentName]) -> None:
        await self._answers()
        if self.dead:
            raise TierUnavailable("refused")
        await super().delete(names)

    async def list(self, prefix: str) -> AsyncIterator[Listed]:
        await self._answers()
        if self.dead:
            raise TierUnavailable("refused")
        async for listed in super().list(prefix):
            yield listed

    async def check(self) -> None:
        if self.unfit:
            raise BackendRefused("evicts")

    async def life(self) -> str:
        await self._answers()
        if self.dead:
            raise TierUnavailable("refused")
        return str(self.lives)

    async def keys(self) -> set[str]:
        return {listed.key async for listed in self.inner.list(prefix())}

    async def land(self) -> None:
        """What was given up happens after all."""
        late, self.late = self.late or [], None
        for name, data in late:
            await self.inner.put(name, data)

    async def wipe(self) -> None:
        found = [SegmentName.parse(listed.key) async for listed in self.inner.list(prefix())]
        await self.inner.delete([name for name in found if name is not None])


def flipped(answer: Buffer | VswapError) -> Buffer | VswapError:
    if isinstance(answer, VswapError):
        return answer
    data = bytearray(answer)
    data[len(data) // 2] ^= 1
    return data
