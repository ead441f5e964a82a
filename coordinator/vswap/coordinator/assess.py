"""Checking a job before it starts: pure, and all that a dry run is."""

from __future__ import annotations

import math

from vswap.coordinator import room
from vswap.coordinator.events import StartJob
from vswap.coordinator.state import Job, JobNode, JobState, MoveKind, Shard, State, TierState
from vswap.wire.errors import (
    AlreadyExists,
    InvalidRequest,
    OutOfTiers,
    Refused,
    UnknownTier,
)

_COMPACT_TO = 0.9


def plan(state: State, event: StartJob) -> Job:
    """The job as it would start, with its nodes and the room found for it. Changes nothing.

    Raises UnknownTier, AlreadyExists, Refused, OutOfTiers (with the figures), InvalidRequest.
    """
    job = Job(
        id=event.id,
        kind=event.kind,
        tier=event.tier,
        destination=event.destination if event.kind is MoveKind.MIGRATE else "",
        byte_budget=event.byte_budget if event.kind is MoveKind.MIGRATE else 0,
        older_than_s=event.older_than_s if event.kind is MoveKind.MIGRATE else 0.0,
        target_utilisation=event.target_utilisation or _COMPACT_TO,
        rate_bytes_s=event.rate_bytes_s,
        lost=event.lost,
        automatic=event.automatic,
        state=JobState.PLANNED,
    )
    if not 0 < job.target_utilisation <= 1:
        raise InvalidRequest("a target utilisation lies above 0 and is at most 1")
    if not (math.isfinite(job.older_than_s) and job.older_than_s >= 0):
        raise InvalidRequest("an age must be a number of seconds, 0 or more")
    if job.lost and job.kind is not MoveKind.DRAIN:
        raise InvalidRequest("only a drain can give pages up")
    conflicts(state, job)
    match job.kind:
        case MoveKind.DRAIN:
            _drain(state, job)
        case MoveKind.MIGRATE:
            _migrate(state, job)
        case MoveKind.COMPACT:
            _compact(state, job)
        case MoveKind.REPAIR:
            _repair(state, job)
    absent = sorted(state.name(uuid) for uuid in job.nodes if not state.connected(uuid))
    if absent:
        job.reason = f"absent: {', '.join(absent)}"
    return job


def conflicts(state: State, job: Job) -> list[Job]:
    """Automatic jobs that would give way. Raises AlreadyExists if one may not."""
    yielding = []
    for other in state.running():
        same = other.tier == job.tier and other.kind is job.kind
        drained = MoveKind.DRAIN in (job.kind, other.kind) and (
            job.tier in (other.tier, other.destination) or other.tier == job.destination
        )
        if not (same or drained):
            continue
        if not other.automatic or job.automatic:
            raise AlreadyExists(
                f"{other.title} is under way (vswap job cancel {other.id} ends it)",
                name=other.id,
            )
        yielding.append(other)
    return yielding


# ------------------------------------------------------------------ one kind each


def _drain(state: State, job: Job) -> None:
    if job.tier not in state.tiers and _local(state, job.tier):
        raise UnknownTier(
            f"{job.tier} is a node's own tier; only the cluster's tiers can be drained",
            tier=job.tier,
        )
    tier = state.tier(job.tier)
    if tier.state is TierState.DRAINED:
        raise Refused(f"tier {job.tier} is drained already", tier=job.tier)
    fits = room.fits(state, [*room.draining(state), job.tier])
    fit = fits[job.tier]
    short = sum(other.short for other in fits.values())
    # What is given up takes no room; for the rest nodes wait, and say so.
    if short and not job.lost:
        where = ", ".join(f"{name} {_size(size)}" for name, size in fit.room.items()) or "none"
        others = [name for name in fits if name != job.tier]
        shared = f" (shared with the drain of {', '.join(others)})" if others else ""
        raise OutOfTiers(
            f"cannot drain {job.tier}: it holds {_size(fit.need)} of live pages and the rest "
            f"lacks room for {_size(short)} of them; room{shared}: {where}",
            need=fit.need,
            short=short,
            room=fit.room,
            tiers=sorted(fit.room),
        )
    job.bytes_total, job.room_bytes = fit.need, fit.room
    for shard in state.members():
        if state.hold(shard.uuid, job.tier).granted or state.stored(shard.uuid, job.tier):
            job.nodes[shard.uuid] = _part(state, job, shard, state.live(shard.uuid, job.tier))


