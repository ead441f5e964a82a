"""`vswap loadgen`: load that checks every page it gets back."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from vswap.cli import exits, options, output, units
from vswap.client import Client, Operator
from vswap.loadgen import corpus, report
from vswap.loadgen.fleet import Fleet, Phase
from vswap.loadgen.meter import Meter
from vswap.loadgen.run import LoadSpec
from vswap.loadgen.workload import Mix
from vswap.wire.errors import InvalidRequest, UnknownNode, VswapError

_LINE_EVERY_S = 5.0


def loadgen(
    node: Annotated[
        list[str] | None,
        typer.Option("--node", metavar="NAME", help="Node by name; repeat. Default: all."),
    ] = None,
    node_address: Annotated[
        list[str] | None,
        typer.Option("--node-address", metavar="ADDRESS", help="Node, without a coordinator."),
    ] = None,
    space: Annotated[str, typer.Option("--space", help="Space to use on each node.")] = "default",
    kind: Annotated[
        str, typer.Option("--workload", help="uniform, zipf, sequential or scan.")
    ] = "uniform",
    skew: Annotated[float, typer.Option("--skew", min=0, help="Of zipf.")] = 1.0,
    mix: Annotated[
        str, typer.Option("--mix", metavar="R:W:F", help="Weights of read, write and free.")
    ] = "70:25:5",
    batch: Annotated[int, typer.Option("--batch", min=1, help="Pages in a request.")] = 32,
    clients: Annotated[int, typer.Option("--clients", min=1, help="Requests at once.")] = 4,
    processes: Annotated[
        int, typer.Option("--processes", min=1, help="Processes that share the clients.")
    ] = 1,
    pages: Annotated[int, typer.Option("--pages", min=1, help="Working set, over all.")] = 65536,
    first_slot: Annotated[
        int, typer.Option("--first-slot", min=0, help="Where the slots begin in the space.")
    ] = 0,
    seconds: Annotated[
        float | None, typer.Option("--seconds", min=0, help="How long; default 10.")
    ] = None,
    ops: Annotated[
        int | None, typer.Option("--ops", min=1, help="Page operations, instead of seconds.")
    ] = None,
    rate: Annotated[
        float,
        typer.Option(
            "--rate",
            min=0,
            metavar="PAGES/s",
            help="Open loop: latencies count from when a request was due. 0: closed loop.",
        ),
    ] = 0,
    content: Annotated[
        str, typer.Option("--content", help="mixed (memory and text), memory, text or random.")
    ] = "mixed",
    fill: Annotated[float, typer.Option("--fill", min=0, max=1, help="Share of fill pages.")] = 0.2,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of slots and content.")] = 1,
    populate: Annotated[
        bool, typer.Option("--populate/--no-populate", help="Store every page first.")
    ] = True,
    read_back: Annotated[
        bool, typer.Option("--read-back/--no-read-back", help="Check every page at the end.")
    ] = True,
    free: Annotated[bool, typer.Option("--free", help="Free every page at the end.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write results there; -: stdout.")
    ] = None,
    fault: options.Faults = None,
    coordinator: options.Coordinator = options.DEFAULT_COORDINATOR,
) -> None:
    """Store, load and free pages, and check every page against what was stored.

    Exit code 5 if any page was wrong or lost; otherwise the code of the first failed request.
    """
    output.check_writable(json_file)
    addresses = node_address or _addresses(coordinator, node)
    spec = LoadSpec(
        workload=kind,
        mix=_mix(mix),
        skew=skew,
        batch=batch,
        clients=clients,
        pages=pages,
        rate_pages_s=rate,
        fill=fill,
        seed=seed,
        first_slot=first_slot,
    )
    with Client(addresses[0], retry_s=0) as client:
        page_bytes = client.space(space).page_bytes
    base = corpus.build(content, page_bytes, seed)
    console = output.stderr()

    def say(line: str) -> None:
        console.print(line, markup=False)

    bounds = {"pages": _share(ops, processes)} if ops is not None else {"seconds": seconds or 10.0}
    total = Meter()
    failures: list[VswapError] = []
    with (
        _misbehaving(addresses, options.fault_plans(fault), say),
        Fleet(processes, addresses, space, spec, base, say) as fleet,
    ):

        def phase(name: str, **bounds: float | int) -> tuple[Phase, float]:
            begin_s = time.monotonic()
            ticker = _Ticker(name, console.is_terminal)
            done = fleet.phase(name, ticker, **bounds)
            took_s = time.monotonic() - begin_s
            total.add(done.meter)
            failures.extend(done.failures[:1])
            say(
                f"{name.replace('_', ' ')}: {units.count(done.meter.pages)} pages in "
                f"{units.duration(took_s)}, {units.count(round(done.meter.pages / took_s))} pages/s"
            )
            return done, took_s

        held = phase("populate")[0].held_pages if populate else 0
        measured, took_s = phase("run", **bounds)
        tiers = report.tier_shares(report.node_statuses(addresses), page_bytes)
        if read_back:
            phase("read_back")
        if free:
            phase("free", share=1.0)
    logical_bytes = max(held, measured.held_pages) * page_bytes
    result = report.as_json(total, measured.meter, took_s, logical_bytes, tiers)
    output.write_json(json_file, result)
    for what, summary in result["latency_us"].items():
        figures = "  ".join(f"{name} {units.micros(value)}" for name, value in summary.items())
        say(f"{what} of up to {batch} pages: {figures}")
    say(
        f"{units.count(total.pages_stored)} pages stored, {units.count(total.pages_loaded)} loaded "
        f"and checked, {total.wrong_pages} wrong, {total.lost_pages} lost, "
        f"{total.failed_ops} failed requests"
    )
    if total.wrong_pages or total.lost_pages:
        raise typer.Exit(exits.INTEGRITY)
    if total.failed_ops:
        raise typer.Exit(exits.exit_code(failures[0]) if failures else exits.INTERNAL)


@contextmanager
def _misbehaving(
    addresses: list[str], plans: dict[str, str], say: Callable[[str], None]
) -> Iterator[None]:
    """Fault plans on all these nodes, for as long as it lasts; those before come back."""
    if not plans:
        yield
        return
    undo: list[tuple[str, str, str]] = []
    # A SIGTERM must take them back as Ctrl-C does.
    before_term = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for address in addresses:
            with Client(address, retry_s=0) as client:
                for tier, plan in plans.items():
                    undo.append((address, tier, client.set_fault(tier, plan)))
        for tier, plan in plans.items():
            say(f"faults are injected into tier {tier}: {plan}")
        yield
    finally:
        signal.signal(signal.SIGTERM, before_term)
        for address, tier, before in undo:
            try:
                with Client(address, retry_s=2) as client:
                    client.set_fault(tier, before or "off")
            except VswapError as error:
                say(f"THE FAULTS OF TIER {tier} AT {address} REMAIN: {error}")


class _Ticker:
    """Says every few seconds how a phase is going."""

    def __init__(self, name: str, terminal: bool) -> None:
        self._name = name.replace("_", " ")
        self._every_s = 1.0 if terminal else _LINE_EVERY_S
        self._next_s = self._every_s
        self._pages = 0
        self._at_s = 0.0

    def __call__(self, so_far: Meter, at_s: float) -> None:
        if at_s < self._next_s:
            return
        speed = (so_far.pages - self._pages) / (at_s - self._at_s)
        output.stderr().print(
            f"{self._name}: {units.count(so_far.pages)} pages so far, "
            f"{units.count(round(max(0, speed)))} pages/s, {so_far.wrong_pages} wrong, "
            f"{so_far.failed_ops} failed",
            markup=False,
        )
        self._pages, self._at_s, self._next_s = so_far.pages, at_s, at_s + self._every_s


def _addresses(coordinator: str, names: list[str] | None) -> list[str]:
    with Operator(coordinator) as cluster:
        nodes = {node.name: node for node in cluster.cluster().nodes}
    if names:
        for name in names:
            if name not in nodes:
                there = ", ".join(sorted(nodes)) or "none"
                raise UnknownNode(f"no node {name!r} in the cluster (there: {there})", node=name)
        return [nodes[name].address for name in names]
    connected = [node.address for node in nodes.values() if node.state == "connected"]
    if not connected:
        raise UnknownNode("the cluster has no connected node")
    return connected


def _mix(text: str) -> Mix:
    try:
        return Mix.parse(text)
    except ValueError as error:
        raise InvalidRequest(str(error)) from None


def _share(ops: int, processes: int) -> int:
    return -(-ops // processes)
