"""Options that many commands share, and how they find the coordinator and a node."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from vswap.cli import units
from vswap.client import Client, Operator
from vswap.wire.errors import InvalidRequest, UnknownNode

DEFAULT_COORDINATOR = "127.0.0.1:7070"

T = TypeVar("T")


def parsed(parse: Callable[[str], T]) -> Callable[[str], T]:
    """A parser for an option: what it cannot read is a usage error with its own message.

    Typer hands it defaults as well, which need no parsing.
    """

    def convert(text: str | T) -> T:
        try:
            return parse(text) if isinstance(text, str) else text
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    convert.__name__ = parse.__name__.removeprefix("parse_")
    return convert


Coordinator = Annotated[
    str,
    typer.Option(
        "--coordinator",
        envvar="VSWAP_COORDINATOR",
        metavar="ADDRESS",
        help="Coordinator: host:port or unix:/path.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
NodeName = Annotated[
    str | None,
    typer.Option("--node", metavar="NAME", help="Node, by its name at the coordinator."),
]
NodeAddress = Annotated[
    str | None,
    typer.Option("--node-address", metavar="ADDRESS", help="Node, without a coordinator."),
]
AllNodes = Annotated[bool, typer.Option("--all", help="Every node of the cluster, in turn.")]
Config = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="Configuration in TOML.")
]
Size = Annotated[int, typer.Option(parser=parsed(units.parse_size), metavar="SIZE")]
Rate = Annotated[
    int | None,
    typer.Option(
        "--rate",
        parser=parsed(units.parse_rate),
        metavar="SIZE/s",
        help="Stored bytes a second at most.",
    ),
]


Faults = Annotated[
    list[str] | None,
    typer.Option(
        "--fault",
        metavar="TIER=PLAN",
        help="Make a tier misbehave, such as red=seed=7,error=0.01,delay=0.1,delay_ms=20, or a "
        "server of it, such as red/2=flip=1; repeatable. For tests.",
    ),
]


def fault_plans(given: list[str] | None) -> dict[str, str]:
    """Plans by tier, of ``TIER=PLAN`` each. Raises InvalidRequest."""
    plans = {}
    for text in given or []:
        tier, separator, plan = text.partition("=")
        if not (tier and separator and plan):
            raise InvalidRequest(f"--fault {text}: say TIER=PLAN, such as red=error=0.01")
        plans[tier] = plan
    return plans


def operator(address: str) -> Operator:
    return Operator(address)


def node_address(coordinator: str, node: str | None, address: str | None) -> str:
    """Where a node is reached: given directly, or looked up at the coordinator.

    Without a name the cluster's only node is meant.
    """
    if address is not None:
        return address
    with Operator(coordinator) as cluster:
        nodes = cluster.cluster().nodes
    named = [n for n in nodes if node is None or node in (n.name, n.shard_uuid)]
    if len(named) == 1:
        return str(named[0].address)
    there = ", ".join(sorted(n.name for n in nodes)) or "none"
    if node is None:
        raise InvalidRequest(f"say which node with --node (the cluster has: {there})")
    raise UnknownNode(f"no node {node!r} in the cluster (there: {there})", node=node)


def chosen_nodes(
    coordinator: str, node: str | None, address: str | None, *, every: bool
) -> list[tuple[str, str]]:
    """Names and addresses of the nodes that a command is for: one, or with ``every`` all that the
    coordinator knows. Raises InvalidRequest if both are said."""
    if not every:
        return [(node or "", node_address(coordinator, node, address))]
    if node is not None or address is not None:
        raise InvalidRequest("--all means every node: say no other")
    with Operator(coordinator) as cluster:
        return sorted((n.name, str(n.address)) for n in cluster.cluster().nodes)


def node_client(
    coordinator: str, node: str | None, address: str | None, *, retry_s: float = 0
) -> Client:
    """A client of that node; commands do not repeat failed calls, the person at the shell may."""
    return Client(node_address(coordinator, node, address), retry_s=retry_s)
