"""Counts and times what passes through to a backend."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from vswap.tiers.backend import Backend, Buffer, Read, SegmentName
from vswap.tiers.wrappers.base import Wrapper
from vswap.wire.errors import VswapError


@dataclass(slots=True)
class Meter:
    """Totals since start, by operation (``put``, ``get``, ``delete``)."""

    calls: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    """Calls that raised; for ``get``, reads that failed."""
    bytes: Counter[str] = field(default_factory=Counter)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def flat(self, prefix: str) -> dict[str, int]:
        """As counters of whole numbers: ``{prefix}_{operation}_{calls|errors|bytes|us}``."""
        found: dict[str, int] = {}
        for operation in self.calls:
            found[f"{prefix}_{operation}_calls"] = self.calls[operation]
            found[f"{prefix}_{operation}_errors"] = self.errors[operation]
            found[f"{prefix}_{operation}_bytes"] = self.bytes[operation]
            found[f"{prefix}_{operation}_us"] = int(self.seconds[operation] * 1e6)
        return found


class Metered(Wrapper):
    """Costs about a microsecond a call."""

    def __init__(self, inner: Backend, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__(inner)
        self.meter = Meter()
        self._clock = clock

    @contextmanager
    def _time(self, operation: str) -> Iterator[None]:
        start = self._clock()
        self.meter.calls[operation] += 1
        try:
            yield
        except BaseException:
            self.meter.errors[operation] += 1
            raise
        finally:
            self.meter.seconds[operation] += self._clock() - start

    async def put(self, name: SegmentName, data: Buffer) -> None:
        with self._time("put"):
            await self.inner.put(name, data)
        self.meter.bytes["put"] += len(data)

    async def get(self, reads: Sequence[Read]) -> list[Buffer | VswapError]:
        with self._time("get"):
            results = await self.inner.get(reads)
        for result in results:
            if isinstance(result, VswapError):
                self.meter.errors["get"] += 1
            else:
                self.meter.bytes["get"] += len(result)
        return results

    async def delete(self, names: Sequence[SegmentName]) -> None:
        with self._time("delete"):
            await self.inner.delete(names)
