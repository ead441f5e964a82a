"""What stands for a backend that cannot be made here: its password is not on this host, say.

The tier is there and has a reason why it serves nobody, so that the rest of a configuration can be
taken up. Whoever holds it makes the real one when that becomes possible.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from vswap.tiers.backend import Backend, Buffer, Listed, Read, SegmentName, Usage
from vswap.wire.errors import TierUnavailable, VswapError


class Unmade(Backend):
    """Every call raises TierUnavailable with the reason; nothing is ever stored."""

    def __init__(self, tier: str, reason: str) -> None:
        self._tier = tier
        self._reason = reason

    def _error(self) -> TierUnavailable:
        return TierUnavailable(self._reason, tier=self._tier)

    async def open(self) -> None:
        raise self._error()

    async def close(self) -> None:
        return

    async def put(self, name: SegmentName, data: Buffer) -> None:
        raise self._error()

    async def get(self, reads: Sequence[Read]) -> list[Buffer | VswapError]:
        return [self._error() for _ in reads]

    async def delete(self, names: Sequence[SegmentName]) -> None:
        raise self._error()

    async def list(self, prefix: str) -> AsyncIterator[Listed]:
        raise self._error()
        yield

    async def usage(self) -> Usage:
        raise self._error()
