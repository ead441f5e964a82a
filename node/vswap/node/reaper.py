"""The reaper: deletes segments that nothing points at and nobody reads.

A segment goes SEALED (or OPEN) -> DELETING -> deleted on the backend -> FREE. Deletion is off every
other path, batched, and repeated until the backend confirms it. Each tier has a task of its own, so
that one which does not answer holds up its own segments alone.

What was given up while it was being written may still land: it is deleted at once, its row kept for
a while, and deleted once more. The same is done with a segment that dies soon after it was stored
without some server's part. So a tier is not empty before nothing can land there any more.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable

import structlog

from vswap.node.handles import DELETING, OPEN, SEALED, Handles
from vswap.node.tier import Tier
from vswap.tiers.record import I64
from vswap.wire.errors import VswapError

_BATCH = 64
_RETRY_S = 1.0
LATE_S = 10.0
"""How long after it was given up, or its writer died, a write is expected to land; no protocol
gives a bound. What lands even later is left to the sweep."""

logger = structlog.get_logger("vswap.node.reaper")


class Reaper:
    """Event loop only. ``is_head`` tells that a segment is still being appended to."""

    def __init__(
        self, handles: Handles, tier_of: Callable[[int], Tier], *, clock: Callable[[], float],
        late_s: float = LATE_S,
    ) -> None:  # fmt: skip
        self._handles = handles
        self._tier_of = tier_of
        self._clock = clock
        self._late_s = late_s
        self._queues: defaultdict[Tier, dict[int, float]] = defaultdict(dict)
        """By tier: segments, and when each may be forgotten."""
        self._late: dict[int, float] = {}
        """Segments of which a part may still land, and until when; oldest first."""
        self._began_s = clock()
        self._tasks: dict[Tier, asyncio.Task[None]] = {}
        self._started = False
        self.is_head: Callable[[int], bool] = lambda handle: False

    @property
    def pending(self) -> int:
        """Segments whose deletion has not been confirmed."""
        return sum(map(len, self._queues.values()))

    def pending_in(self, tier: Tier) -> int:
        return len(self._queues.get(tier, ()))

    def will_delete(self, handle: int) -> bool:
        return handle in self._queues.get(self._tier_of(handle), ())

    def unpin(self, handle: int) -> None:
        self._handles.pins[handle] -= 1
        self.consider(handle)

    def unpin_many(self, handles: I64) -> None:
        """Takes one pin each off distinct handles."""
        self._handles.pins[handles] -= 1
        dead = handles[(self._handles.live_records[handles] == 0)]
        for handle in dead.tolist():
            self.consider(handle)

    def consider(self, handle: int) -> None:
        """Deletes the segment if nothing needs it."""
        handles = self._handles
        if handles.live_records[handle] or handles.pins[handle] or self.is_head(handle):
            return
        if handles.state(handle) not in (OPEN, SEALED):
            return
        handles.set_state(handle, DELETING)
        tier = self._tier_of(handle)
        if tier.ram is not None:
            tier.ram.release(tier.segment_name(handle))
            self._forget(tier, handle)
        else:
            self.delete_later(handle, may_land=self._may_land(handle))

    def stored_in_part(self, handle: int) -> None:
        """A segment was stored, and what some server did not take of it may still land there."""
        now = self._clock()
        while self._late and (oldest := next(iter(self._late.items())))[1] <= now:
            del self._late[oldest[0]]
        self._late[handle] = now + self._late_s

    def _may_land(self, handle: int) -> bool:
        """Whether a part of a segment may land after it was deleted. Of an earlier life nobody
        knows how old they are."""
        until = self._late.pop(handle, None)
        if until is None and self._handles.rows["lacking"][handle]:
            until = self._began_s + self._late_s
        return until is not None and until > self._clock()

    def delete_later(self, handle: int, *, may_land: bool = False) -> None:
        """Queues a segment in state DELETING. ``may_land``: its write may still be under way."""
        tier = self._tier_of(handle)
        self._queues[tier][handle] = self._clock() + self._late_s if may_land else 0.0
        self._work_on(tier)

    def start(self) -> None:
        """From here on what is queued is deleted."""
        self._started = True
        for tier in self._queues:
            self._work_on(tier)

    async def close(self) -> None:
        self._started = False
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _work_on(self, tier: Tier) -> None:
        if self._started and tier not in self._tasks:
            self._tasks[tier] = asyncio.create_task(self._run(tier))

    async def _run(self, tier: Tier) -> None:
        """Until nothing of the tier is queued."""
        try:
            while self._queues[tier]:
                try:
                    done = await self._delete(tier)
                except Exception:
                    logger.exception("deleting failed unexpectedly", tier=tier.name)
                    done = False
                if not done:
                    await asyncio.sleep(_RETRY_S)
            del self._queues[tier]
        finally:
            del self._tasks[tier]

    async def pass_once(self) -> bool:
        """One attempt at everything queued; False if some of it must be tried again."""
        return all(await asyncio.gather(*map(self._delete, list(self._queues))))

    async def _delete(self, tier: Tier) -> bool:
        if not tier.opened or tier.fenced:
            # Failing here would put off its opening, again and again.
            return False
        queue, done = self._queues[tier], True
        handles = list(queue)
        for start in range(0, len(handles), _BATCH):
            batch = handles[start : start + _BATCH]
            began_s = self._clock()
            names = [tier.segment_name(handle) for handle in batch]
            try:
                await tier.backend.delete(names)
            except VswapError as error:
                tier.failed(error)
                logger.warning("delete failed, will repeat", tier=tier.name, error=str(error))
                return False
            for handle, name in zip(batch, names, strict=True):
                if handle in queue and tier.segment_name(handle) == name:
                    if queue[handle] > began_s:
                        done = False
                        continue
                    del queue[handle]
                    self._forget(tier, handle)
        return done

    def abandon(self, tier: Tier) -> None:
        """Forgets dead segments of a tier that is gone, whether they are deleted or not. Should it
        come back, a sweep finds them."""
        queue = self._queues.get(tier, {})
        for handle in list(queue):
            if not self._handles.pins[handle]:
                del queue[handle]
                self._forget(tier, handle)

    def _forget(self, tier: Tier, handle: int) -> None:
        tier.segments.pop(handle, None)
        tier.credit(int(self._handles.rows["stored"][handle]))
        self._handles.recycle(handle)
