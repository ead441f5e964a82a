"""Drains: the remote swapoff.

A tier is drained when, in this order,

1  every shard that has not been forgotten acknowledged the configuration that closed the tier: its
   earlier writes there have resolved, and it allocates nothing there any more
2  every such shard reported the tier empty after that; its grant is then taken away, which is what
   a restart of the coordinator remembers of 1 and 2
3  the backend's own listing under the cluster's prefix, of every server, is empty

Until then the job names who is in the way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vswap.coordinator import grants, orders, sweeps
from vswap.coordinator.events import ListBackend, Listed
from vswap.coordinator.state import Job, JobNode, JobState, Shard, State
from vswap.coordinator.turn import Turn

_LIST_AGAIN_S = 1.0


def judge(turn: Turn, job: Job) -> JobState:
    """Where the drain stands; asks the backend once nobody is in the way."""
    state = turn.state
    flight = state.flight(job)
    in_the_way = [shard.uuid for shard in state.members() if not _empty(turn, job, shard)]
    if in_the_way:
        flight.clear = False
        absent = [uuid for uuid in in_the_way if not state.connected(uuid)]
        waiting = {
            uuid: job.nodes[uuid]
            for uuid in in_the_way
            if uuid not in absent and job.nodes[uuid].state == "waiting"
        }
        job.reason = "; ".join(
            filter(None, [obstacles(state, absent, waiting), _unsettled(state, job, in_the_way)])
        )
        working = len(in_the_way) > len(absent) + len(waiting)
        return JobState.RUNNING if working else JobState.BLOCKED
    buried = sorted(state.name(uuid) for uuid, name in state.sweeps if name == job.tier)
    if buried:
        job.reason = f"segments of forgotten {', '.join(buried)} are still to be deleted"
        return JobState.BLOCKED
    if flight.clear:
        return JobState.DONE
    if not flight.listing and turn.now_s >= flight.list_again_s:
        flight.listing = True
        prefix = f"vswap/{state.cluster}/"
        turn.do(ListBackend(tier=job.tier, prefix=prefix, job=job.id))
    job.reason = flight.leftover
    return JobState.BLOCKED if flight.leftover else JobState.RUNNING


def listed(turn: Turn, event: Listed) -> None:
    """The backend's answer to a drain's question."""
    state = turn.state
    job = state.jobs.get(event.job)
    if job is None or job.state.ended:
        return
    flight = state.flight(job)
    flight.listing = False
    flight.list_again_s = turn.now_s + _LIST_AGAIN_S
    if event.error is not None:
        if job.lost:
            # Nobody counts on it any more, so what may be left there does not matter.
            flight.clear, flight.leftover = True, ""
            return
        flight.leftover = f"cannot list {event.tier}: {event.error}"
        return
    strangers = sweeps.strangers(turn, event.tier, event.found)
    reasons = []
    for found in event.found:
        uuid = sweeps.owner(state.cluster, found.prefix)
        if uuid is None:
            continue
        if found in strangers:
            reasons.append(
                f"{found.segments} segments under {found.prefix} belong to a shard this cluster "
                f"does not know; if it never comes back: vswap node forget {uuid}"
            )
        else:
            reasons.append(f"{found.segments} segments of {state.name(uuid)} are left there")
            if not state.shards[uuid].forgotten:
                orders.look_again(turn, job, uuid)
    flight.leftover = "; ".join(reasons)
    flight.clear = not reasons
    # Only our own cluster was listed: of the others an earlier listing told.
    others = [
        found
        for found in state.strangers.get(event.tier, ())
        if sweeps.owner(state.cluster, found.prefix) is None
    ]
    state.strangers[event.tier] = [*strangers, *others]


def obstacles(state: State, absent: Sequence[str], waiting: Mapping[str, JobNode]) -> str:
    """Who is in the way of a job, and why."""
    reasons = []
    if absent:
        names = ", ".join(sorted(state.name(uuid) for uuid in absent))
        verb = "is absent and has" if len(absent) == 1 else "are absent and have"
        reasons.append(f"{names} {verb} pages there")
    reasons += [f"{state.name(uuid)} waits: {node.reason}" for uuid, node in waiting.items()]
    return "; ".join(reasons)


def _unsettled(state: State, job: Job, in_the_way: Sequence[str]) -> str:
    """Who has not yet taken the tier out of use."""
    names = sorted(
        state.name(uuid)
        for uuid in in_the_way
        if state.connected(uuid) and state.shards[uuid].generation < job.generation
    )
    return f"writes to the tier still under way at {', '.join(names)}" if names else ""


def _empty(turn: Turn, job: Job, shard: Shard) -> bool:
    """Whether the shard is out of the way; takes its grant if it is."""
    state, uuid = turn.state, shard.uuid
    node = job.nodes.get(uuid)
    if grants.is_empty(state, uuid, job.tier, job.generation):
        if state.hold(uuid, job.tier).granted:
            grants.take_away(turn, uuid, job.tier)
        if node is not None and node.state != "done":
            node.state, node.reason, node.pages_left, node.bytes_left = "done", "", 0, 0
            turn.save_job(job)
        return True
    if node is None:
        job.nodes[uuid] = JobNode(incarnation=shard.incarnation)
        turn.save_job(job)
    elif node.state == "done" and state.stored(uuid, job.tier):
        orders.look_again(turn, job, uuid)
    return False
