"""Grants: bytes of a cluster tier that the coordinator lets this node hold.

A node asks for more before it runs out and gives back what it does not need. Without a coordinator
it lives within what it has, over restarts of its own as well.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from vswap.node.tier import Tier, TierState

_CHUNK_BYTES = 32 * 2**20
_WAIT_S = 2.0
_GRACE_S = 10.0
"""So long a coordinator is waited for that was there, or that a node which was just started has not
reached yet: either of them may have been restarted a moment ago."""


class Grants:
    """Event loop only. ``wanted`` is called with (tier name, total bytes) to send a request."""

    def __init__(self, promised: Callable[[int], int]) -> None:
        self._promised = promised
        self._asked: dict[str, int] = {}
        self.wanted: Callable[[str, int], None] | None = None
        """Set while the coordinator is connected."""
        self._silent: set[str] = set()
        """Tiers for which the coordinator, though connected, did not answer in time."""
        self._connected = asyncio.Event()
        self._left_at_s = asyncio.get_running_loop().time()

    def connect(self, wanted: Callable[[str, int], None] | None) -> None:
        """Hands in what sends a request; None while the coordinator is away."""
        if wanted is not None:
            self._connected.set()
        elif self.wanted is not None:
            self._connected.clear()
            self._left_at_s = asyncio.get_running_loop().time()
        self.wanted = wanted
        # What was asked and not answered on an older stream never will be.
        self._asked.clear()
        self._silent.clear()

    def set(self, tier: Tier, total_bytes: int) -> None:
        """The coordinator's answer."""
        self._asked.pop(tier.name, None)
        self._silent.discard(tier.name)
        tier.grant(total_bytes)

    def ahead(self, tier: Tier, need_bytes: int = 0) -> None:
        """Asks for more if the tier runs low; never waits.

        A node keeps a chunk of headroom in every active tier, also in those it does not use yet:
        it must get along when the coordinator is away.
        """
        if tier.local or self.wanted is None or tier.state is not TierState.ACTIVE:
            return
        used = self._used(tier) + need_bytes
        if used + self._chunk(tier) // 2 + self._kept(tier) <= tier.limit_bytes:
            return
        total = used + self._headroom(tier)
        if self._asked.get(tier.name, 0) < total:
            self._asked[tier.name] = total
            self.wanted(tier.name, total)

    def _used(self, tier: Tier) -> int:
        return tier.stored_bytes + self._promised(tier.tag)

    def _chunk(self, tier: Tier) -> int:
        """At most a sixteenth of the capacity, but room for two segments."""
        return min(
            _CHUNK_BYTES, max(tier.spec.capacity_bytes // 16, 2 * tier.backend.segment_bytes)
        )

    def _kept(self, tier: Tier) -> int:
        """Of the limit, what stores cannot use."""
        return max(tier.reserve_bytes, 2 * tier.backend.segment_bytes)

    def _headroom(self, tier: Tier) -> int:
        return self._chunk(tier) + self._kept(tier)

    async def want(self, tier: Tier, need_bytes: int) -> bool:
        """Asks and waits a little; True if the tier now has room for ``need_bytes``."""
        if tier.local or not tier.writable or tier.limit_bytes >= tier.spec.capacity_bytes:
            return False
        try:
            async with asyncio.timeout_at(self._left_at_s + _GRACE_S):
                await self._connected.wait()
        except TimeoutError:
            return False
        self._asked.pop(tier.name, None)
        tier.room_changed.clear()
        self.ahead(tier, need_bytes)
        try:
            async with asyncio.timeout(_WAIT_S):
                while tier.room() < need_bytes + 4096:
                    if tier.name not in self._asked:
                        return False
                    await tier.room_changed.wait()
                    tier.room_changed.clear()
        except TimeoutError:
            self._silent.add(tier.name)
            return False
        return True

    def undecided(self, tier: Tier) -> bool:
        """Whether there may be more for this node, and nobody who could say so."""
        return (
            not tier.local
            and tier.state is TierState.ACTIVE
            and tier.limit_bytes < tier.spec.capacity_bytes
            and (self.wanted is None or tier.name in self._silent)
        )

    def give_back(self, tier: Tier) -> None:
        """Returns room that the node does not need. From here on it does not count on it."""
        if tier.local or self.wanted is None or tier.name in self._asked:
            return
        keep = self._used(tier)
        if tier.state is TierState.ACTIVE:
            keep += 2 * self._headroom(tier)
        if tier.limit_bytes > keep + _CHUNK_BYTES or (not keep and tier.limit_bytes):
            tier.grant(keep)
            self._asked[tier.name] = keep
            self.wanted(tier.name, keep)
