"""Jobs: checking, starting, carrying on and ending them.

``advance`` is level-triggered: after every event it looks at each running job and does whatever is
due, so it does not matter in which order reports, acknowledgements and restarts arrive.
"""

from __future__ import annotations

from vswap.coordinator import drains, orders
from vswap.coordinator.assess import conflicts, plan
from vswap.coordinator.events import CancelJob, StartJob
from vswap.coordinator.registry import set_state
from vswap.coordinator.state import Job, JobState, MoveKind, TierState
from vswap.coordinator.turn import Turn
from vswap.wire.errors import AlreadyExists, Refused

_KEEP_ENDED = 200


def start(turn: Turn, event: StartJob) -> None:
    """Starts a job; nothing changed if it raises."""
    state = turn.state
    if event.id in state.jobs:
        raise AlreadyExists(f"there is a job {event.id} already", name=event.id)
    job = plan(state, event)
    for other in conflicts(state, job):
        finish(turn, other, JobState.CANCELLED, f"gave way to {job.title}")
    job.state, job.created_at = JobState.RUNNING, turn.wall_s
    if job.kind is MoveKind.DRAIN:
        job.generation = set_state(turn, job.tier, TierState.DRAINING)
    state.jobs[job.id] = job
    turn.save_job(job)
    _drop_old(turn)


def cancel(turn: Turn, event: CancelJob) -> None:
    """What moved stays moved."""
    job = turn.state.job(event.id)
    if job.state.ended:
        raise Refused(f"{job.title} has ended already: {job.state.word}", job=job.id)
    finish(turn, job, JobState.CANCELLED, "cancelled by an operator")


def finish(turn: Turn, job: Job, outcome: JobState, reason: str) -> None:
    """Ends a job. A drain that did not succeed gives its tier back."""
    state = turn.state
    job.state, job.reason, job.ended_at = outcome, reason, turn.wall_s
    orders.stop_all(turn, job)
    state.flights.pop(job.id, None)
    if job.kind is MoveKind.DRAIN:
        done = outcome is JobState.DONE
        set_state(turn, job.tier, TierState.DRAINED if done else TierState.ACTIVE)
    turn.save_job(job)


def advance(turn: Turn) -> None:
    """Does for every running job what is due."""
    for job in turn.state.running():
        before = job.state, job.reason
        outcome = drains.judge(turn, job) if job.kind is MoveKind.DRAIN else _judge(turn, job)
        failed = [n for n in job.nodes.items() if n[1].state == "failed"]
        if failed:
            uuid, node = failed[0]
            finish(turn, job, JobState.FAILED, f"{turn.state.name(uuid)}: {node.reason}")
        elif outcome is JobState.DONE:
            finish(turn, job, JobState.DONE, "")
        else:
            job.state = outcome
            orders.send_due(turn, job)
            flight = turn.state.flight(job)
            if outcome is JobState.RUNNING:
                flight.blocked_since_s = None
            elif flight.blocked_since_s is None:
                flight.blocked_since_s = turn.now_s
            if (job.state, job.reason) != before:
                turn.save_job(job)


def _judge(turn: Turn, job: Job) -> JobState:
    """Migrate and compact: done when every node that had pages there says so."""
    state = turn.state
    for node in job.nodes.values():
        if node.budget_bytes and node.before.bytes >= node.budget_bytes and node.state != "done":
            node.state, node.reason = "done", ""
            turn.save("job", job.id)
    left = {uuid: node for uuid, node in job.nodes.items() if node.state != "done"}
    if not left:
        return JobState.DONE
    absent = [uuid for uuid in left if not state.connected(uuid)]
    waiting = {
        uuid: node for uuid, node in left.items() if node.state == "waiting" and uuid not in absent
    }
    job.reason = drains.obstacles(state, absent, waiting)
    working = len(left) > len(absent) + len(waiting)
    return JobState.RUNNING if working else JobState.BLOCKED


def _drop_old(turn: Turn) -> None:
    jobs = turn.state.jobs
    ended = [job.id for job in jobs.values() if job.state.ended]
    for job_id in ended[:-_KEEP_ENDED]:
        del jobs[job_id]
        turn.save("job", job_id)
