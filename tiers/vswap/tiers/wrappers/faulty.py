"""Makes a backend misbehave, on a seeded plan. A feature, not a mock: the backend stays real.

A plan is text: ``seed=7,error=0.01,lost=0.01,delay=0.1,delay_ms=20,flip=0.001,torn=0.001``.
Each figure is the probability per call (``flip``, ``short``, ``stale``, ``swap``: per read).

======  =========================================================================================
error   nothing happens, TierUnavailable
lost    the call happens, its reply does not: OutcomeUnknown (reads: TierUnavailable)
delay   the call waits ``delay_ms`` first
flip    one bit of what is read is wrong
short   a read finds less than it asked for: PageLost
stale   a read answers what lies there in another segment that was written or read before
swap    a read and the next one of the call get each other's bytes
torn    a put keeps only a part of the segment and acknowledges it
vanish  a put keeps nothing and acknowledges it
======  =========================================================================================
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vswap.tiers.backend import Backend, Buffer, Listed, Read, SegmentName
from vswap.tiers.wrappers.base import Wrapper
from vswap.wire.errors import BadConfig, OutcomeUnknown, PageLost, TierUnavailable, VswapError

_KNOWN = 64


class FaultPlan(BaseModel):
    """Probabilities 0..1; see the module."""

    model_config = ConfigDict(extra="forbid")

    seed: int = 0
    error: float = Field(default=0.0, ge=0, le=1)
    lost: float = Field(default=0.0, ge=0, le=1)
    delay: float = Field(default=0.0, ge=0, le=1)
    delay_ms: float = Field(default=10.0, ge=0)
    flip: float = Field(default=0.0, ge=0, le=1)
    short: float = Field(default=0.0, ge=0, le=1)
    stale: float = Field(default=0.0, ge=0, le=1)
    swap: float = Field(default=0.0, ge=0, le=1)
    torn: float = Field(default=0.0, ge=0, le=1)
    vanish: float = Field(default=0.0, ge=0, le=1)

    @classmethod
    def parse(cls, text: str) -> FaultPlan:
        """Raises BadConfig, naming what is wrong."""
        try:
            pairs = [part.split("=", 1) for part in text.split(",") if part.strip()]
            fields = {key.strip(): value.strip() for key, value in pairs}
            if "delay_ms" in fields:
                fields.setdefault("delay", "1")
            return cls.model_validate(fields)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise BadConfig(f"fault plan {text!r}: {key}: {first['msg']}", key=key) from error
        except ValueError as error:
            raise BadConfig(f"fault plan {text!r}: say key=value,key=value") from error


class Faulty(Wrapper):
    """``plan`` may be exchanged at any time. The same seed and calls give the same faults.

    Each call draws from a source of its own, seeded when the call starts, so that the order in
    which concurrent calls proceed does not matter.
    """

    def __init__(
        self,
        inner: Backend,
        plan: FaultPlan,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        super().__init__(inner)
        self.plan = plan
        self.injected: Counter[str] = Counter()
        self._known: deque[SegmentName] = deque(maxlen=_KNOWN)
        """Segments to answer stale reads from."""
        self._rng = random.Random(plan.seed)
        self._sleep = sleep

    def restart(self, plan: FaultPlan) -> None:
        """Another plan, from the start of its seed."""
        self.plan = plan
        self._rng = random.Random(plan.seed)

    def _hits(self, rng: random.Random, fault: str, probability: float) -> bool:
        if probability and rng.random() < probability:
            self.injected[fault] += 1
            return True
        return False

    async def _before(self) -> random.Random:
        rng = random.Random(self._rng.getrandbits(64))
        if self._hits(rng, "delay", self.plan.delay):
            await self._sleep(self.plan.delay_ms / 1000)
        if self._hits(rng, "error", self.plan.error):
            raise TierUnavailable("injected error")
        return rng

    async def put(self, name: SegmentName, data: Buffer) -> None:
        rng = await self._before()
        if self._hits(rng, "torn", self.plan.torn):
            data = memoryview(data)[: rng.randrange(1, max(len(data), 2))]
        if not self._hits(rng, "vanish", self.plan.vanish):
            await self.inner.put(name, data)
            self._known.append(name)
        if self._hits(rng, "lost", self.plan.lost):
            raise OutcomeUnknown("injected: the reply was lost")

    async def get(self, reads: Sequence[Read]) -> list[Buffer | VswapError]:
        try:
            rng = await self._before()
        except TierUnavailable as error:
            return [error] * len(reads)
        asked = [self._elsewhere(rng, read) for read in reads]
        results = await self.inner.get(asked)
        if self._hits(rng, "lost", self.plan.lost):
            return [TierUnavailable("injected: the reply was lost")] * len(reads)
        self._swap(rng, reads, results)
        return [self._damage(rng, result) for result in results]

    def _elsewhere(self, rng: random.Random, read: Read) -> Read:
        """The same range of another segment, for a stale read."""
        if not self.plan.stale:
            return read
        others = [name for name in self._known if name != read.name]
        if read.name not in self._known:
            self._known.append(read.name)
        if not others or not self._hits(rng, "stale", self.plan.stale):
            return read
        return replace(read, name=rng.choice(others))

    def _swap(
        self, rng: random.Random, reads: Sequence[Read], results: list[Buffer | VswapError]
    ) -> None:
        for i in range(len(results) - 1):
            one, other = results[i], results[i + 1]
            if isinstance(one, VswapError) or isinstance(other, VswapError):
                continue
            if self._hits(rng, "swap", self.plan.swap):
                results[i] = bytes(other)[: reads[i].length].ljust(reads[i].length, b"\0")
                results[i + 1] = bytes(one)[: reads[i + 1].length].ljust(reads[i + 1].length, b"\0")

    def _damage(self, rng: random.Random, result: Buffer | VswapError) -> Buffer | VswapError:
        if isinstance(result, VswapError):
            return result
        if self._hits(rng, "short", self.plan.short):
            return PageLost("injected: short read")
        if self._hits(rng, "flip", self.plan.flip):
            damaged = bytearray(result)
            bit = rng.randrange(len(damaged) * 8)
            damaged[bit >> 3] ^= 1 << (bit & 7)
            return damaged
        return result

    async def delete(self, names: Sequence[SegmentName]) -> None:
        rng = await self._before()
        await self.inner.delete(names)
        if self._hits(rng, "lost", self.plan.lost):
            raise OutcomeUnknown("injected: the reply was lost")

    async def list(self, prefix: str) -> AsyncIterator[Listed]:
        await self._before()
        async for listed in self.inner.list(prefix):
            yield listed
