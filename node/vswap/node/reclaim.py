"""Reclaim: keeps the node's own tiers below their watermarks.

Above ``high`` a tier is cleaned in the background until ``low``; a store that finds all its RAM
tiers full waits for that (direct reclaim). A tier with much garbage is compacted in place; else its
oldest segments are demoted to the next slower tier with room, hot records getting a second chance.
The cluster's tiers are balanced by the coordinator instead.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import structlog

from vswap.node.choose import Choosers
from vswap.node.evacuator import Evacuator, Moved
from vswap.node.grants import Grants
from vswap.node.handles import Handles
from vswap.node.pacer import Pacer
from vswap.node.tier import Tier
from vswap.node.tiers import Tiers
from vswap.tiers.record import I64
from vswap.tiers.victims import cost_benefit

_ROUND_SEGMENTS = 8
_FRUITLESS_ROUNDS = 6
_GARBAGE_SHARE = 0.25
"""From this share of dead bytes on, a RAM tier is compacted before anything is demoted."""
_SPARSE, _TIDY = 0.3, 0.4
"""A RAM tier with less than the first share of live bytes is compacted up to the second."""
_FEW_BLOCKS = 8
_REPAIR_BYTES_S = 64 * 2**20
_REPAIR_AGAIN_S = 5.0
_MOST_LIVE = 0.8
"""A segment fuller than this is not worth compacting."""

logger = structlog.get_logger("vswap.node.reclaim")


class Reclaim:
    """Event loop only. One task per tier at most."""

    def __init__(
        self,
        handles: Handles,
        tiers: Tiers,
        evacuator: Evacuator,
        choosers: Choosers,
        grants: Grants,
        *,
        live_bytes: Callable[[int], int],
        clock: Callable[[], float],
        make_pacer: Callable[[int], Pacer],
    ) -> None:
        self._handles = handles
        self._tiers = tiers
        self._evacuator = evacuator
        self._choosers = choosers
        self._grants = grants
        self._live_bytes = live_bytes
        self._clock = clock
        self._make_pacer = make_pacer
        self._tasks: dict[int, asyncio.Task[int]] = {}
        self._retry_at: dict[int, float] = {}
        self.counters: Counter[str] = Counter()
        self.closed = False

    def poke(self) -> None:
        """Starts background reclaim where a tier is above its high watermark, or is RAM that holds
        more garbage than pages. Cheap."""
        for tier in self._tiers.ranked:
            if (
                not tier.local
                or tier.tag in self._tasks
                or self._clock() < self._retry_at.get(tier.tag, 0.0)
            ):
                continue
            if tier.fullness > tier.spec.high:
                self._start(tier, self._clean(tier))
            elif tier.ram is not None and self._live_share(tier) < _SPARSE:
                self._start(tier, self._tidy(tier))

    def mend(self, tier: Tier, degraded: I64) -> None:
        """Writes degraded segments of one of the node's own tiers again, in the background."""
        idle = tier.tag not in self._tasks and self._clock() >= self._retry_at.get(tier.tag, 0.0)
        if len(degraded) and idle:
            self._start(tier, self._rewrite(tier, degraded.tolist()))

    async def _rewrite(self, tier: Tier, segments: list[int]) -> int:
        before = tier.stored_bytes
        moved = await self._evacuator.evacuate(
            tier, segments, self._choosers.rewrite(), pacer=self._make_pacer(_REPAIR_BYTES_S)
        )
        self.counters["repaired_pages"] += moved.pages
        if moved.error is not None:
            logger.warning("repair hindered", tier=tier.name, error=str(moved.error))
            self._retry_at[tier.tag] = self._clock() + _REPAIR_AGAIN_S
        return before - tier.stored_bytes

    def _live_share(self, tier: Tier) -> float:
        """Of the blocks beyond a few; 1 where there are no more than these."""
        assert tier.ram is not None
        beyond = tier.stored_bytes - _FEW_BLOCKS * tier.ram.block_bytes
        return self._live_bytes(tier.tag) / beyond if beyond > 0 else 1.0

    async def _tidy(self, tier: Tier) -> int:
        """Compacts a RAM tier that has room: to write on in memory that is mapped already costs
        less than fresh memory does, and what is not needed can be given back."""
        before = tier.stored_bytes
        while self._live_share(tier) < _TIDY and not self.closed:
            start = tier.stored_bytes
            moved = await self._compact(tier)
            if moved is None or not moved.pages or tier.stored_bytes >= start:
                self._retry_at[tier.tag] = self._clock() + 0.5
                break
        return before - tier.stored_bytes

    async def make_room(self, wanted: list[tuple[Tier, int]]) -> bool:
        """Direct reclaim: waits until one of these full RAM tiers has room for its bytes.

        False = hopeless: the bytes can never fit, or cleaning frees nothing.
        """
        fitting = {
            tier: need for tier, need in wanted
            if tier.ram and need <= tier.limit_bytes - tier.reserve_bytes - tier.ram.block_bytes
        }  # fmt: skip
        if not fitting:
            return False
        self.counters["direct_reclaims"] += 1
        await asyncio.sleep(0)
        tasks = [self._running(tier) or self._start(tier, self._clean(tier)) for tier in fitting]
        while not any(self._has_room(tier, need) for tier, need in fitting.items()):
            if all(task.done() for task in tasks):
                return any(_freed(task) > 0 for task in tasks)
            for tier in fitting:
                tier.room_changed.clear()
            waits = [asyncio.create_task(tier.room_changed.wait()) for tier in fitting]
            running = [task for task in tasks if not task.done()]
            try:
                await asyncio.wait([*running, *waits], return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
        return True

    def _running(self, tier: Tier) -> asyncio.Task[int] | None:
        task = self._tasks.get(tier.tag)
        return None if task is None or task.done() else task

    def _has_room(self, tier: Tier, need_bytes: int) -> bool:
        assert tier.ram is not None
        blocks = -(-need_bytes // (tier.ram.block_bytes - 65536))
        return tier.room() >= blocks * tier.ram.block_bytes

    def _start(self, tier: Tier, work: Coroutine[Any, Any, int]) -> asyncio.Task[int]:
        task = asyncio.create_task(work, name=f"reclaim {tier.name}")
        self._tasks[tier.tag] = task
        task.add_done_callback(lambda ended: self._ended(tier.tag, ended))
        return task

    def _ended(self, tag: int, task: asyncio.Task[int]) -> None:
        if self._tasks.get(tag) is task:
            del self._tasks[tag]
        if not task.cancelled() and task.exception() is not None:
            logger.error("reclaim failed unexpectedly", exc_info=task.exception())

    async def _clean(self, tier: Tier) -> int:
        """Cleans a tier down to ``low``; returns the bytes that became free."""
        before = tier.stored_bytes
        target = tier.spec.low * tier.limit_bytes
        if tier.ram is not None:
            # Stores stop at the reserve: below that there must be room for them.
            spare = tier.reserve_bytes + 2 * tier.ram.block_bytes
            target = min(target, max(tier.limit_bytes - spare, tier.limit_bytes // 4))
        most_freed = fruitless = 0
        while tier.stored_bytes > target and not self.closed:
            start = tier.stored_bytes
            moved = await self._round(tier)
            freed = start - tier.stored_bytes
            most_freed = max(most_freed, before - tier.stored_bytes)
            if moved.error is not None:
                logger.debug("reclaim hindered", tier=tier.name, error=str(moved.error))
            # Moving without freeing can be a step towards it (a slower tier was compacted, hot
            # records changed their block), but must not go on for ever.
            fruitless = 0 if freed > 0 else fruitless + 1
            if fruitless and (moved.pages == 0 or fruitless >= _FRUITLESS_ROUNDS):
                self._retry_at[tier.tag] = self._clock() + 0.5
                break
        return most_freed

    async def _round(self, tier: Tier) -> Moved:
        segments = np.array(self._evacuator.movable(tier), np.int64)
        if not len(segments) and tier.ram is not None:
            # A tiny tier: all there is lies in the open blocks.
            self._tiers.ram_log(tier).seal()
            segments = np.array(self._evacuator.movable(tier), np.int64)
        if not len(segments):
            return Moved()
        live = self._handles.live_bytes[segments]
        stored = self._handles.rows["stored"][segments].astype(np.int64)
        if 1.0 - live.sum() / max(int(stored.sum()), 1) > _GARBAGE_SHARE:
            moved = await self._compact(tier)
            if moved is not None and moved.pages:
                return moved
        slower = self._tiers.slower(tier)
        for target in slower:
            self._grants.ahead(target, int(live[:_ROUND_SEGMENTS].sum()))
        if not await self._any_room(slower):
            # Nothing below has room: dead records there are all that can still give some.
            for target in [tier, *slower]:
                moved = await self._compact(target) if target.writable else None
                if moved is not None and moved.pages:
                    return moved
            return Moved()
        self.counters["demotions"] += 1
        choose = self._choosers.first_fit(lambda: self._tiers.slower(tier), second_chance=True)
        return await self._evacuator.evacuate(tier, segments[:_ROUND_SEGMENTS].tolist(), choose)

    async def _any_room(self, targets: list[Tier]) -> bool:
        if any(t.writable and self._free(t) >= t.backend.segment_bytes for t in targets):
            return True
        for target in targets:
            if await self._grants.want(target, 2 * target.backend.segment_bytes):
                return True
        return False

    def _free(self, tier: Tier) -> int:
        return tier.room() - self._evacuator.promised[tier.tag]

    async def _compact(self, tier: Tier) -> Moved | None:
        """Rewrites the worst segments of a tier in place; None where none is worth it."""
        segments = np.array(self._evacuator.movable(tier), np.int64)
        live = self._handles.live_bytes[segments]
        stored = self._handles.rows["stored"][segments].astype(np.int64)
        age = self._clock() - self._handles.rows["born"][segments]
        order = cost_benefit(live, stored, age)
        order = order[live[order] < _MOST_LIVE * stored[order]][:_ROUND_SEGMENTS]
        if not len(order):
            return None
        self.counters["local_compactions"] += 1
        return await self._evacuator.evacuate(
            tier, segments[order].tolist(), self._choosers.rewrite()
        )

    async def close(self) -> None:
        self.closed = True
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _freed(task: asyncio.Task[int]) -> int:
    return 0 if task.cancelled() or task.exception() is not None else task.result()
