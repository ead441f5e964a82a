"""`vswap drain`, `migrate`, `compact`, `repair` and `vswap job`: work that moves pages."""

from __future__ import annotations

import signal
import sys
import time
from types import FrameType
from typing import Annotated

import typer
from rich.table import Table

from vswap.cli import exits, options, output, units, watch
from vswap.client import Operator
from vswap.v1 import coordinator_pb2
from vswap.wire.errors import Refused

app = typer.Typer(help="See, follow and cancel jobs.", no_args_is_help=True)

Job = coordinator_pb2.Job

JobId = Annotated[str, typer.Argument(metavar="ID", help="The job, as `job list` shows it.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only check and tell what would happen.")]
Detach = Annotated[bool, typer.Option("--detach", help="Start it and return at once.")]


def drain(
    tier: Annotated[str, typer.Argument(help="Tier to empty.")],
    lost: Annotated[
        bool,
        typer.Option("--lost", help="Its server is gone: give up the pages that it cannot give."),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask, with --lost.")] = False,
    dry_run: DryRun = False,
    rate: options.Rate = None,
    detach: Detach = False,
    coordinator: options.Coordinator = options.DEFAULT_COORDINATOR,
    as_json: options.Json = False,
) -> None:
    """Move every page out of a tier, so that its server can be switched off.

    All pages stay readable and writable. Refused if the other tiers have no room for them.
    Ctrl-C leaves the drain running (exit code 130).

    With --lost, pages that can still be read are moved all the same. The others are lost: loads of
    them fail, until their slots are stored again or freed.
    """
    if lost and not (yes or dry_run):
        _confirm_loss(coordinator, tier)
    spec = coordinator_pb2.JobSpec(
        kind="MOVE_KIND_DRAIN", tier=tier, rate_bytes_s=rate or 0, lost=lost
    )
    _start(coordinator, spec, dry_run, detach, as_json)


def migrate(
    source: Annotated[str, typer.Option("--from", metavar="TIER", help="Move pages from here...")],
    to: Annotated[str, typer.Option("--to", metavar="TIER", help="...to here, faster or slower.")],
    how_much: Annotated[
        int | None,
        typer.Option(
            "--bytes",
            parser=options.parsed(units.parse_size),
            metavar="SIZE",
            help="Stored bytes to move at most.",
        ),
    ] = None,
    older_than: Annotated[
        float | None,
        typer.Option(
            "--older-than",
            parser=options.parsed(units.parse_duration),
            metavar="TIME",
            help="Only what was written so long ago.",
        ),
    ] = None,
    rate: options.Rate = None,
    dry_run: DryRun = False,
    detach: Detach = False,
    coordinator: options.Coordinator = options.DEFAULT_COORDINATOR,
    as_json: options.Json = False,
) -> None:
    """Move pages from one tier to another."""
    spec = coordinator_pb2.JobSpec(
        kind="MOVE_KIND_MIGRATE",
        tier=source,
        destination=to,
        byte_budget=how_much or 0,
        older_than_s=older_than or 0,
        rate_bytes_s=rate or 0,
    )
    _start(coordinator, spec, dry_run, detach, as_json)


def compact(
    tier: Annotated[str, typer.Argument(help="Tier to rewrite.")],
    target: Annotated[
        float, typer.Option("--target", min=0.01, max=1, help="Live share of the stored bytes.")
    ] = 0.9,
    rate: options.Rate = None,
    dry_run: DryRun = False,
    detach: Detach = False,
    coordinator: options.Coordinator = options.DEFAULT_COORDINATOR,
    as_json: options.Json = False,
) -> None:
    """Rewrite badly used segments of a tier, so that freed and overwritten pages give room."""
    spec = coordinator_pb2.JobSpec(
        kind="MOVE_KIND_COMPACT", tier=tier, target_utilisation=target, rate_bytes_s=rate or 0
    )
    _start(coordinator, spec, dry_run, detach, as_json)


def repair(
    tier: Annotated[str, typer.Argument(help="Redundant tier to make whole.")],
    rate: options.Rate = None,
    dry_run: DryRun = False,
    detach: Detach = False,
    coordinator: options.Coordinator = options.DEFAULT_COORDINATOR,
    as_json: options.Json = False,
) -> None:
    """Write degraded segments of a redundant tier again, to all of its servers that are up.

    The coordinator does so by itself, unless that is switched off.
    """
    spec = coordinator_pb2.JobSpec(kind="MOVE_KIND_REPAIR", tier=tier, rate_bytes_s=rate or 0)
    _start(coordinator, spec, dry_run, detach, as_json)


@app.command("list")
def list_jobs(
    ended: Annotated[bool, typer.Option("--all", help="Those that are over as well.")] = False,
    coordinator: options.Coordinator = options.DEFAULT_COORDINATOR,
    as_json: options.Json = False,
) -> None:
    """List jobs."""
    with options.operator(coordinator) as cluster:
        jobs = cluster.jobs(ended=ended)
    if as_json:
        output.print_json([output.plain(job) for job in jobs])
        return
    output.stdout().print(job_table(jobs))


@app.command()
def show(
    job_id: JobId,
    coordinator: options.Coordinator = options.DEFAULT_COORDINATOR,
    as_json: options.Json = False,
) -> None:
    """Show one job, node by node."""
    with options.operator(coordinator) as cluster:
        job = next(iter(cluster.watch_job(job_id)))
    _show(job, as_json)


@app.command("watch")
def watch_job(
    job_id: JobId,
    coordinator: options.Coordinator = options.DEFAULT_COORDINATOR,
    as_json: options.Json = False,
) -> None:
    """Follow a job until it ends."""
    with options.operator(coordinator) as cluster:
        _follow(cluster, job_id, as_json)


@app.command()
def cancel(
    job_id: JobId,
    coordinator: options.Coordinator = options.DEFAULT_COORDINATOR,
    as_json: options.Json = False,
) -> None:
    """Stop a job. What it moved stays moved; a tier that was being drained is active again."""
    with options.operator(coordinator) as cluster:
        _show(cluster.cancel_job(job_id), as_json)


def job_table(jobs: list[Job]) -> Table:
    """One line per job."""
    rows = [
        (
            job.id,
            watch.title(job),
            watch.state_of(job),
            units.size(job.bytes_moved),
            units.size(job.bytes_total),
            units.duration(job.eta_s) if watch.state_of(job) not in watch.ENDED else "-",
            "the coordinator" if job.automatic else "an operator",
            job.reason or "-",
        )
        for job in jobs
    ]
    columns = ("JOB", "WHAT", "STATE", ">MOVED", ">OF", ">LEFT", "STARTED BY", "REASON")
    return output.table(columns, rows)


def _confirm_loss(coordinator: str, tier: str) -> None:
    """Raises Refused unless the operator agrees, on a terminal."""
    with options.operator(coordinator) as cluster:
        pages = sum(i.usage.pages for i in cluster.cluster().tiers if i.tier.spec.name == tier)
    if not sys.stdin.isatty():
        raise Refused(f"{units.count(pages)} pages in {tier} may be given up: say --yes if so")
    question = f"Give up those of the {units.count(pages)} pages in {tier} that cannot be read?"
    if not typer.confirm(question, err=True):
        raise Refused("nothing was done")


def _start(
    coordinator: str, spec: coordinator_pb2.JobSpec, dry_run: bool, detach: bool, as_json: bool
) -> None:
    with options.operator(coordinator) as cluster:
        job = cluster.start_job(spec, dry_run=dry_run)
        if dry_run or detach:
            _show(job, as_json)
        else:
            _follow(cluster, job.id, as_json)


def _follow(cluster: Operator, job_id: str, as_json: bool) -> None:
    interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        job = watch.watch(cluster, job_id)
    except BaseException:
        # In the midst of taking or leaving a lock an interrupt becomes a RuntimeError.
        if not interrupted:
            raise
        output.stderr().print(
            f"\ndetached; the job goes on\n"
            f"  follow it again:  vswap job watch {job_id}\n"
            f"  stop it:          vswap job cancel {job_id}",
            markup=False,
        )
        raise typer.Exit(exits.INTERRUPTED) from None
    finally:
        signal.signal(signal.SIGINT, before)
    _show(job, as_json)
    if watch.state_of(job) != "done":
        raise typer.Exit(exits.INTERNAL)


def _show(job: Job, as_json: bool) -> None:
    if as_json:
        output.print_json(output.plain(job))
        return
    console = output.stdout()
    state = watch.state_of(job)
    if state == "planned":
        console.print(f"{watch.title(job)}: possible, nothing was changed", markup=False)
        most = "at most " if job.spec.kind == coordinator_pb2.MOVE_KIND_COMPACT else ""
        pages = units.count(job.pages_left)
        console.print(f"would move {most}{units.size(job.bytes_total)} ({pages} pages)")
    else:
        took = f" in {units.duration(job.ended_at - job.created_at)}" if job.ended_at else ""
        console.print(f"job {job.id}: {watch.progress_line(job)}{took}", markup=False)
        if state in ("running", "blocked"):
            started = units.duration(max(0.0, time.time() - job.created_at))
            console.print(f"started {started} ago; follow it: vswap job watch {job.id}")
    if state == "planned":
        rooms = [(tier, units.size(room)) for tier, room in sorted(job.room_bytes.items())]
        if rooms:
            console.print(output.table(("ROOM IN", ">BYTES"), rows=rooms))
        loads = [
            (node.node, units.size(node.bytes_left), units.count(node.pages_left))
            for node in job.nodes
        ]
        console.print(output.table(("NODE", ">WOULD MOVE", ">PAGES"), loads))
    elif job.nodes:
        console.print(_nodes(job))


def _nodes(job: Job) -> Table:
    rows = [
        (
            node.node,
            node.state,
            units.count(node.pages_moved),
            units.size(node.bytes_moved),
            units.size(node.bytes_left),
            node.reason or "-",
        )
        for node in job.nodes
    ]
    return output.table(("NODE", "STATE", ">PAGES MOVED", ">MOVED", ">LEFT", "REASON"), rows)
