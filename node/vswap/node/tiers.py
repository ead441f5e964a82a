"""The shard's tiers and their logs: looked up by tag, by name, or in the order of rank."""

from __future__ import annotations

from collections.abc import Iterator

from vswap.node.entry import FIRST_TIER, LAST_TIER
from vswap.node.log import Placed, RamLog, SegmentLog
from vswap.node.tier import Tier
from vswap.wire.errors import InternalError, Refused, UnknownTier


class Tiers:
    """Tiers by tag (what entries say) and name (what people say)."""

    def __init__(self) -> None:
        self._by_tag: dict[int, Tier] = {}
        self._logs: dict[int, RamLog | SegmentLog] = {}
        self.ranked: list[Tier] = []
        """Fast to slow."""

    def __iter__(self) -> Iterator[Tier]:
        return iter(list(self.ranked))

    def add(self, tier: Tier, log: RamLog | SegmentLog) -> None:
        self._by_tag[tier.tag] = tier
        self._logs[tier.tag] = log
        self.sort()

    def remove(self, tier: Tier) -> None:
        del self._by_tag[tier.tag], self._logs[tier.tag]
        self.sort()

    def sort(self) -> None:
        """Call after a rank changed."""
        self.ranked = sorted(self._by_tag.values(), key=lambda t: (t.spec.rank, t.name))

    def by_tag(self, tag: int) -> Tier:
        return self._by_tag[tag]

    def get(self, name: str) -> Tier:
        for tier in self.ranked:
            if tier.name == name:
                return tier
        raise UnknownTier(f"no tier named {name!r}", tier=name)

    def find(self, name: str) -> Tier | None:
        return next((tier for tier in self.ranked if tier.name == name), None)

    def free_tag(self, taken: set[int]) -> int:
        """A tag for a new tier."""
        for tag in range(FIRST_TIER, LAST_TIER + 1):
            if tag not in taken:
                return tag
        raise Refused(f"a node can have at most {LAST_TIER - FIRST_TIER + 1} tiers")

    def ram_log(self, tier: Tier) -> RamLog:
        log = self._logs[tier.tag]
        if not isinstance(log, RamLog):
            raise InternalError(f"tier {tier.name} is not RAM")
        return log

    def segment_log(self, tier: Tier) -> SegmentLog:
        log = self._logs[tier.tag]
        if not isinstance(log, SegmentLog):
            raise InternalError(f"tier {tier.name} is RAM")
        return log

    def settle(self, tier: Tier, placed: Placed) -> None:
        """Ends the life of a :class:`Placed`: its segments now stand or fall by what is live."""
        self._logs[tier.tag].settle(placed)

    def is_head(self, tag: int, handle: int) -> bool:
        log = self._logs.get(tag)
        return log is not None and log.is_head(handle)

    def slower(self, tier: Tier) -> list[Tier]:
        """Tiers behind this one, fast to slow."""
        return self.ranked[self.ranked.index(tier) + 1 :]
