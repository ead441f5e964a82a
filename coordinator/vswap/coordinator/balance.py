"""What the coordinator starts by itself: repair, compaction, moving pages down from full tiers.

All look at what the nodes report, act on one tier at a time, and then leave it alone for a while.
"""

from __future__ import annotations

from dataclasses import dataclass

from vswap.coordinator import jobs, room
from vswap.coordinator.events import StartJob
from vswap.coordinator.state import JobState, MoveKind, State, Tier, TierState
from vswap.coordinator.turn import Turn
from vswap.wire.errors import VswapError

_QUIET_S = 30.0
_QUIET_REPAIR_S = 3.0
_PATIENCE_S = 60.0
_LEAST_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Policy:
    """When to start something. ``utilisation`` is live bytes over stored bytes."""

    balance: bool = True
    compact: bool = True
    compact_below_utilisation: float = 0.5
    compact_min_garbage_bytes: int = 64 * 2**20
    repair: bool = True
    repair_rate_bytes_s: int = 64 * 2**20


def consider(turn: Turn, policy: Policy, spare_id: str) -> None:
    """Starts at most one automatic job; gives up those that nothing moves any more."""
    state = turn.state
    for job in state.running():
        since_s = state.flight(job).blocked_since_s
        if job.automatic and since_s is not None and turn.now_s - since_s > _PATIENCE_S:
            jobs.finish(turn, job, JobState.CANCELLED, f"given up: {job.reason}")
    for tier in state.ranked():
        name = tier.spec.name
        if policy.repair and (repair := _repair(turn, tier, policy)) is not None:
            if _start(turn, repair, spare_id):
                return
            continue
        if tier.state is not TierState.ACTIVE or _busy(state, name):
            continue
        wanted = None
        if policy.compact and _quiet(turn, name, MoveKind.COMPACT):
            wanted = _compaction(state, tier, policy)
        if wanted is None and policy.balance and _quiet(turn, name, MoveKind.MIGRATE):
            wanted = _relief(state, tier)
        if wanted is not None and _start(turn, wanted, spare_id):
            return


def _start(turn: Turn, wanted: StartJob, spare_id: str) -> bool:
    quiet_s = _QUIET_REPAIR_S if wanted.kind is MoveKind.REPAIR else _QUIET_S
    turn.state.quiet_until_s[wanted.tier, wanted.kind] = turn.now_s + quiet_s
    try:
        jobs.start(
            turn,
            StartJob(
                id=f"auto-{wanted.kind.word}-{spare_id}",
                kind=wanted.kind,
                tier=wanted.tier,
                destination=wanted.destination,
                byte_budget=wanted.byte_budget,
                rate_bytes_s=wanted.rate_bytes_s,
                automatic=True,
            ),
        )
    except VswapError:
        # Refused for reasons that an operator would be told; nobody asked, so it waits.
        return False
    return True


def _repair(turn: Turn, tier: Tier, policy: Policy) -> StartJob | None:
    """As soon as a connected node has something that can be made better."""
    state, name = turn.state, tier.spec.name
    if tier.state is not TierState.ACTIVE or not _quiet(turn, name, MoveKind.REPAIR):
        return None
    if any(job.tier == name and job.kind is MoveKind.REPAIR for job in state.running()):
        return None
    for uuid, session in state.sessions.items():
        usage = state.usage(uuid, name)
        if session.connected and usage is not None and usage.repairable_bytes and not usage.local:
            return StartJob(
                id="", kind=MoveKind.REPAIR, tier=name, rate_bytes_s=policy.repair_rate_bytes_s
            )
    return None


def _compaction(state: State, tier: Tier, policy: Policy) -> StartJob | None:
    live, stored = _reported(state, tier.spec.name)
    if _server_down(state, tier.spec.name):
        # What is rewritten now would lack a part that what it replaces may have there.
        return None
    if stored - live < max(policy.compact_min_garbage_bytes, 1):
        return None
    if live >= policy.compact_below_utilisation * stored:
        return None
    return StartJob(id="", kind=MoveKind.COMPACT, tier=tier.spec.name)


def _server_down(state: State, name: str) -> bool:
    for uuid, session in state.sessions.items():
        usage = state.usage(uuid, name)
        if session.connected and usage is not None and not all(s.up for s in usage.servers):
            return True
    return False


def _relief(state: State, tier: Tier) -> StartJob | None:
    """Above ``high``: down to ``low``, into the next slower tier that has room for a good part."""
    spec = tier.spec
    live, stored = _reported(state, spec.name)
    if stored <= spec.high * spec.capacity_bytes:
        return None
    surplus = min(live, stored - int(spec.low * spec.capacity_bytes))
    reserved = room.reservations(state)
    ranked = state.ranked()
    for target in ranked[ranked.index(tier) + 1 :]:
        if target.state is not TierState.ACTIVE:
            continue
        name = target.spec.name
        promised = sum(taken for (_, where), taken in reserved.items() if where == name)
        capacity = target.spec.capacity_bytes
        below_high = int(target.spec.high * capacity) - state.stored_bytes(name) - promised
        budget = min(surplus, below_high)
        if budget >= _LEAST_BYTES:
            return StartJob(
                id="",
                kind=MoveKind.MIGRATE,
                tier=spec.name,
                destination=name,
                byte_budget=budget,
            )
    return None


def _reported(state: State, name: str) -> tuple[int, int]:
    """(live, stored) bytes on connected nodes: only they can move anything."""
    live = stored = 0
    for uuid, session in state.sessions.items():
        if session.connected:
            live += state.live(uuid, name)
            stored += state.stored(uuid, name)
    return live, stored


def _busy(state: State, name: str) -> bool:
    return any(name in (job.tier, job.destination) for job in state.running())


def _quiet(turn: Turn, name: str, kind: MoveKind) -> bool:
    """Whether the last automatic job of that kind is long enough ago."""
    return turn.now_s >= turn.state.quiet_until_s.get((name, kind), 0.0)
