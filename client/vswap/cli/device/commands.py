"""`vswap attach` and `vswap detach`."""

from __future__ import annotations

from typing import Annotated

import typer

from vswap.cli import options, units
from vswap.cli.device import attach as device
from vswap.cli.device import machine
from vswap.cli.device.checks import relay_lacks
from vswap.cli.device.journal import Journal, Users, attached
from vswap.cli.device.wanted import careful, errors, must_hold_nothing, what_to_attach
from vswap.wire.errors import InvalidRequest, Refused

Space = Annotated[str, typer.Argument(help="Name of the space.")]
Size = Annotated[
    int | None,
    typer.Option(
        "--size",
        parser=options.parsed(units.parse_size),
        metavar="SIZE",
        help="Size of the device, in whole pages; a space that does not exist is created with it.",
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Swap also on a space that holds pages; they are lost."),
]


def attach(
    space: Space,
    size: Size = None,
    swap: Annotated[bool, typer.Option("--swap", help="Also swap on it.")] = False,
    priority: Annotated[
        int | None,
        typer.Option("--priority", min=0, max=32767, help="Of the swap: higher is used first."),
    ] = None,
    overwrite: Overwrite = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Swap also where the node could be swapped out to itself."),
    ] = False,
    node: options.NodeName = None,
    node_address: options.NodeAddress = None,
    coordinator: options.Coordinator = options.DEFAULT_COORDINATOR,
) -> None:
    """Make a space a block device of this machine. Needs root."""
    for said, option in ((priority is not None, "--priority"), (overwrite, "--overwrite")):
        if said and not swap:
            raise InvalidRequest(f"{option} says something of --swap, which was not asked for")
    machine.need_root()
    device.need_programs(swap=swap)
    with options.node_client(coordinator, node, node_address) as client:
        wanted = what_to_attach(
            client, space, size, swap=swap, priority=priority, strict=swap and not force
        )
    with machine.ended_politely(), Journal(wanted.name) as journal:
        if journal.steps:
            raise Refused(f"{wanted.name} is attached already, or half: `vswap detach` undoes it")
        if swap and not overwrite:
            with options.node_client(coordinator, node, node_address) as client:
                must_hold_nothing(client, space)
        found = device.attach(wanted, journal)
        if swap:
            careful(relay_lacks(journal.log))
    typer.echo(found)
    what = f"{units.size(wanted.size_bytes)} of space {space}"
    errors.print(f"{what} {'is swap' if swap else 'is a disk'} now; `vswap detach {space}` ends it")


def detach(
    space: Space,
    node: Annotated[
        str | None, typer.Option("--node", metavar="NAME", help="Node, where several have it.")
    ] = None,
) -> None:
    """Undo `vswap attach`, also one that was killed in the middle. Needs root."""
    machine.need_root()
    name = _attachment(space, node)
    with machine.ended_politely(), Journal(name) as journal:
        with Users(name) as users:
            if users.others():
                raise Refused(f"`vswap exec` runs a program on {name}: end it first")
        swap = journal.find("swap") is not None
        device.detach(journal)
    errors.print(f"space {space} is detached; its pages {'are freed' if swap else 'stay stored'}")


def _attachment(space: str, node: str | None) -> str:
    names = [
        n
        for n in attached()
        if n.rpartition("@")[0] == space and node in (None, n.rpartition("@")[2])
    ]
    if not names:
        there = ", ".join(attached()) or "nothing"
        raise InvalidRequest(f"space {space} is not attached (attached: {there})")
    if len(names) > 1:
        raise InvalidRequest(f"say which with --node: {', '.join(names)}")
    return names[0]
