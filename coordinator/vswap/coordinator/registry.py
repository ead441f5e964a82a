"""The cluster's tiers: adding, changing, removing, and their three states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError

from vswap.coordinator import sweeps
from vswap.coordinator.events import ActivateTier, AddTier, RemoveTier, SetTier
from vswap.coordinator.state import State, Tier, TierState
from vswap.coordinator.turn import Turn
from vswap.tiers.spec import TierSpec, redacted
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
    places = [_place(url) for url in spec.servers]
    if len(set(places)) < len(places):
        raise BadConfig(f"tier {spec.name}: urls names a server twice", key="urls")
    _check_free(state, spec.servers)
    for uuid, session in state.sessions.items():
        usage = session.usage.get(spec.name)
        if usage is not None and usage.local:
            raise AlreadyExists(
                f"node {state.name(uuid)} has a tier of its own named {spec.name}", name=spec.name
            )


def _check_free(state: State, urls: Sequence[str]) -> None:
    """Raises AlreadyExists where a tier lies at one of these already."""
    for tier in state.tiers.values():
        for url in tier.spec.servers:
            if any(_place(url) == _place(wanted) for wanted in urls):
                raise AlreadyExists(
                    f"tier {tier.spec.name} already lies at {redacted(url)}", name=tier.spec.name
                )


def check_replacement(state: State, event: SetTier) -> TierSpec:
    """The tier with the other server in its place. Raises what speaks against it."""
    assert event.replace is not None
    spec = state.tier(event.name).spec
    old, new = event.replace
    places = [_place(url) for url in spec.servers]
    if not spec.redundant or _place(old) not in places:
        raise BadConfig(
            f"tier {spec.name} is not spread over {redacted(old)} (it lies at {spec.safe_url})",
            key="replace",
        )
    _check_free(state, [new])
    place = places.index(_place(old))
    if not event.force:
        _check_dispensable(state, spec, place)
    urls = [*spec.servers[:place], new, *spec.servers[place + 1 :]]
    try:
        return TierSpec(**{**spec.model_dump(), "urls": tuple(urls)})
    except ValidationError as error:
        raise BadConfig(f"tier {spec.name}: {error.errors()[0]['msg']}", key="replace") from error


def _check_dispensable(state: State, spec: TierSpec, place: int) -> None:
    """Raises Refused where a server has what no other has, as nodes said last, or nobody knows."""
    name, shown = spec.name, redacted(spec.servers[place])
    lost, blind, silent = [], [], []
    for shard in sorted(state.members(), key=lambda shard: shard.name):
        usage = state.usage(shard.uuid, name)
        if usage is None and state.hold(shard.uuid, name).held:
            silent.append(shard.name)
        if usage is None or place >= len(usage.servers):
            continue
        if usage.servers[place].only_here:
            lost.append(f"{usage.servers[place].only_here} of {shard.name}")
        if sum(not s.up for i, s in enumerate(usage.servers) if i != place) >= spec.shape[1]:
            blind.append(shard.name)
    if lost:
        raise Refused(
            f"{shown} has the only good part of segments of tier {name} ({', '.join(lost)}): "
            "repair the tier first, or lose their pages with --force",
            tier=name,
        )
    if blind:
        raise Refused(
            f"as many other servers of tier {name} are down as may be ({', '.join(blind)} says): "
            f"what is written now is on {shown} and has no part to spare; wait until they are "
            "back, or risk it with --force",
            tier=name,
        )
    if silent:
        raise Refused(
            f"{', '.join(silent)} may have pages whose only good part is on {shown}, and is "
            "absent: start it first, or risk them with --force",
            tier=name,
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
    fields: dict[str, Any] = {name: value for name, value in wanted.items() if value is not None}
    if event.replace is not None:
        fields["urls"] = check_replacement(turn.state, event).urls
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


def _place(url: str) -> tuple[str, str, str, str]:
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2].lower()
    return parts.scheme, host, parts.path.rstrip("/"), parts.query
