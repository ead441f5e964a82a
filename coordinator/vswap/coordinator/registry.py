"""The cluster's tiers: adding, changing, removing, and their three states."""

from __future__ import annotations

from urllib.parse import urlsplit

from pydantic import ValidationError

from vswap.coordinator import sweeps
from vswap.coordinator.events import ActivateTier, AddTier, RemoveTier, SetTier
from vswap.coordinator.state import State, Tier, TierState
from vswap.coordinator.turn import Turn
from vswap.tiers.spec import TierSpec
from vswap.wire.errors import AlreadyExists, BackendRefused, BadConfig, Refused


def check_new(state: State, spec: TierSpec) -> None:
    """Raises what is wrong with a new tier, as far as it shows without its backend."""
    if spec.scheme in ("ram", "memory"):
        raise BadConfig(
            f"tier {spec.name}: {spec.scheme}:// lives inside one process and cannot be shared; "
            "configure it at the nodes",
            key="url",
        )
    if spec.name in state.tiers:
        raise AlreadyExists(f"tier {spec.name} exists already", name=spec.name)
    for tier in state.tiers.values():
        if _place(tier.spec) == _place(spec):
            raise AlreadyExists(
                f"tier {tier.spec.name} already lies at {tier.spec.safe_url}", name=tier.spec.name
            )
    for uuid, session in state.sessions.items():
        usage = session.usage.get(spec.name)
        if usage is not None and usage.local:
            raise AlreadyExists(
                f"node {state.name(uuid)} has a tier of its own named {spec.name}", name=spec.name
            )


def add(turn: Turn, event: AddTier) -> None:
    """The backend is fit."""
    spec = event.spec
    check_new(turn.state, spec)
    if not spec.capacity_bytes:
        raise BackendRefused(
            f"tier {spec.name}: its server names no limit of its own, so a capacity is needed",
            tier=spec.name,
        )
    turn.state.tiers[spec.name] = Tier(spec)
    turn.save("tier", spec.name)
    turn.new_generation()
    sweeps.look_for_strangers(turn, spec.name)


def change(turn: Turn, event: SetTier) -> None:
    """A smaller capacity breaks nothing: no new grants until enough was given back."""
    tier = turn.state.tier(event.name)
    wanted = {
        "capacity_bytes": event.capacity_bytes,
        "rank": event.rank,
        "high": event.high,
        "low": event.low,
    }
    fields = {name: value for name, value in wanted.items() if value is not None}
    if fields.get("capacity_bytes") == 0:
        raise BadConfig(f"tier {event.name}: a capacity must be positive", key="capacity_bytes")
    try:
        spec = TierSpec(**{**tier.spec.model_dump(), **fields})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise BadConfig(
            f"tier {event.name}: {key}: {first['msg']}".replace(": :", ":"), key=key
        ) from error
    if spec != tier.spec:
        tier.spec = spec
        turn.save("tier", event.name)
        turn.new_generation()


def remove(turn: Turn, event: RemoveTier) -> None:
    """Only what holds nothing of ours."""
    state = turn.state
    tier = state.tier(event.name)
    if tier.state is TierState.DRAINING:
        raise Refused(f"tier {event.name} is being drained", tier=event.name)
    if tier.state is TierState.ACTIVE and tier.used:
        raise Refused(
            f"tier {event.name} is in use; first: vswap drain {event.name}", tier=event.name
        )
    for job in state.running():
        if event.name in (job.tier, job.destination):
            raise Refused(f"{job.title} needs the tier", job=job.id)
    waiting = [state.name(uuid) for uuid, name in state.sweeps if name == event.name]
    if waiting:
        raise Refused(
            f"segments of {', '.join(sorted(waiting))} are still to be deleted on {event.name}",
            tier=event.name,
        )
    for uuid, name in [key for key in state.holds if key[1] == event.name]:
        turn.set_hold(uuid, name, 0, 0)
    del state.tiers[event.name]
    state.strangers.pop(event.name, None)
    state.listed_s.pop(event.name, None)
    turn.save("tier", event.name)
    turn.new_generation()


def activate(turn: Turn, event: ActivateTier) -> None:
    """Lets a drained tier take pages again."""
    tier = turn.state.tier(event.name)
    if tier.state is TierState.DRAINING:
        job = next(j for j in turn.state.running() if j.tier == event.name)
        raise Refused(
            f"tier {event.name} is being drained; first: vswap job cancel {job.id}", job=job.id
        )
    set_state(turn, event.name, TierState.ACTIVE)


def set_state(turn: Turn, name: str, new: TierState) -> int:
    """Returns the generation in which the tier has that state."""
    tier = turn.state.tiers[name]
    if tier.state is new:
        return turn.state.generation
    tier.state = new
    turn.save("tier", name)
    return turn.new_generation()


def _place(spec: TierSpec) -> tuple[str, str, str, str]:
    parts = urlsplit(spec.url)
    host = parts.netloc.rpartition("@")[2].lower()
    return parts.scheme, host, parts.path.rstrip("/"), parts.query
