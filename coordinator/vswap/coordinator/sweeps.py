"""Deleting what forgotten shards left, and reporting what belongs to nobody.

Only a tombstone allows a deletion: a shard that is merely absent keeps everything, and a shard or
cluster we have never heard of is shown to the operator and left alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from vswap.coordinator.events import DeleteSegments, ListBackend, Listed, Swept
from vswap.coordinator.state import Found
from vswap.coordinator.turn import Turn

_RETRY_S = 15.0
_STRANGERS_EVERY_S = 3600.0


def add(turn: Turn, uuid: str, name: str) -> None:
    """Notes that a forgotten shard's segments on a tier are to be deleted."""
    if (uuid, name) not in turn.state.sweeps:
        turn.state.sweeps.add((uuid, name))
        turn.save("sweep", uuid, name)


def pump(turn: Turn) -> None:
    """Starts the sweeps that are due."""
    state = turn.state
    for uuid, name in sorted(state.sweeps):
        if state.sweeping.get((uuid, name), 0.0) <= turn.now_s:
            state.sweeping[uuid, name] = math.inf
            turn.do(DeleteSegments(tier=name, shard=uuid))


def swept(turn: Turn, event: Swept) -> None:
    """A sweep ended; where it failed it is done again later."""
    state = turn.state
    key = (event.shard, event.tier)
    if event.error is not None:
        state.sweeping[key] = turn.now_s + _RETRY_S
        return
    state.sweeping.pop(key, None)
    if key in state.sweeps:
        state.sweeps.remove(key)
        turn.save("sweep", *key)
        turn.set_hold(*key, 0, 0)


def look_for_strangers(turn: Turn, name: str) -> None:
    turn.state.listed_s[name] = turn.now_s
    turn.do(ListBackend(tier=name, prefix="vswap/", job=""))


def look_now_and_then(turn: Turn) -> None:
    """Each tier once an hour; the first time an hour after the start."""
    for name in turn.state.tiers:
        last = turn.state.listed_s.setdefault(name, turn.now_s)
        if turn.now_s - last >= _STRANGERS_EVERY_S:
            look_for_strangers(turn, name)


def listed(turn: Turn, event: Listed) -> None:
    """Keeps the strangers; sees to it that what a forgotten shard still has is deleted."""
    if event.error is not None or event.tier not in turn.state.tiers:
        return
    turn.state.strangers[event.tier] = strangers(turn, event.tier, event.found)


def strangers(turn: Turn, name: str, found: Sequence[Found]) -> list[Found]:
    """Those of a listing that belong to nobody we know."""
    unknown = []
    for item in found:
        uuid = owner(turn.state.cluster, item.prefix)
        shard = None if uuid is None else turn.state.shards.get(uuid)
        if shard is None:
            unknown.append(item)
        elif shard.forgotten:
            add(turn, shard.uuid, name)
    return unknown


def owner(cluster: str, prefix: str) -> str | None:
    """The shard uuid in a prefix of our cluster; None in one of another cluster."""
    parts = prefix.split("/")
    return parts[2] if len(parts) > 2 and parts[1] == cluster else None