def _migrate(state: State, job: Job) -> None:
    if job.destination == job.tier:
        raise InvalidRequest("source and destination of a migration must differ")
    _source(state, job.tier)
    _destination(state, job.destination)
    available = {
        shard.uuid: amount
        for shard in state.members()
        if (amount := _older(state, shard.uuid, job.tier, job.older_than_s))
    }
    total = sum(available.values())
    need = {
        uuid: min(amount, math.ceil(job.byte_budget * amount / total))
        if job.byte_budget
        else amount
        for uuid, amount in available.items()
    }
    wanted = min(total, job.byte_budget) if job.byte_budget else total
    found = room.onto(state, job.tier, job.destination, need)
    if found < wanted:
        raise OutOfTiers(
            f"cannot migrate {_size(wanted)} from {job.tier} to {job.destination}: it has room "
            f"for {_size(found)} (--bytes asks for less)",
            need=wanted,
            room={job.destination: found},
            tiers=[job.destination],
        )
    job.bytes_total, job.room_bytes = wanted, {job.destination: found}
    for uuid, part in need.items():
        node = job.nodes[uuid] = _part(state, job, state.shards[uuid], part)
        node.budget_bytes = part if job.byte_budget else 0


def _compact(state: State, job: Job) -> None:
    _source(state, job.tier)
    for shard in state.members():
        usage = state.usage(shard.uuid, job.tier)
        stored = state.stored(shard.uuid, job.tier) if usage is None else int(usage.stored_bytes)
        if stored:
            rewritten = _rewritten(state.live(shard.uuid, job.tier), stored, job.target_utilisation)
            job.nodes[shard.uuid] = _part(state, job, shard, rewritten)
            job.bytes_total += rewritten


def _repair(state: State, job: Job) -> None:
    tier = state.tier(job.tier)
    if not tier.spec.redundant:
        raise InvalidRequest(f"tier {job.tier} has no redundancy: nothing can be repaired")
    degraded = 0
    for shard in state.members():
        usage = state.usage(shard.uuid, job.tier)
        if usage is None or usage.local:
            continue
        degraded += usage.degraded_segments
        if usage.repairable_bytes:
            job.nodes[shard.uuid] = _part(state, job, shard, int(usage.repairable_bytes))
            job.bytes_total += int(usage.repairable_bytes)
    if degraded and not job.nodes:
        raise Refused(
            f"tier {job.tier} has {degraded} degraded segments, and a repair would make none of "
            "them better before its servers are back or replaced",
            tier=job.tier,
        )


# ------------------------------------------------------------------ helpers


def _part(state: State, job: Job, shard: Shard, size_bytes: int) -> JobNode:
    """A node's part of the job, with the pages that so many live bytes are there on average."""
    usage = state.usage(shard.uuid, job.tier)
    pages = 0
    if usage is not None and usage.live_bytes:
        pages = round(usage.pages * size_bytes / usage.live_bytes)
    return JobNode(incarnation=shard.incarnation, bytes_left=size_bytes, pages_left=pages)


def _rewritten(live: int, stored: int, target: float) -> int:
    """Live bytes that a node moves at most to bring its share of a tier to a target utilisation.

    As if every segment were as well used as the average. Nodes take the worst first, which costs
    less.
    """
    excess = stored - live / target
    return math.ceil(excess * live / (stored - live)) if excess > 0 else 0


def _source(state: State, name: str) -> None:
    if name not in state.tiers:
        if not _local(state, name):
            state.tier(name)
    elif state.tiers[name].state is TierState.DRAINED:
        raise Refused(f"tier {name} is drained: nothing is there", tier=name)


def _destination(state: State, name: str) -> None:
    if not name:
        raise InvalidRequest("a migration needs a destination")
    if name in state.tiers:
        tier = state.tiers[name]
        if tier.state is not TierState.ACTIVE:
            raise Refused(
                f"tier {name} is {tier.state.name.lower()}; nothing goes there", tier=name
            )
    elif not _local(state, name):
        state.tier(name)


def _local(state: State, name: str) -> bool:
    """Whether a connected node has a tier of its own of that name."""
    return any(
        session.connected and name in session.usage and session.usage[name].local
        for session in state.sessions.values()
    )


def _older(state: State, uuid: str, tier: str, older_than_s: float) -> int:
    """Live bytes of the shard at least that old, or somewhat less old: ages come in steps."""
    live = state.live(uuid, tier)
    session = state.sessions.get(uuid)
    if session is None or not older_than_s:
        return live
    steps = [
        bucket
        for bucket in session.ages
        if bucket.tier == tier and bucket.older_than_s <= older_than_s
    ]
    if not steps:
        return live
    return int(max(steps, key=lambda bucket: bucket.older_than_s).live_bytes)


def _size(size_bytes: int) -> str:
    size = float(size_bytes)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
