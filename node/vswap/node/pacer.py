"""A pacer: holds a job to a rate in bytes a second."""

from __future__ import annotations

import asyncio
from typing import Protocol

from asyncio_throttle.throttler import Throttler

_PERIOD_S = 0.05


class Pacer(Protocol):
    """What a job awaits before it moves so many bytes."""

    async def take(self, amount_bytes: int) -> None: ...


class Unpaced:
    """As fast as it goes, but other tasks have their turn."""

    async def take(self, amount_bytes: int) -> None:
        await asyncio.sleep(0)


class ThrottledPacer:
    """asyncio-throttle counts calls, so a call stands for a quantum of bytes.

    The period is short, so that a job trickles instead of coming in bursts of a second. It reads
    the real clock; a virtual-time run uses its own pacer.
    """

    def __init__(self, rate_bytes_s: int) -> None:
        per_period = max(rate_bytes_s * _PERIOD_S, 1.0)
        self._calls = min(16, max(1, int(per_period // 4096)))
        self._quantum_bytes = per_period / self._calls
        self._throttler = Throttler(rate_limit=self._calls, period=_PERIOD_S, retry_interval=0.005)
        self._owed = 0.0

    async def take(self, amount_bytes: int) -> None:
        self._owed += amount_bytes
        while self._owed > 0:
            async with self._throttler:
                self._owed -= self._quantum_bytes


def make_pacer(rate_bytes_s: int) -> Pacer:
    """``rate_bytes_s`` of 0 means unpaced."""
    return ThrottledPacer(rate_bytes_s) if rate_bytes_s else Unpaced()
