"""`vswap node`: the nodes of the cluster."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from vswap.cli import exits, options, output, units
from vswap.cli.survey import print_told, survey
from vswap.v1 import common_pb2, node_pb2
from vswap.wire.errors import PageCorrupt, TierUnavailable

_SHOWN_SLOTS = 20

app = typer.Typer(help="See nodes, retire them, and declare lost ones gone.", no_args_is_help=True)


@app.command("list")
def list_nodes(
    coordinator: options.Coordinator = options.DEFAULT_COORDINATOR, as_json: options.Json = False
) -> None:
    """List the nodes that the coordinator knows."""
    with options.operator(coordinator) as cluster:
        status = cluster.cluster()
    if as_json:
        output.print_json([output.plain(node) for node in status.nodes])
        return
    rows = [
        (
            node.name,
            node.state,
            node.address,
            units.count(node.pages),
            units.count(node.fill_pages),
            units.size(sum(tier.stored_bytes for tier in node.tiers)),
            f"{units.duration(node.last_seen_s_ago)} ago",
        )
        for node in status.nodes
    ]
    columns = ("NODE", "STATE", "ADDRESS", ">PAGES", ">FILL", ">STORED", "LAST SEEN")
    output.stdout().print(output.table(columns, rows))


@app.command()
def show(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Node to show.")] = None,
    node_address: options.NodeAddress = None,
    coordinator: options.Coordinator = options.DEFAULT_COORDINATOR,
    as_json: options.Json = False,
) -> None:
    """Show one node as it sees itself: tiers, pressure, counters."""
    with options.node_client(coordinator, name, node_address) as client:
        status = client.status()
    if as_json:
        output.print_json(output.plain(status))
        return
    console = output.stdout()
    total = status.usable_total_bytes
    used = units.percent(1 - status.usable_free_bytes / total) if total else "?"
    console.print(f"node {status.name} ({status.version}), pid {status.pid}")
    console.print(f"coordinator: {status.coordinator}, configuration {status.generation}")
    console.print(f"pages: {units.count(status.pages)}, fill: {units.count(status.fill_pages)}")
    console.print(f"backing: {used} used, {units.size(status.usable_free_bytes)} of pages free")
    if status.nbd:
        numbers = (f"{number} {name}" for number, name in enumerate(status.places) if name)
        console.print(f"block devices: {', '.join(status.nbd)}; vswap:tier {', '.join(numbers)}")
    for tier_name, plan in sorted(status.faults.items()):
        console.print(f"FAULTS ARE INJECTED into tier {tier_name}: {plan}", style="bold red")
    console.print()
    console.print(tier_table(list(status.tiers)))
    output.remarks(f"{tier.tier}: {tier.error}" for tier in status.tiers if tier.error)
    output.remarks(
        f"{tier.tier}: {server.url} is down: {server.error}"
        for tier in status.tiers
        for server in tier.servers
        if not server.up
    )
    counters = [(name, units.count(value)) for name, value in sorted(status.counters.items())]
    if counters:
        console.print()
        console.print(output.table(("COUNTER", ">SINCE START"), counters))


@app.command()
def fault(
    name: Annotated[str, typer.Argument(metavar="NODE", help="Node, by its name.")],
    tier: Annotated[
        str,
        typer.Argument(
            metavar="TIER", help="Tier that is to misbehave; red/2: only its second server."
        ),
    ],
    plan: Annotated[
        str, typer.Argument(metavar="PLAN|off", help="Such as seed=7,error=0.01,delay_ms=20.")
    ],
    node_address: options.NodeAddress = None,
    coordinator: options.Coordinator = options.DEFAULT_COORDINATOR,
) -> None:
    """Make a tier misbehave on this node, for tests; "off" ends it.

    Refused unless the node runs with --allow-faults or --fault.
    """
    with options.node_client(coordinator, name, node_address) as client:
        before = client.set_fault(tier, plan)
    typer.echo(f"{tier} on {name}: {plan} (before: {before or 'off'})")


def scrub(
    name: Annotated[str | None, typer.Argument(metavar="[NODE]", help="Node, by its name.")] = None,
    tier: Annotated[str, typer.Option("--tier", help="Only this tier.")] = "",
    rate: options.Rate = None,
    every: options.AllNodes = False,
    node_address: options.NodeAddress = None,
    coordinator: options.Coordinator = options.DEFAULT_COORDINATOR,
    as_json: options.Json = False,
) -> None:
    """Read and verify every page that a node stores. Nodes do so by themselves, slowly.

    Exit code 5 if pages are damaged or lost, 4 if a tier or, with --all, a node did not answer.
    Ctrl-C ends the pass.
    """
    told = survey(
        options.chosen_nodes(coordinator, name, node_address, every=every),
        lambda client: client.scrub(tier, rate or 0),
        lambda seen: f"{units.size(seen.bytes)} verified, {seen.segments_left} to go",
    )
    print_told(told, every=every, as_json=as_json, tell=_tell_scrubbed)
    damaged = sum(seen.damaged_pages for seen in told.values())
    lost = sum(seen.lost_pages for seen in told.values())
    if damaged or lost:
        raise PageCorrupt(
            f"{units.count(damaged)} pages are damaged and {units.count(lost)} lost; "
            "loads of them fail until they are stored again"
        )
    skipped = [seen for seen in told.values() if seen.skipped]
    if skipped:
        count = sum(seen.skipped for seen in skipped)
        raise TierUnavailable(f"{count} segments could not be read: {skipped[0].error}")
    if told.errors:
        raise typer.Exit(exits.UNREACHABLE)


def _tell_scrubbed(seen: node_pb2.ScrubProgress) -> None:
    typer.echo(f"verified {units.size(seen.bytes)} in {units.count(seen.segments)} segments")
    if seen.bad_parts:
        typer.echo(f"{seen.bad_parts} parts of redundant segments are bad: to be repaired")
    for lost in seen.lost:
        numbers = ", ".join(map(str, lost.slots[:_SHOWN_SLOTS]))
        more = ", ..." if len(lost.slots) > _SHOWN_SLOTS else ""
        typer.echo(f"lost in space {lost.space}: slots {numbers}{more}")


@app.command()
def leave(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Node to retire.")] = None,
    node_address: options.NodeAddress = None,
    coordinator: options.Coordinator = options.DEFAULT_COORDINATOR,
) -> None:
    """Retire a node for good: its daemon ends and the cluster forgets it.

    Refused while it holds pages: free them or delete its spaces first. Its state is erased, so
    started again it is a new node.
    """
    address = options.node_address(coordinator, name, node_address)
    with options.node_client(coordinator, name, address) as client:
        client.leave()
    typer.echo(f"{name or address} has left")


@app.command()
def forget(
    name: Annotated[str, typer.Argument(help="Name or shard uuid of a node that is absent.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    coordinator: options.Coordinator = options.DEFAULT_COORDINATOR,
) -> None:
    """Declare that a node never comes back: its pages on shared tiers are deleted."""
    if not yes:
        typer.confirm(f"Delete all pages of node {name} on shared tiers for good?", abort=True)
    with options.operator(coordinator) as cluster:
        reply = cluster.forget_node(name)
    typer.echo(
        f"forgot {name}: {reply.segments_deleted} segments, {units.size(reply.bytes_deleted)}"
    )


def tier_table(tiers: list[common_pb2.TierUsage]) -> Table:
    """What lies in each tier of one node."""
    rows = [
        (
            tier.tier,
            "node" if tier.local else "cluster",
            output.enum_name(tier, "state") if tier.available else "not available",
            units.count(tier.pages),
            units.size(tier.logical_bytes),
            units.size(tier.stored_bytes),
            units.size(tier.limit_bytes),
            utilisation(tier),
        )
        for tier in sorted(tiers, key=lambda tier: (tier.rank, tier.tier))
    ]
    columns = ("TIER", "SCOPE", "STATE", ">PAGES", ">LOGICAL", ">STORED", ">MAY HOLD", ">LIVE")
    return output.table(columns, rows)


def utilisation(tier: common_pb2.TierUsage) -> str:
    """Live bytes over stored bytes."""
    return units.percent(tier.live_bytes / tier.stored_bytes) if tier.stored_bytes else "-"
