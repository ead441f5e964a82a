"""What a shard tells of itself. Field names as in the proto messages of the same names."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vswap.node import entry
from vswap.node.handles import Handles
from vswap.node.ledger import Ledger
from vswap.node.lost import lost_pages
from vswap.node.reaper import Reaper
from vswap.node.tier import Tier, TierState
from vswap.node.tiers import Tiers
from vswap.node.upkeep import Upkeep

_AGES_S = (0, 60, 600, 3600, 6 * 3600, 24 * 3600, 7 * 24 * 3600)


@dataclass(frozen=True, slots=True)
class Server:
    """One of those that a redundant tier is spread over."""

    url: str
    up: bool
    error: str
    only_here: int


@dataclass(frozen=True, slots=True)
class TierUsage:
    tier: str
    pages: int
    logical_bytes: int
    live_bytes: int
    stored_bytes: int
    segments: int
    limit_bytes: int
    quarantined: int
    deleting: int
    available: bool
    local: bool
    state: TierState
    rank: int
    error: str
    degraded_segments: int
    degraded_bytes: int
    repairable_bytes: int
    lost_pages: int
    servers: list[Server]


@dataclass(frozen=True, slots=True)
class AgeBucket:
    tier: str
    older_than_s: int
    live_bytes: int


def tier_usage(tier: Tier, ledger: Ledger, reaper: Reaper, upkeep: Upkeep) -> TierUsage:
    degraded, live = upkeep.degraded(tier), ledger.handles.live_bytes
    members = tier.redundant.members if tier.redundant is not None else []
    return TierUsage(
        tier=tier.name,
        pages=int(ledger.pages_by_tag[tier.tag]),
        logical_bytes=int(ledger.logical_by_tag[tier.tag]),
        live_bytes=int(ledger.bytes_by_tag[tier.tag]),
        stored_bytes=tier.stored_bytes,
        segments=len(tier.segments),
        limit_bytes=tier.limit_bytes,
        quarantined=tier.quarantined,
        deleting=reaper.pending_in(tier),
        available=tier.available,
        local=tier.local,
        state=tier.state,
        rank=tier.spec.rank,
        error=tier.error,
        degraded_segments=len(degraded),
        degraded_bytes=int(live[degraded].sum()),
        repairable_bytes=int(live[upkeep.repairable(tier)].sum()),
        lost_pages=lost_pages(tier, ledger.handles, ledger),
        servers=[
            Server(member.label, member.up, member.error, upkeep.only_on(tier, place))
            for place, member in enumerate(members)
        ],
    )


def ages(tiers: Tiers, handles: Handles, now: float) -> list[AgeBucket]:
    """Live bytes by least age of their segment; cumulative."""
    buckets = []
    for tier in tiers:
        segments = np.fromiter(tier.segments, np.int64, len(tier.segments))
        age = now - handles.rows["born"][segments]
        live = handles.live_bytes[segments]
        buckets += [AgeBucket(tier.name, bound, int(live[age >= bound].sum())) for bound in _AGES_S]
    return buckets


def usable(tiers: Tiers, ledger: Ledger) -> tuple[int, int]:
    """Page bytes that can still be stored, and that could be stored in all: the pressure to watch.

    Room in every active tier, times how much a stored byte holds there now (tiers without pages
    yet: the overall ratio). Virtual slots never count. Returns (free, total).
    """
    overall_live = int(ledger.bytes_by_tag.sum())
    stored = slice(entry.FIRST_TIER, entry.LAST_TIER + 1)
    overall = int(ledger.logical_by_tag[stored].sum()) / overall_live if overall_live else 1.0
    free = used = 0
    for tier in tiers:
        logical = int(ledger.logical_by_tag[tier.tag])
        live = int(ledger.bytes_by_tag[tier.tag])
        used += logical
        if tier.state is not TierState.ACTIVE:
            continue
        ratio = logical / live if live else (1.0 if tier.codec.is_none else overall)
        # Dead bytes in stored segments are room too: compaction makes it.
        free += int((tier.room() + max(tier.stored_bytes - live, 0)) * ratio)
    return free, free + used
