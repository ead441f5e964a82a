"""`vswap check`: does all that a node knows agree with itself, and with its backends?"""

from __future__ import annotations

from typing import Annotated

import typer

from vswap.cli import exits, options, output, units
from vswap.cli.survey import print_told, survey
from vswap.v1 import node_pb2


def check(
    name: Annotated[str | None, typer.Argument(metavar="[NODE]", help="Node, by its name.")] = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Read the directories of segments on backends too.")
    ] = False,
    every: options.AllNodes = False,
    node_address: options.NodeAddress = None,
    coordinator: options.Coordinator = options.DEFAULT_COORDINATOR,
    as_json: options.Json = False,
) -> None:
    """Hold a node's tables, books, segments and backends against each other, while it works.

    Changes nothing and reads no page: see `vswap scrub` for that. Exit code 5 if anything differs,
    4 if a backend or, with --all, a node could not be asked.
    """
    told = survey(
        options.chosen_nodes(coordinator, name, node_address, every=every),
        lambda client: client.check(deep=deep),
        lambda seen: f"{units.count(seen.slots)} slots, {units.count(seen.segments)} segments",
    )
    print_told(told, every=every, as_json=as_json, tell=_tell)
    if any(seen.found for seen in told.values()):
        raise typer.Exit(exits.INTEGRITY)
    if told.errors or any(seen.skipped for seen in told.values()):
        raise typer.Exit(exits.UNREACHABLE)


def _tell(seen: node_pb2.CheckProgress) -> None:
    if seen.differences:
        rows = [(item.kind, item.where, item.detail) for item in seen.differences]
        output.stdout().print(output.table(("WHAT", "WHERE", "DIFFERENCE"), rows))
    for line in seen.skipped:
        typer.echo(f"not compared: {line}")
    for line in seen.others:
        typer.echo(f"of another node, or an earlier state of this one: {line}")
    more = seen.found - len(seen.differences)
    typer.echo(
        f"{units.count(seen.slots)} slots, {units.count(seen.segments)} segments, "
        f"{units.count(seen.listed)} listed by backends: "
        + (f"{units.count(seen.found)} differences" if seen.found else "no difference")
        + (f", {units.count(more)} not shown" if more else "")
    )
