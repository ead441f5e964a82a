"""Directives: the coordinator's jobs, as far as this node carries them out.

A directive is idempotent and keeps no state of its own: what is left to do is read off the tiers,
so a restart of either side just starts it again.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import structlog

from vswap.node.choose import Choosers
from vswap.node.evacuator import Chooser, Evacuator, Moved
from vswap.node.grants import Grants
from vswap.node.handles import Handles
from vswap.node.ledger import Ledger
from vswap.node.lost import give_up
from vswap.node.pacer import Pacer
from vswap.node.reaper import Reaper
from vswap.node.sweep import Sweeper
from vswap.node.tier import Tier
from vswap.node.tiers import Tiers
from vswap.node.upkeep import Upkeep
from vswap.tiers.backend import Backend, prefix
from vswap.tiers.record import I64
from vswap.tiers.victims import below
from vswap.wire.errors import OutOfTiers, PageLost, TierUnavailable, UnknownTier, VswapError

_RETRY_S = 0.5
_ROUND_SEGMENTS = 48
_SILENT_S = 30.0
_SILENT_TIMEOUTS = 6
"""A tier that is being given up is silent for so long, and for so many of its timeouts."""


logger = structlog.get_logger("vswap.node.directives")


class MoveKind(enum.IntEnum):
    """Values as in ``coordinator.proto``."""

    DRAIN = 1
    MIGRATE = 2
    COMPACT = 3
    REPAIR = 40


@dataclass(frozen=True, slots=True)
class Directive:
    """See the message of the same name in ``coordinator.proto``."""

    job_id: str
    kind: MoveKind
    tier: str
    destination: str = ""
    byte_budget: int = 0
    older_than_s: float = 0.0
    target_utilisation: float = 0.9
    rate_bytes_s: int = 0
    lost: bool = False
    """Drain: give up what the tier does not have, or does not answer for."""


@dataclass(slots=True)
class Progress:
    """See ``DirectiveProgress`` in ``coordinator.proto``."""

    job_id: str
    state: str = "running"
    reason: str = ""
    moved: Moved = field(default_factory=Moved)
    pages_lost: int = 0
    silent_since: float | None = None
    """Since when a tier that is being given up has given nothing of what it holds."""
    late: set[int] = field(default_factory=set)
    """Segments, by serial, that could not be read: others come first."""
    pages_left: int = 0
    bytes_left: int = 0


class Directives:
    """Runs directives as tasks. Event loop only."""

    def __init__(
        self,
        handles: Handles,
        ledger: Ledger,
        tiers: Tiers,
        evacuator: Evacuator,
        choosers: Choosers,
        grants: Grants,
        sweeper: Sweeper,
        upkeep: Upkeep,
        reaper: Reaper,
        *,
        clock: Callable[[], float],
        make_pacer: Callable[[int], Pacer],
    ) -> None:
        self._handles = handles
        self._ledger = ledger
        self._tiers = tiers
        self._evacuator = evacuator
        self._choosers = choosers
        self._grants = grants
        self._sweeper = sweeper
        self._upkeep = upkeep
        self._reaper = reaper
        self._clock = clock
        self._make_pacer = make_pacer
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._directives: dict[str, Directive] = {}
        self._progress: dict[str, Progress] = {}
        self.changed: Callable[[], None] = lambda: None
        """Called when a directive ended or met an obstacle."""

    def start(self, directive: Directive) -> None:
        """Starts a directive, or changes a running one of the same job id."""
        if self._directives.get(directive.job_id) == directive:
            task = self._tasks.get(directive.job_id)
            if task is not None or self._progress[directive.job_id].state == "done":
                return
        old = self._tasks.pop(directive.job_id, None)
        if old is not None:
            old.cancel()
        progress = self._progress.setdefault(directive.job_id, Progress(directive.job_id))
        progress.state, progress.reason, progress.silent_since = "running", "", None
        self._directives[directive.job_id] = directive
        task = asyncio.create_task(self._run(directive, progress))
        task.add_done_callback(lambda ended: self._ended(ended, progress))
        self._tasks[directive.job_id] = task

    def _ended(self, task: asyncio.Task[None], progress: Progress) -> None:
        if task.cancelled() or task.exception() is None:
            return
        logger.error("a directive failed unexpectedly", exc_info=task.exception())
        progress.state, progress.reason = "failed", f"internal error: {task.exception()}"
        self.changed()

    def stop(self, job_id: str) -> None:
        """Ends a directive; what moved stays moved. Unknown ids are ignored."""
        task = self._tasks.pop(job_id, None)
        if task is not None:
            task.cancel()
        self._directives.pop(job_id, None)
        self._progress.pop(job_id, None)

    def progress(self) -> list[Progress]:
        for progress in self._progress.values():
            self._measure(self._directives[progress.job_id], progress)
        return list(self._progress.values())

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---------------------------------------------------------------- carrying out

    async def _run(self, directive: Directive, progress: Progress) -> None:
        pacer = self._make_pacer(directive.rate_bytes_s)
        source = self._tiers.find(directive.tier)
        if source is not None and source.ram is not None:
            self._tiers.ram_log(source).seal()
        work = {
            MoveKind.DRAIN: self._drain,
            MoveKind.MIGRATE: self._migrate,
            MoveKind.COMPACT: self._compact,
            MoveKind.REPAIR: self._repair,
        }[directive.kind]
        while True:
            try:
                tier = self._tiers.find(directive.tier)
                if tier is None:
                    done = True
                else:
                    done = await work(directive, tier, progress, pacer)
                error = progress.moved.error
            except VswapError as problem:
                done, error = False, problem
            if done:
                progress.state, progress.reason = "done", ""
                self._tasks.pop(directive.job_id, None)
                self.changed()
                return
            state, reason = ("waiting", str(error)) if error is not None else ("running", "")
            if (state, reason) != (progress.state, progress.reason):
                progress.state, progress.reason = state, reason
                self.changed()
            await asyncio.sleep(_RETRY_S if error is not None else 0)

    async def _drain(
        self, directive: Directive, tier: Tier, progress: Progress, pacer: Pacer
    ) -> bool:
        others = [t for t in self._tiers.ranked if t is not tier]
        slower = [t for t in others if t.spec.rank >= tier.spec.rank]
        faster = [t for t in reversed(others) if t.spec.rank < tier.spec.rank]
        # The others' reserve stays theirs: without it they could not be compacted afterwards.
        choose = self._choosers.first_fit(lambda: slower + faster)
        last = directive.lost and await self._silent_for_long(tier, progress)
        await self._move(
            tier, self._evacuator.movable(tier), choose, slower + faster, progress, pacer,
            thorough=last,
        )  # fmt: skip
        if directive.lost:
            await self._give_up(tier, progress, last=last)
        if tier.segments:
            if progress.moved.error is None and progress.moved.stayed:
                raise OutOfTiers(
                    f"no other tier has room for the pages of {tier.name}", tier=tier.name
                )
            await asyncio.sleep(0.05)
            return False
        try:
            await self._sweep_all(tier)
        except VswapError:
            if not directive.lost:
                raise
        return True

    async def _sweep_all(self, tier: Tier) -> None:
        """Sweeps every server of the tier: nobody looks at it again once it is drained."""
        backend = tier.redundant
        away = backend.down if backend is not None else 0
        await self._sweeper.sweep(tier)
        away |= backend.down if backend is not None else 0
        if away:
            raise TierUnavailable(
                f"{away.bit_count()} servers of tier {tier.name} are away, and may still hold "
                "segments", tier=tier.name,
            )  # fmt: skip

    async def _silent_for_long(self, tier: Tier, progress: Progress) -> bool:
        """Whether this round of a drain is the last for what the tier does not give. It is not
        while a server that was left out answers: that one is on its way back."""
        bound_s = max(_SILENT_S, _SILENT_TIMEOUTS * tier.spec.timeout_s)
        if progress.silent_since is None or self._clock() - progress.silent_since < bound_s:
            return False
        members = tier.redundant.members if tier.redundant is not None else []
        for member in members:
            if not member.up and await _answers(tier, member.backend):
                progress.silent_since = None
                return False
        return True

    async def _give_up(self, tier: Tier, progress: Progress, *, last: bool) -> None:
        """Gives up what a round of a drain tried to read in vain: segments that the tier does not
        have; after its ``last`` round those that it does not answer for; all if it is gone."""
        moved = progress.moved
        gone = False
        lost = {s for s, error in moved.unreadable.items() if isinstance(error, PageLost)}
        if moved.answered or not tier.segments:
            progress.silent_since = None
        elif progress.silent_since is None:
            progress.silent_since = self._clock()
        elif last:
            if tier.redundant is None:
                gone = not await _answers(tier, tier.backend)
            else:
                gone = not tier.opened
            if tier.opened:
                lost |= _asked_for(moved)
        # No other evacuation has them in hand; pinned, their handles stay theirs.
        movable = self._evacuator.movable(tier)
        handles = [h for h in movable if gone or self._handles.serial(h) in lost]
        if handles:
            pinned = np.array(handles, np.int64)
            self._handles.pins[pinned] += 1
            try:
                pages = await give_up(tier, handles, self._ledger)
            finally:
                self._reaper.unpin_many(pinned)
            progress.pages_lost += pages
            logger.error("gave up pages", tier=tier.name, pages=pages, answers=not gone)
        if last and not moved.answered:
            self._reaper.abandon(tier)

    async def _migrate(
        self, directive: Directive, tier: Tier, progress: Progress, pacer: Pacer
    ) -> bool:
        target = self._tiers.find(directive.destination)
        if target is None:
            raise UnknownTier(
                f"no tier named {directive.destination!r}", tier=directive.destination
            )
        choose = self._choosers.first_fit(lambda: [target])

        def budget() -> int:
            staged = self._evacuator.promised[target.tag]
            return directive.byte_budget - progress.moved.bytes - staged

        def spent() -> bool:
            return bool(directive.byte_budget) and budget() <= 0

        if directive.byte_budget:
            choose = self._choosers.within(choose, budget)
        before = progress.moved.pages
        segments = self._old_enough(tier, directive.older_than_s)
        await self._move(tier, segments, choose, [target], progress, pacer, until=spent)
        if progress.moved.error is not None:
            return False
        if spent():
            return True
        if not self._old_enough(tier, directive.older_than_s):
            return await self._others_done(tier)
        if progress.moved.pages == before:
            # What is left may not go there (a space forbids it) or finds no room.
            if target.room() < target.backend.segment_bytes:
                raise OutOfTiers(f"tier {target.name} has no room", tier=target.name)
            return True
        return False

    async def _compact(
        self, directive: Directive, tier: Tier, progress: Progress, pacer: Pacer
    ) -> bool:
        target = directive.target_utilisation
        segments, live, stored = self._columns(tier)
        picked = segments[below(live, stored, target)]
        if not len(picked):
            return await self._others_done(tier)
        before = (int(stored.sum()), len(segments))
        await self._move(tier, picked.tolist(), self._choosers.rewrite(), [tier], progress, pacer)
        if progress.moved.error is not None:
            return False
        segments, live, stored = self._columns(tier)
        return (int(stored.sum()), len(segments)) == before

    async def _repair(
        self, directive: Directive, tier: Tier, progress: Progress, pacer: Pacer
    ) -> bool:
        """Writes degraded segments again, as long as that makes them less so."""
        movable = set(self._evacuator.movable(tier))
        picked = [h for h in self._upkeep.repairable(tier).tolist() if h in movable]
        if not picked:
            return await self._others_done(tier)
        before = progress.moved.pages
        await self._move(tier, picked, self._choosers.rewrite(), [tier], progress, pacer)
        if progress.moved.error is None and progress.moved.pages == before:
            # What is left of them is being deleted, or read.
            await asyncio.sleep(0.05)
        return False

    async def _others_done(self, tier: Tier) -> bool:
        """Nothing is left to pick; what another evacuation has in hand may yet come back."""
        if not self._evacuator.busy_in(tier):
            return True
        await asyncio.sleep(0.05)
        return False

    async def _move(
        self, tier: Tier, segments: list[int], choose: Chooser, targets: list[Tier],
        progress: Progress, pacer: Pacer, until: Callable[[], bool] | None = None, *,
        thorough: bool = False,
    ) -> None:  # fmt: skip
        moved = progress.moved
        progress.late |= _asked_for(moved)
        if progress.late:
            segments = sorted(segments, key=lambda h: self._handles.serial(h) in progress.late)
        moved.stayed = 0
        moved.stopped = moved.hindered = None
        moved.answered = False
        moved.unreadable.clear()
        for start in range(0, len(segments), _ROUND_SEGMENTS):
            part = segments[start : start + _ROUND_SEGMENTS]
            need = int(self._handles.live_bytes[part].sum())
            await self._ready(targets, need, compacting=targets == [tier])
            await self._evacuator.evacuate(
                tier, part, choose, pacer=pacer, moved=moved, until=until, thorough=thorough
            )
            if moved.stopped is not None or (until is not None and until()):
                return

    async def _ready(self, targets: list[Tier], need_bytes: int, *, compacting: bool) -> None:
        """Has grants for the first writable cluster target where nothing else has room.

        Choosers want room for a whole segment beyond what is promised.
        """
        for target in targets:
            self._grants.ahead(target, min(need_bytes, 64 * 2**20))
        for target in targets:
            if not target.writable:
                continue
            need = need_bytes + (0 if compacting else target.backend.segment_bytes)
            promised = self._evacuator.promised[target.tag]
            if target.room(compacting=compacting) - promised >= need:
                return
            if await self._grants.want(target, need + promised):
                return

    # ---------------------------------------------------------------- looking

    def _columns(self, tier: Tier) -> tuple[I64, I64, I64]:
        segments = np.array(self._evacuator.movable(tier), np.int64)
        live = self._handles.live_bytes[segments]
        stored = self._handles.rows["stored"][segments].astype(np.int64)
        return segments, live, stored

    def _old_enough(self, tier: Tier, older_than_s: float) -> list[int]:
        latest = self._clock() - older_than_s
        born = self._handles.rows["born"]
        return [h for h in self._evacuator.movable(tier) if born[h] <= latest]

    def _measure(self, directive: Directive, progress: Progress) -> None:
        tier = self._tiers.find(directive.tier)
        if tier is None or progress.state == "done":
            progress.pages_left = progress.bytes_left = 0
            return
        if directive.kind is MoveKind.DRAIN:
            progress.pages_left = int(self._ledger.pages_by_tag[tier.tag])
            progress.bytes_left = int(self._ledger.bytes_by_tag[tier.tag])
            return
        segments, live, stored = self._columns(tier)
        if directive.kind is MoveKind.COMPACT:
            segments = segments[below(live, stored, directive.target_utilisation)]
        elif directive.kind is MoveKind.REPAIR:
            segments = self._upkeep.repairable(tier)
        else:
            segments = np.array(self._old_enough(tier, directive.older_than_s), np.int64)
        progress.bytes_left = int(self._handles.live_bytes[segments].sum())
        progress.pages_left = int(self._handles.live_records[segments].sum())
        if directive.kind is MoveKind.MIGRATE and directive.byte_budget:
            left = max(directive.byte_budget - progress.moved.bytes, 0)
            progress.bytes_left = min(progress.bytes_left, left)


def _asked_for(moved: Moved) -> set[int]:
    """What could not be read, but for what a breaker held back: of that nothing is known."""
    return {s for s, error in moved.unreadable.items() if "retry_after_s" not in error.fields}


async def _answers(tier: Tier, backend: Backend) -> bool:
    """Whether a server lists what the shard has there. No breaker spares it that question."""
    name = tier.segment_name(0)
    try:
        async for _ in backend.list(prefix(name.cluster, name.shard)):
            pass
    except VswapError:
        return False
    return True
