"""The reaper, and a tier that is away."""

from __future__ import annotations

from typing import Any, cast

from vswap.node.handles import Handles
from vswap.node.reaper import Reaper
from vswap.node.tier import Tier
from vswap.tiers.backend import SegmentName
from vswap.wire.errors import TierUnavailable, VswapError


class AwayTier:
    """One whose backend refuses. What :class:`Tier` does with a failure is to wait the longer."""

    name = "away"

    def __init__(self, *, opened: bool) -> None:
        self.opened = opened
        self.failures: list[VswapError] = []
        self.backend = self

    def segment_name(self, handle: int) -> Any:
        return handle

    def failed(self, error: VswapError) -> None:
        self.failures.append(error)

    async def delete(self, names: list[SegmentName]) -> None:
        raise TierUnavailable("nobody answers", tier=self.name)


async def attempt(tier: AwayTier) -> Reaper:
    reaper = Reaper(cast(Handles, None), lambda handle: cast(Tier, tier))
    reaper.delete_later(3)
    assert not await reaper.pass_once()
    return reaper


async def test_a_deletion_that_fails_is_kept_and_the_tier_left_alone_for_a_while() -> None:
    tier = AwayTier(opened=True)
    assert (await attempt(tier)).pending == 1
    assert len(tier.failures) == 1


async def test_deletions_do_not_put_off_the_opening_of_a_tier() -> None:
    tier = AwayTier(opened=False)
    assert (await attempt(tier)).pending == 1
    assert not tier.failures
