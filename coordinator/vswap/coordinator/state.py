"""What the coordinator knows: O(tiers + nodes + jobs), never O(pages).

Two kinds of record. Those with a document (tiers, shards, holds, jobs, sweeps, the generation)
outlive the process: a change of theirs is on disk before anything that follows from it is sent.
The volatile ones (sessions, flights, strangers, cool-downs) are rebuilt from what nodes report.

Nothing here does I/O or looks at a clock. Time is monotonic seconds handed in, except the fields
called ``*_at``, which are wall time and only ever shown.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from vswap.tiers.spec import TierSpec
from vswap.v1 import common_pb2, coordinator_pb2
from vswap.wire.errors import UnknownJob, UnknownTier


class TierState(enum.StrEnum):
    """Names as in ``common.proto``."""

    ACTIVE = "TIER_STATE_ACTIVE"
    DRAINING = "TIER_STATE_DRAINING"
    DRAINED = "TIER_STATE_DRAINED"


class MoveKind(enum.StrEnum):
    """Names as in ``coordinator.proto``."""

    DRAIN = "MOVE_KIND_DRAIN"
    MIGRATE = "MOVE_KIND_MIGRATE"
    COMPACT = "MOVE_KIND_COMPACT"
    REPAIR = "MOVE_KIND_REPAIR"

    @property
    def word(self) -> str:
        return self.name.lower()


class JobState(enum.StrEnum):
    """Names as in ``coordinator.proto``."""

    RUNNING = "JOB_STATE_RUNNING"
    BLOCKED = "JOB_STATE_BLOCKED"
    DONE = "JOB_STATE_DONE"
    CANCELLED = "JOB_STATE_CANCELLED"
    FAILED = "JOB_STATE_FAILED"
    PLANNED = "JOB_STATE_PLANNED"

    @property
    def ended(self) -> bool:
        return self not in (JobState.RUNNING, JobState.BLOCKED)

    @property
    def word(self) -> str:
        return self.name.lower()


# ------------------------------------------------------------------ durable


@dataclass(slots=True)
class Tier:
    """A cluster tier. ``used``: a shard was granted bytes there since it was added."""

    spec: TierSpec
    state: TierState = TierState.ACTIVE
    used: bool = False


@dataclass(slots=True)
class Shard:
    """A node's shard. ``forgotten`` is its tombstone: the name is free again, the uuid never is."""

    uuid: str
    name: str
    address: str = ""
    version: str = ""
    incarnation: int = 0
    generation: int = 0
    forgotten: bool = False


@dataclass(slots=True)
class Hold:
    """One shard's bytes in one tier.

    ``granted`` is what it may hold from now on. ``held`` is what it may still believe it may hold:
    it rises with ``granted`` and falls only when the shard itself reports the lower figure. The sum
    of ``held`` over a tier never exceeds its capacity, unless the capacity was lowered.
    """

    granted: int = 0
    held: int = 0


@dataclass(slots=True)
class Moved:
    pages: int = 0
    bytes: int = 0
    logical_bytes: int = 0
    lost: int = 0
    """Pages that were given up."""

    def __add__(self, other: Moved) -> Moved:
        return Moved(
            self.pages + other.pages,
            self.bytes + other.bytes,
            self.logical_bytes + other.logical_bytes,
            self.lost + other.lost,
        )


@dataclass(slots=True)
class JobNode:
    """A shard's part of a job. A restarted node counts from 0: ``before`` is its earlier lives."""

    state: str = "running"
    reason: str = ""
    before: Moved = field(default_factory=Moved)
    life: Moved = field(default_factory=Moved)
    incarnation: int = 0
    bytes_left: int = 0
    pages_left: int = 0
    budget_bytes: int = 0
    """This shard's share of the job's byte budget; 0 where the job has none."""

    @property
    def moved(self) -> Moved:
        return self.before + self.life


@dataclass(slots=True)
class Job:
    id: str
    kind: MoveKind
    tier: str
    destination: str = ""
    byte_budget: int = 0
    older_than_s: float = 0.0
    target_utilisation: float = 0.9
    rate_bytes_s: int = 0
    lost: bool = False
    """Drain: what the tier does not have, or does not answer for, is given up."""
    automatic: bool = False
    state: JobState = JobState.RUNNING
    reason: str = ""
    generation: int = 0
    """Drain: the configuration that took the tier out of use."""
    bytes_total: int = 0
    room_bytes: dict[str, int] = field(default_factory=dict)
    created_at: float = 0.0
    ended_at: float = 0.0
    nodes: dict[str, JobNode] = field(default_factory=dict)
    """By shard uuid."""

    @property
    def title(self) -> str:
        onto = f" to {self.destination}" if self.destination else ""
        return f"job {self.id} ({self.kind.word} {self.tier}{onto})"


# ------------------------------------------------------------------ volatile


@dataclass(slots=True)
class Session:
    """A shard's latest stream. Kept when it ends, for what the shard said last."""

    stream: str
    open: bool
    last_seen_s: float
    fresh: bool = True
    """A message came within the lease."""
    settled_generation: int = 0
    """The generation that was acknowledged when the last report came in."""
    usage: dict[str, common_pb2.TierUsage] = field(default_factory=dict)
    ages: list[coordinator_pb2.AgeBucket] = field(default_factory=list)
    pages: int = 0
    fill_pages: int = 0

    @property
    def connected(self) -> bool:
        return self.open and self.fresh


