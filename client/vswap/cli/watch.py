"""Follows a job until it ends: a progress bar on a terminal, else a line every few seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from vswap.cli import output, units
from vswap.client import Operator
from vswap.v1 import coordinator_pb2
from vswap.wire.errors import OutcomeUnknown, Unreachable, VswapError

Job = coordinator_pb2.Job

AWAY_S = 60.0
"""How long a job is waited for while the coordinator does not answer."""

LINE_EVERY_S = 5.0
ENDED = ("done", "cancelled", "failed")


def follow(cluster: Operator, job_id: str) -> Iterator[Job]:
    """The job at least once a second, across restarts of the coordinator."""
    away_since_s: float | None = None
    while True:
        try:
            for job in cluster.watch_job(job_id):
                away_since_s = None
                yield job
                if state_of(job) in ENDED:
                    return
        except (Unreachable, OutcomeUnknown) as error:
            now_s = time.monotonic()
            away_since_s = now_s if away_since_s is None else away_since_s
            if now_s - away_since_s > AWAY_S:
                raise _gone(error, job_id) from error
        time.sleep(0.5)


def watch(cluster: Operator, job_id: str) -> Job:
    """Show the job's progress on stderr until it ends; returns its last state."""
    console = output.stderr()
    return (
        _bar(console, cluster, job_id) if console.is_terminal else _lines(console, cluster, job_id)
    )


def state_of(job: Job) -> str:
    return output.enum_name(job, "state")


def title(job: Job) -> str:
    """What the job does, in a few words."""
    kind = output.enum_name(job.spec, "kind")
    to = f" to {job.spec.destination}" if job.spec.destination else ""
    lost = " (lost)" if job.spec.lost else ""
    return f"{kind} {job.spec.tier}{to}{lost}"


def progress_line(job: Job) -> str:
    """State, amount, rate and what is in the way, on one line."""
    parts = [
        f"{title(job)}: {state_of(job)}",
        f"{units.size(job.bytes_moved)} of {units.size(job.bytes_total)}",
        f"{units.count(job.pages_moved)} pages",
    ]
    if state_of(job) in ("running", "blocked"):
        parts.append(units.rate(job.rate_bytes_s))
        parts.append(f"{units.duration(job.eta_s)} left")
    if job.pages_lost:
        parts.append(f"{units.count(job.pages_lost)} pages given up")
    if job.reason:
        parts.append(job.reason)
    return ", ".join(parts)


def _bar(console: Console, cluster: Operator, job_id: str) -> Job:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[figures]}"),
    )
    job = Job()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(job_id, total=None, figures="")
        for job in follow(cluster, job_id):
            figures = (
                f"{units.size(job.bytes_moved)} of {units.size(job.bytes_total)}  "
                f"{units.rate(job.rate_bytes_s)}  {units.duration(job.eta_s)} left"
            )
            if job.reason:
                figures += f"  [yellow]{state_of(job)}: {job.reason}[/yellow]"
            bar.update(
                task,
                description=title(job),
                total=max(job.bytes_total, job.bytes_moved) or None,
                completed=job.bytes_moved,
                figures=figures,
            )
    return job


def _lines(console: Console, cluster: Operator, job_id: str) -> Job:
    job = Job()
    shown_at_s, shown = -LINE_EVERY_S, ""
    for job in follow(cluster, job_id):
        now_s = time.monotonic()
        what = f"{state_of(job)} {job.reason}"
        ended = state_of(job) in ENDED
        if not ended and (now_s - shown_at_s >= LINE_EVERY_S or what != shown):
            console.print(progress_line(job), markup=False)
            shown_at_s, shown = now_s, what
    return job


def _gone(error: VswapError, job_id: str) -> VswapError:
    return type(error)(
        f"{error.message}; the job goes on when it is back: vswap job watch {job_id}",
        **error.fields,
    )
