"""Grants: which shard may hold how many bytes in which tier.

The invariant is that the sum of what shards may believe they hold (``Hold.held``) never exceeds the
capacity, whatever is lost or killed in between:

1  a raise is on disk before it is sent, so no restart forgets it
2  a lowering counts only when a report of the shard shows the lower figure; until then ``held``
   stays. A report may be older than our last grant, so only one that equals it proves anything;
   that suffices because nothing but the shard's own request, or an empty drained tier, lowers
3  at a hello, what the shard says it holds counts if it is more
"""

from __future__ import annotations

from collections.abc import Iterable

from vswap.coordinator.room import reservations
from vswap.coordinator.state import Session, State, TierState
from vswap.coordinator.turn import Turn
from vswap.v1 import coordinator_pb2


def at_hello(turn: Turn, uuid: str, grants: Iterable[coordinator_pb2.Grant]) -> None:
    """Squares our books with what the shard holds, and tells it where they differ."""
    state = turn.state
    reported = {grant.tier: int(grant.total_bytes) for grant in grants}
    for name in state.tiers:
        hold = state.hold(uuid, name)
        believed = reported.get(name, 0)
        granted = max(hold.granted, state.stored(uuid, name))
        turn.set_hold(uuid, name, granted, max(hold.held, believed))
        if granted != believed:
            turn.send_grant(uuid, name)


def at_report(turn: Turn, uuid: str, grants: Iterable[coordinator_pb2.Grant]) -> None:
    """Lets ``held`` fall to what the shard now confirms."""
    state = turn.state
    reported = {grant.tier: int(grant.total_bytes) for grant in grants}
    for name in state.tiers:
        hold = state.hold(uuid, name)
        believed = reported.get(name, 0)
        granted = max(hold.granted, state.stored(uuid, name))
        held = granted if believed == granted else max(hold.held, believed)
        turn.set_hold(uuid, name, granted, held)


def request(turn: Turn, uuid: str, name: str, total_bytes: int) -> None:
    """Answers a request: as much of it as there is room for. Always answers, the node waits."""
    state = turn.state
    tier = state.tiers.get(name)
    if tier is not None:
        hold = state.hold(uuid, name)
        if total_bytes <= hold.granted:
            granted = max(total_bytes, state.stored(uuid, name))
        elif tier.state is not TierState.ACTIVE:
            granted = hold.granted
        else:
            # Room that the shard may still believe to have needs no new room.
            most = hold.held + max(0, free_bytes(state, uuid, name))
            granted = max(hold.granted, min(total_bytes, most))
        turn.set_hold(uuid, name, granted, hold.held)
    turn.send_grant(uuid, name)


def take_away(turn: Turn, uuid: str, name: str) -> None:
    """The shard is empty there and has promised to write nothing: it needs no grant."""
    turn.set_hold(uuid, name, 0, turn.state.hold(uuid, name).held)
    turn.send_grant(uuid, name)


def free_bytes(state: State, uuid: str, name: str) -> int:
    """Bytes of a tier that could be granted to the shard: neither held nor reserved for others.

    What a shard holds and does not use serves its own reservation first.
    """
    reserved = 0
    for (other, tier), taken in reservations(state).items():
        if tier == name and other != uuid:
            unused = state.hold(other, name).granted - state.stored(other, name)
            reserved += max(0, taken - max(0, unused))
    return state.tiers[name].spec.capacity_bytes - state.held_bytes(name) - reserved


def is_empty(state: State, uuid: str, name: str, generation: int) -> bool:
    """Whether nothing of the shard is or can get into the tier that ``generation`` closed.

    Either it acknowledged that generation and has reported nothing there since; or it has no grant
    there, which outlives a restart of ours.
    """
    hold = state.hold(uuid, name)
    if hold.granted == 0 and hold.held == 0:
        return True
    session = state.sessions.get(uuid)
    if session is None:
        # Taken away by an earlier life of ours, which found the shard empty.
        return hold.granted == 0 and state.shards[uuid].generation >= generation
    return session.settled_generation >= generation and _nothing(session, name)


def _nothing(session: Session, name: str) -> bool:
    usage = session.usage.get(name)
    return usage is None or not (
        usage.stored_bytes or usage.live_bytes or usage.pages or usage.deleting
    )