@dataclass(slots=True)
class Flight:
    """What a running job needs only while this process lives."""

    samples: deque[tuple[float, int]] = field(default_factory=deque)
    """(time, bytes moved), over the last seconds: the rate."""
    sent: dict[str, coordinator_pb2.Directive] = field(default_factory=dict)
    """Last directive per shard uuid, on its present stream."""
    listing: bool = False
    list_again_s: float = 0.0
    leftover: str = ""
    """Drain: why the last listing did not end it."""
    clear: bool = False
    """Drain: the backend listed nothing of ours."""
    looked_s: dict[str, float] = field(default_factory=dict)
    """Per shard uuid: not told to look again before then."""
    saved_s: float = 0.0
    blocked_since_s: float | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """Segments that a listing found under one prefix."""

    prefix: str
    segments: int
    bytes: int


Key: TypeAlias = tuple[str, ...]
"""Names a document: ("tier", name), ("shard", uuid), ("hold", uuid, tier), ("job", id),
("sweep", uuid, tier), ("generation",)."""


@dataclass(slots=True)
class State:
    cluster: str
    """The cluster's uuid; the first component of every segment's name."""
    lease_s: float = 10.0
    generation: int = 1
    tiers: dict[str, Tier] = field(default_factory=dict)
    shards: dict[str, Shard] = field(default_factory=dict)
    holds: dict[tuple[str, str], Hold] = field(default_factory=dict)
    jobs: dict[str, Job] = field(default_factory=dict)
    sweeps: set[tuple[str, str]] = field(default_factory=set)
    """(shard uuid, tier): segments of a forgotten shard that are still to be deleted there."""

    sessions: dict[str, Session] = field(default_factory=dict)
    flights: dict[str, Flight] = field(default_factory=dict)
    strangers: dict[str, list[Found]] = field(default_factory=dict)
    sweeping: dict[tuple[str, str], float] = field(default_factory=dict)
    """Sweeps under way (infinity) or to be tried again at that time."""
    listed_s: dict[str, float] = field(default_factory=dict)
    """When a tier's strangers were last asked for."""
    quiet_until_s: dict[tuple[str, MoveKind], float] = field(default_factory=dict)
    """No automatic job of that kind on that tier before then."""

    # -------------------------------------------------------------- looking things up

    def tier(self, name: str) -> Tier:
        """Raises UnknownTier."""
        try:
            return self.tiers[name]
        except KeyError:
            known = ", ".join(sorted(self.tiers)) or "none"
            raise UnknownTier(
                f"the cluster has no tier named {name!r} (it has: {known})", tier=name
            ) from None

    def job(self, job_id: str) -> Job:
        """Raises UnknownJob."""
        try:
            return self.jobs[job_id]
        except KeyError:
            raise UnknownJob(f"no job {job_id!r} (see: vswap job list --all)", job=job_id) from None

    def flight(self, job: Job) -> Flight:
        return self.flights.setdefault(job.id, Flight())

    def ranked(self) -> list[Tier]:
        """Fast to slow."""
        return sorted(self.tiers.values(), key=lambda tier: (tier.spec.rank, tier.spec.name))

    def members(self) -> Iterator[Shard]:
        """Shards that have not been forgotten."""
        return (shard for shard in self.shards.values() if not shard.forgotten)

    def running(self) -> list[Job]:
        """Jobs that have not ended, oldest first."""
        return [job for job in self.jobs.values() if not job.state.ended]

    def name(self, uuid: str) -> str:
        shard = self.shards.get(uuid)
        return shard.name if shard is not None else uuid

    def connected(self, uuid: str) -> bool:
        session = self.sessions.get(uuid)
        return session is not None and session.connected

    # -------------------------------------------------------------- adding things up

    def hold(self, uuid: str, tier: str) -> Hold:
        return self.holds.get((uuid, tier), Hold())

    def usage(self, uuid: str, tier: str) -> common_pb2.TierUsage | None:
        """What the shard last said of the tier, its own or the cluster's; None if nothing."""
        session = self.sessions.get(uuid)
        return None if session is None else session.usage.get(tier)

    def stored(self, uuid: str, tier: str) -> int:
        """Bytes the shard has in a cluster tier; if it said nothing since we started, its grant."""
        if uuid not in self.sessions:
            return self.hold(uuid, tier).held
        usage = self.usage(uuid, tier)
        return 0 if usage is None or usage.local else int(usage.stored_bytes)

    def live(self, uuid: str, tier: str) -> int:
        """Live bytes, likewise."""
        if uuid not in self.sessions:
            return self.hold(uuid, tier).held
        usage = self.usage(uuid, tier)
        return 0 if usage is None else int(usage.live_bytes)

    def held_bytes(self, tier: str) -> int:
        return sum(hold.held for (_, name), hold in self.holds.items() if name == tier)

    def stored_bytes(self, tier: str) -> int:
        """Over all members, and what forgotten ones left and nobody has swept yet."""
        stored = sum(self.stored(shard.uuid, tier) for shard in self.members())
        return stored + sum(
            self.hold(uuid, name).held for uuid, name in self.sweeps if name == tier
        )
