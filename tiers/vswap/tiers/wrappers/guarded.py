"""Spares a server that does not answer, and its callers the wait: one that is down costs a timeout
now and then, not one for each request.

Writes have a breaker of their own. A server that is full refuses them, and serves reads and
deletions, which are the cure.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager

from vswap.tiers.backend import Backend, Buffer, Listed, Read, SegmentName, Usage
from vswap.tiers.breaker import Breaker
from vswap.tiers.wrappers.base import Wrapper
from vswap.wire.errors import OutcomeUnknown, TierUnavailable, VswapError

_OUTAGES = (TierUnavailable, OutcomeUnknown)


class Guarded(Wrapper):
    """Calls that a breaker holds back fail at once with TierUnavailable, whose field
    ``retry_after_s`` says when it is worth asking again."""

    def __init__(self, inner: Backend, clock: Callable[[], float], rng: random.Random) -> None:
        super().__init__(inner)
        self.reach = Breaker(clock, rng)
        """Of everything but writes."""
        self.write = Breaker(clock, rng)
        self.last_error = ""
        self.held_back = 0
        """Calls that were not made."""

    @contextmanager
    def _call(self, breaker: Breaker) -> Iterator[None]:
        call = breaker.begin()
        if call is None:
            self.held_back += 1
            # At least a moment, also while one call tries: nobody shall ask in a tight loop.
            wait_s = max(round(breaker.retry_after_s, 3), 0.05)
            raise TierUnavailable(
                f"left alone after errors, tried again in {wait_s:.2g} s ({self.last_error})",
                retry_after_s=wait_s,
            )
        try:
            yield
        except _OUTAGES as error:
            self.last_error = error.message
            breaker.failed(call)
            raise
        except VswapError:
            breaker.succeeded(call)
            raise
        except BaseException:
            breaker.dropped(call)
            raise
        breaker.succeeded(call)

    async def open(self) -> None:
        await self.inner.open()
        self.reach.reset()
        self.write.reset()

    async def put(self, name: SegmentName, data: Buffer) -> None:
        with self._call(self.write):
            await self.inner.put(name, data)

    async def get(self, reads: Sequence[Read]) -> list[Buffer | VswapError]:
        results: list[Buffer | VswapError] = []
        try:
            with self._call(self.reach):
                results = await self.inner.get(reads)
                for result in results:
                    if isinstance(result, _OUTAGES):
                        raise result
        except _OUTAGES as error:
            return results or [error] * len(reads)
        return results

    async def delete(self, names: Sequence[SegmentName]) -> None:
        with self._call(self.reach):
            await self.inner.delete(names)

    async def list(self, prefix: str) -> AsyncIterator[Listed]:
        # A listing is long and rare; what it meets it tells by itself.
        async for listed in self.inner.list(prefix):
            yield listed

    async def usage(self) -> Usage:
        with self._call(self.reach):
            return await self.inner.usage()

    async def check(self) -> None:
        with self._call(self.reach):
            await self.inner.check()
