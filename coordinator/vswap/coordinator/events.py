"""What happens to the coordinator, and what it wants done: the two sides of ``plan.step``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from vswap.coordinator.state import Found, Key, MoveKind
from vswap.tiers.spec import TierSpec
from vswap.v1 import coordinator_pb2
from vswap.wire.errors import VswapError


class Now(NamedTuple):
    """Decisions use ``mono_s``; ``wall_s`` is shown to people, so that a clock may jump."""

    mono_s: float
    wall_s: float


# ------------------------------------------------------------------ events: nodes


@dataclass(frozen=True, slots=True)
class NodeConnected:
    """Raises (from step) StaleIncarnation, AlreadyExists, Refused, InvalidRequest."""

    stream: str
    hello: coordinator_pb2.Hello


@dataclass(frozen=True, slots=True)
class NodeDisconnected:
    shard: str
    stream: str


@dataclass(frozen=True, slots=True)
class NodeSaid:
    """Any later message of a stream. Those of a superseded stream are ignored."""

    shard: str
    stream: str
    message: coordinator_pb2.NodeMessage


@dataclass(frozen=True, slots=True)
class Tick:
    """Time went by. ``spare_id`` names the one automatic job that may be started."""

    spare_id: str


# ------------------------------------------------------------------ events: operators


@dataclass(frozen=True, slots=True)
class AddTier:
    """The backend was opened and found fit. Raises AlreadyExists, BadConfig, BackendRefused."""

    spec: TierSpec


@dataclass(frozen=True, slots=True)
class SetTier:
    """None = unchanged. Raises UnknownTier, BadConfig."""

    name: str
    capacity_bytes: int | None = None
    rank: int | None = None
    high: float | None = None
    low: float | None = None
    replace: tuple[str, str] | None = None
    """(URL of a server, URL of the one in its place), which was opened and found fit."""
    force: bool = False


@dataclass(frozen=True, slots=True)
class RemoveTier:
    """Raises UnknownTier, Refused."""

    name: str


@dataclass(frozen=True, slots=True)
class ActivateTier:
    """Raises UnknownTier, Refused."""

    name: str


@dataclass(frozen=True, slots=True)
class StartJob:
    """``id`` is new. Raises UnknownTier, AlreadyExists, Refused, OutOfTiers, InvalidRequest."""

    id: str
    kind: MoveKind
    tier: str
    destination: str = ""
    byte_budget: int = 0
    older_than_s: float = 0.0
    target_utilisation: float = 0.0
    rate_bytes_s: int = 0
    lost: bool = False
    automatic: bool = False


@dataclass(frozen=True, slots=True)
class CancelJob:
    """Raises UnknownJob, Refused."""

    id: str


@dataclass(frozen=True, slots=True)
class ForgetNode:
    """By name or shard uuid. Raises UnknownNode, Refused."""

    node: str


# ------------------------------------------------------------------ events: answers of backends


@dataclass(frozen=True, slots=True)
class Listed:
    """A listing of everything of vswap on a tier, summed by ``vswap/{cluster}/{shard}/``."""

    tier: str
    job: str
    """The drain that asked; empty: only the strangers were of interest."""
    found: Sequence[Found]
    error: VswapError | None = None


@dataclass(frozen=True, slots=True)
class Swept:
    """A forgotten shard's segments on one tier are deleted, or could not be."""

    shard: str
    tier: str
    error: VswapError | None = None


Event: TypeAlias = (
    NodeConnected
    | NodeDisconnected
    | NodeSaid
    | Tick
    | AddTier
    | SetTier
    | RemoveTier
    | ActivateTier
    | StartJob
    | CancelJob
    | ForgetNode
    | Listed
    | Swept
)


# ------------------------------------------------------------------ actions


@dataclass(frozen=True, slots=True)
class Persist:
    """Documents to write (None: to delete) in one transaction, before any other action."""

    documents: tuple[tuple[Key, dict[str, Any] | None], ...]


@dataclass(frozen=True, slots=True)
class Send:
    shard: str
    stream: str
    message: coordinator_pb2.CoordinatorMessage


@dataclass(frozen=True, slots=True)
class CloseStream:
    """``error`` goes to the node as the status of its stream; None ends it well."""

    shard: str
    stream: str
    error: VswapError | None


@dataclass(frozen=True, slots=True)
class ListBackend:
    """Answered by Listed. ``prefix`` as in ``vswap.tiers.backend.prefix``."""

    tier: str
    prefix: str
    job: str


@dataclass(frozen=True, slots=True)
class DeleteSegments:
    """Delete all segments of a forgotten shard on a tier. Answered by Swept."""

    tier: str
    shard: str


@dataclass(frozen=True, slots=True)
class Notify:
    """A job changed in a way its watchers want to see at once."""

    job: str


Action: TypeAlias = Persist | Send | CloseStream | ListBackend | DeleteSegments | Notify
