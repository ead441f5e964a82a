"""Directives: what nodes are told to do for a job."""

from __future__ import annotations

from vswap.coordinator import progress
from vswap.coordinator.state import Job, JobNode
from vswap.coordinator.turn import Turn
from vswap.v1 import coordinator_pb2

_LOOK_AGAIN_S = 2.0


def send_due(turn: Turn, job: Job) -> None:
    """Sends what a node does not know yet. The rate is split over those that have work left."""
    state = turn.state
    sent = state.flight(job).sent
    workers = [
        uuid for uuid, node in job.nodes.items() if node.state != "done" and state.connected(uuid)
    ]
    for uuid in workers:
        if state.shards[uuid].generation < job.generation:
            continue
        message = directive(job, job.nodes[uuid], len(workers))
        if sent.get(uuid) != message:
            sent[uuid] = message
            turn.send(uuid, coordinator_pb2.CoordinatorMessage(directive=message))


def look_again(turn: Turn, job: Job, uuid: str) -> None:
    """Makes a node that said it is done start over, which includes sweeping its own prefix."""
    flight = turn.state.flight(job)
    node = job.nodes.setdefault(uuid, JobNode(incarnation=turn.state.shards[uuid].incarnation))
    if not turn.state.connected(uuid) or flight.looked_s.get(uuid, 0.0) > turn.now_s:
        return
    flight.looked_s[uuid] = turn.now_s + _LOOK_AGAIN_S
    message = flight.sent[uuid] = directive(job, node, 1)
    turn.send(uuid, progress.stop_message(job.id))
    turn.send(uuid, coordinator_pb2.CoordinatorMessage(directive=message))


def directive(job: Job, node: JobNode, workers: int) -> coordinator_pb2.Directive:
    """A node's part. Its budget is what its earlier lives left of it."""
    budget = max(1, node.budget_bytes - node.before.bytes) if node.budget_bytes else 0
    return coordinator_pb2.Directive(
        job_id=job.id,
        kind=job.kind,
        tier=job.tier,
        destination=job.destination,
        byte_budget=budget,
        older_than_s=job.older_than_s,
        target_utilisation=job.target_utilisation,
        rate_bytes_s=max(1, job.rate_bytes_s // workers) if job.rate_bytes_s else 0,
        lost=job.lost,
    )


def stop_all(turn: Turn, job: Job) -> None:
    for uuid in turn.state.flight(job).sent:
        turn.send(uuid, progress.stop_message(job.id))
