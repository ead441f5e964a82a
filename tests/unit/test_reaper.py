"""The reaper, a tier that is away, and writes that land late."""

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
    fenced = False

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
    reaper = Reaper(cast(Handles, None), lambda handle: cast(Tier, tier), clock=lambda: 0.0)
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


class LateTier(AwayTier):
    """One whose backend keeps names, and one segment."""

    def __init__(self) -> None:
        super().__init__(opened=True)
        self.kept: set[int] = set()
        self.segments = {3: None}
        self.ram = None

    async def delete(self, names: list[Any]) -> None:
        self.kept -= set(names)

    def credit(self, stored_bytes: int) -> None:
        pass


class Rows:
    """What the reaper needs of a table of segments."""

    def __init__(self) -> None:
        self.rows = {"stored": {3: 1}}
        self.free: list[int] = []

    def recycle(self, handle: int) -> None:
        self.free.append(handle)


async def test_what_lands_after_it_was_given_up_is_deleted_before_the_tier_is_empty() -> None:
    now_s, tier, rows = 100.0, LateTier(), Rows()
    reaper = Reaper(
        cast(Handles, rows), lambda handle: cast(Tier, tier), clock=lambda: now_s, late_s=10.0
    )
    reaper.delete_later(3, may_land=True)
    assert not await reaper.pass_once()
    tier.kept.add(3)
    now_s = 109.0
    assert not await reaper.pass_once()
    assert (tier.kept, list(tier.segments), rows.free) == (set(), [3], [])
    now_s = 110.0
    assert await reaper.pass_once()
    assert (list(tier.segments), rows.free, reaper.pending) == ([], [3], 0)


async def test_what_was_written_whole_is_deleted_once() -> None:
    tier, rows = LateTier(), Rows()
    reaper = Reaper(cast(Handles, rows), lambda handle: cast(Tier, tier), clock=lambda: 100.0)
    reaper.delete_later(3)
    assert await reaper.pass_once()
    assert (list(tier.segments), rows.free) == ([], [3])
