"""Progress: what nodes report of a job, added up over their lives."""

from __future__ import annotations

from collections.abc import Iterable

from vswap.coordinator.state import Flight, Job, JobNode, Moved, MoveKind, State
from vswap.coordinator.turn import Turn
from vswap.v1 import coordinator_pb2

_WINDOW_S = 10.0
_SAVE_EVERY_S = 2.0


def at_hello(turn: Turn, uuid: str) -> None:
    """A new stream knows of no directive; a new life of the node counts from 0 again."""
    state = turn.state
    incarnation = state.shards[uuid].incarnation
    for job in state.running():
        state.flight(job).sent.pop(uuid, None)
        node = job.nodes.get(uuid)
        if node is not None and node.incarnation != incarnation:
            node.before, node.life = node.moved, Moved()
            node.incarnation = incarnation
            turn.save_job(job)


def at_report(
    turn: Turn, uuid: str, directives: Iterable[coordinator_pb2.DirectiveProgress]
) -> None:
    """Takes over what the node says of its directives; ends those that are no longer wanted."""
    state = turn.state
    for said in directives:
        job = state.jobs.get(said.job_id)
        if job is None or job.state.ended:
            turn.send(uuid, stop_message(said.job_id))
            continue
        if uuid not in state.flight(job).sent:
            # Of the time before the directive was stopped or this stream began: it comes again.
            continue
        node = job.nodes.setdefault(uuid, JobNode(incarnation=state.shards[uuid].incarnation))
        life = Moved(said.pages_moved, said.bytes_moved, said.logical_bytes_moved, said.pages_lost)
        if life.pages < node.life.pages or life.bytes < node.life.bytes:
            node.before = node.moved
        ended = said.state != node.state
        node.life = life
        node.state, node.reason = said.state, said.reason
        node.pages_left, node.bytes_left = said.pages_left, said.bytes_left
        _measure(turn, job, state.flight(job), save=ended)


def moved(job: Job) -> Moved:
    total = Moved()
    for node in job.nodes.values():
        total += node.moved
    return total


def left(state: State, job: Job) -> tuple[int, int]:
    """(pages, bytes) that are still to be moved, as far as anybody has said."""
    if job.kind is MoveKind.DRAIN:
        bytes_left = sum(state.live(shard.uuid, job.tier) for shard in state.members())
        pages_left = 0
        for shard in state.members():
            usage = state.usage(shard.uuid, job.tier)
            pages_left += 0 if usage is None else int(usage.pages)
        return pages_left, bytes_left
    open_nodes = [node for node in job.nodes.values() if node.state != "done"]
    return sum(node.pages_left for node in open_nodes), sum(node.bytes_left for node in open_nodes)


def rate(flight: Flight, now_s: float) -> float:
    """Bytes a second over the last seconds."""
    samples = flight.samples
    if len(samples) < 2:
        return 0.0
    seconds = max(now_s, samples[-1][0]) - samples[0][0]
    return (samples[-1][1] - samples[0][1]) / seconds if seconds > 0 else 0.0


def stop_message(job_id: str) -> coordinator_pb2.CoordinatorMessage:
    stop = coordinator_pb2.StopDirective(job_id=job_id)
    return coordinator_pb2.CoordinatorMessage(stop_directive=stop)


def _measure(turn: Turn, job: Job, flight: Flight, *, save: bool) -> None:
    total = moved(job).bytes
    flight.samples.append((turn.now_s, total))
    while len(flight.samples) > 2 and turn.now_s - flight.samples[0][0] > _WINDOW_S:
        flight.samples.popleft()
    bytes_left = left(turn.state, job)[1]
    if job.kind is MoveKind.COMPACT:
        job.bytes_total = total + bytes_left
    else:
        job.bytes_total = max(job.bytes_total, total + bytes_left)
    if save or turn.now_s - flight.saved_s >= _SAVE_EVERY_S:
        flight.saved_s = turn.now_s
        turn.save("job", job.id)
    turn.notify(job)
