"""Leaving for good: what a node does that is to be retired.

1  only a node that holds no page may leave; from the turn in which that was seen nothing is stored
2  its segments are deleted on every backend
3  the coordinator is told, and sets the tombstone
4  the daemon ends, and erases its state

Until 3 a failure calls it all off. From there on there is no way back: what the node stored could
be swept by a coordinator that has buried it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from vswap.node.control import Control
from vswap.node.shard import Shard
from vswap.wire.errors import OutcomeUnknown, Refused, TierUnavailable, VswapError

_DELETE_S = 10.0
_ANSWER_S = 20.0
_RETRY_S = 0.1

logger = structlog.get_logger("vswap.node.departure")


class Departure:
    """Event loop only. ``done`` is called when the node has left."""

    def __init__(self, shard: Shard, *, done: Callable[[], None]) -> None:
        self._shard = shard
        self._done = done
        self.control: Control | None = None
        """None while the node works alone."""
        self._task: asyncio.Task[None] | None = None
        self.left = False
        """Nobody will miss the state of this node."""

    async def leave(self) -> None:
        """Returns once the node has left. May be called again, also while it is under way.

        Raises Refused (with the pages that are still there; the coordinator is away),
        TierUnavailable (segments that cannot be deleted), OutcomeUnknown (the node goes on trying,
        and leaves as soon as it can).
        """
        if self._task is None or (self._task.done() and not self.left):
            self._task = asyncio.create_task(self._leave())
        finished, _ = await asyncio.wait([self._task], timeout=_ANSWER_S)
        if not finished:
            raise OutcomeUnknown("the node is still leaving; it ends when it has left")
        await self._task

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _leave(self) -> None:
        shard = self._shard
        self._check()
        shard.spaces.shut()
        try:
            await self._delete_segments()
            await self._sweep()
            self._check_coordinator()
        except BaseException:
            shard.spaces.reopen()
            raise
        if self.control is not None and shard.cluster is not None:
            await self.control.goodbye()
        self.left = True
        logger.info("left for good", shard=str(shard.uuid))
        self._done()

    def _check(self) -> None:
        self._check_coordinator()
        held = [space for space in self._shard.spaces if space.pages]
        if held:
            pages = sum(space.pages for space in held)
            where = ", ".join(
                f"{space.name} {space.pages} pages in {space.live_bytes} bytes" for space in held
            )
            raise Refused(
                f"this node still holds {pages} pages ({where}); free them or delete the spaces "
                "(vswap space delete) first",
                pages=pages, spaces={space.name: space.pages for space in held},
            )  # fmt: skip

    def _check_coordinator(self) -> None:
        if self._shard.cluster is None:
            return
        if self.control is None or not (self.control.connected or self.control.buried):
            raise Refused(
                "this node cannot leave its cluster while the coordinator is away: it has to be "
                "told (once it is back, and the node stopped, vswap node forget does it too)"
            )

    async def _delete_segments(self) -> None:
        """Until no row of a segment is left on any backend. Raises TierUnavailable."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _DELETE_S
        while left := [t for t in self._shard.tiers if t.ram is None and t.segments]:
            if loop.time() > deadline:
                tier = left[0]
                raise TierUnavailable(
                    f"{len(tier.segments)} segments in tier {tier.name} cannot be deleted"
                    + (f": {tier.error}" if tier.error else ""),
                    tier=tier.name, segments=len(tier.segments),
                )  # fmt: skip
            await self._shard.reaper.pass_once()
            await asyncio.sleep(_RETRY_S)

    async def _sweep(self) -> None:
        """What landed without being known; only this node deletes that from tiers of its own."""
        for tier in self._shard.tiers:
            try:
                await self._shard.sweep(tier)
                if tier.local and tier.redundant is not None:
                    tier.redundant.check_all_up()
            except VswapError as error:
                if tier.local:
                    raise
                # The coordinator sweeps the tiers of the cluster once the tombstone is set.
                logger.warning("sweep failed", tier=tier.name, error=str(error))
