"""Room: what fits where, and what running drains have reserved.

Reservations are not kept, they are worked out from the state whenever they are asked for: a drain's
need is what still lives in its tier, so it shrinks by itself as pages arrive elsewhere. All running
drains are served in the order in which they started, each shard from its own tiers first (nobody
else can use those), then from the cluster's, slow to fast as the nodes do it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vswap.coordinator.state import MoveKind, State, TierState
from vswap.tiers.files import FileBackend
from vswap.tiers.objects import ObjectBackend
from vswap.tiers.redis import RedisBackend
from vswap.tiers.redundancy import coded
from vswap.tiers.spec import TierSpec
from vswap.v1 import common_pb2

_LOCAL_SHARE = 0.9
"""Of a node's own tiers; new pages go there as well while a drain runs."""
_CLUSTER_SHARE = 0.98
_SEGMENTS_KEPT = 2
"""Nodes keep 2 % of what they hold, and at least two segments each, for compaction alone."""


@dataclass(slots=True)
class Fit:
    """How one tier's live bytes would be spread over the others."""

    need: int = 0
    short: int = 0
    """Bytes that fit nowhere."""
    room: dict[str, int] = field(default_factory=dict)
    """Usable room per destination before this tier's pages went there."""
    taken: dict[tuple[str, str], int] = field(default_factory=dict)
    """Bytes by (shard uuid, cluster tier)."""


def cluster_room(state: State, name: str) -> int:
    """Bytes that may still be stored in a cluster tier by anybody; real usage, not grants."""
    spec = state.tiers[name].spec
    nodes = sum(1 for _ in state.members())
    kept = _SEGMENTS_KEPT * nodes * _segment_bytes(spec)
    usable = min(int(spec.capacity_bytes * _CLUSTER_SHARE), spec.capacity_bytes - kept)
    return max(0, usable - state.stored_bytes(name))


def local_room(usage: common_pb2.TierUsage) -> int:
    """Bytes that a node may still take into a tier of its own."""
    if not usage.local or usage.state != common_pb2.TIER_STATE_ACTIVE:
        return 0
    return max(0, int(usage.limit_bytes * _LOCAL_SHARE) - int(usage.stored_bytes))


def fits(state: State, leaving: Sequence[str]) -> dict[str, Fit]:
    """How the tiers that are being left fit into the rest, in that order."""
    targets = [
        tier.spec
        for tier in reversed(state.ranked())
        if tier.state is TierState.ACTIVE and tier.spec.name not in leaving
    ]
    rooms = {spec.name: cluster_room(state, spec.name) for spec in targets}
    own: dict[tuple[str, str], int] = {}
    for uuid, session in state.sessions.items():
        if session.connected:
            for usage in sorted(session.usage.values(), key=lambda usage: -usage.rank):
                if usage.local:
                    own[uuid, usage.tier] = local_room(usage)
    result: dict[str, Fit] = {}
    for name in leaving:
        fit = result[name] = Fit(room=dict(rooms))
        for shard in state.members():
            need = state.live(shard.uuid, name)
            fit.need += need
            growth = _growth(state.usage(shard.uuid, name))
            for uuid, local in own:
                if uuid == shard.uuid:
                    factor = growth if _raw(state.usage(uuid, local)) else 1.0
                    part = min(need, int(own[uuid, local] / factor))
                    own[uuid, local] -= int(part * factor)
                    fit.room[local] = fit.room.get(local, 0) + part
                    need -= part
            for spec in targets:
                factor = growth if spec.codec == "none" else 1.0
                part = min(need, int(rooms[spec.name] / factor))
                rooms[spec.name] -= int(part * factor)
                need -= part
                if part:
                    fit.taken[shard.uuid, spec.name] = int(part * factor)
            fit.short += need
    return result


def onto(state: State, source: str, name: str, need: Mapping[str, int]) -> int:
    """How many of those bytes of ``source`` (by shard uuid) one destination can take."""
    if name in state.tiers:
        reserved = sum(taken for (_, tier), taken in reservations(state).items() if tier == name)
        left = max(0, cluster_room(state, name) - reserved)
        raw = state.tiers[name].spec.codec == "none"
        total = 0
        for uuid, part in need.items():
            factor = _growth(state.usage(uuid, source)) if raw else 1.0
            fitting = min(part, int(left / factor))
            left -= int(fitting * factor)
            total += fitting
        return total
    total = 0
    for uuid, part in need.items():
        usage = state.usage(uuid, name)
        if usage is not None and state.connected(uuid):
            factor = _growth(state.usage(uuid, source)) if _raw(usage) else 1.0
            total += min(part, int(local_room(usage) / factor))
    return total


def draining(state: State) -> list[str]:
    """Tiers that running drains are emptying, in the order in which they began."""
    return [job.tier for job in state.running() if job.kind is MoveKind.DRAIN]


def reservations(state: State) -> dict[tuple[str, str], int]:
    """Bytes promised to running drains, by (shard uuid, cluster tier)."""
    total: dict[tuple[str, str], int] = {}
    leaving = draining(state)
    if leaving:
        for fit in fits(state, leaving).values():
            for key, taken in fit.taken.items():
                total[key] = total.get(key, 0) + taken
    return total


def _segment_bytes(spec: TierSpec) -> int:
    if spec.redundant:
        data, _ = spec.shape
        least = min(map(_segment_bytes, spec.members()))
        return least if data == 1 else coded.segment_bytes(least, data)
    if spec.scheme.startswith("redis"):
        return RedisBackend.segment_bytes
    return FileBackend.segment_bytes if spec.scheme == "file" else ObjectBackend.segment_bytes


def _growth(usage: common_pb2.TierUsage | None) -> float:
    """How much larger the pages of that usage are when they are not compressed."""
    if usage is None or not usage.live_bytes:
        return 1.0
    return max(1.0, usage.logical_bytes / usage.live_bytes)


def _raw(usage: common_pb2.TierUsage | None) -> bool:
    """Whether a node's own tier keeps pages uncompressed: nobody tells, but its bytes do."""
    return usage is not None and usage.pages > 0 and usage.live_bytes >= usage.logical_bytes
