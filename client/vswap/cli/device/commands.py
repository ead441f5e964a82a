"""`vswap attach`, `vswap detach` and `vswap exec`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vswap.cli import options, units
from vswap.cli.device import attach as device
from vswap.cli.device import checks, machine
from vswap.cli.device.journal import Journal, attached
from vswap.cli.device.memory_group import MemoryGroup, remove_dead
from vswap.client import Client
from vswap.v1 import node_pb2
from vswap.wire.errors import InvalidRequest, Refused

_PAGE_BYTES = 4096
_MOST_SWAP_BYTES = 64 * 2**30
"""Swap on a larger space takes this much of it, unless told: the kernel keeps a byte or two of its
own memory for every page of a swap device."""
_GROUP = "vswap-exec-"
_NOT_FOUND, _NOT_RUNNABLE = 127, 126

Space = Annotated[str, typer.Argument(help="Name of the space.")]
Size = Annotated[
    int | None,
    typer.Option(
        "--size",
        parser=options.parsed(units.parse_size),
        metavar="SIZE",
        help="Size of the device; a space that does not exist is created with it.",
    ),
]

errors = Console(stderr=True, soft_wrap=True, highlight=False)


def attach(
    space: Space,
    size: Size = None,
    swap: Annotated[bool, typer.Option("--swap", help="Also swap on it.")] = False,
    priority: Annotated[
        int | None,
        typer.Option("--priority", min=0, max=32767, help="Of the swap: higher is used first."),
    ] = None,
    node: options.NodeName = None,
    node_address: options.NodeAddress = None,
    coordinator: options.Coordinator = options.DEFAULT_COORDINATOR,
) -> None:
    """Make a space a block device of this machine. Needs root."""
    if priority is not None and not swap:
        raise InvalidRequest("--priority says something of --swap, which was not asked for")
    machine.need_root()
    with options.node_client(coordinator, node, node_address) as client:
        wanted = _wanted(client, space, size, swap, priority)
    with Journal(wanted.name) as journal:
        _refuse_if_attached(journal)
        found = device.attach(wanted, journal)
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
    with Journal(_attachment(space, node)) as journal:
        swap = journal.find("swap") is not None
        device.detach(journal)
    errors.print(f"space {space} is detached; its pages {'are freed' if swap else 'stay stored'}")


def execute(
    program: Annotated[list[str], typer.Argument(help="Program and its arguments, after --.")],
    memory: Annotated[
        int,
        typer.Option(
            "--memory",
            parser=options.parsed(units.parse_size),
            metavar="SIZE",
            help="RAM that the program may use.",
        ),
    ],
    swap_space: Annotated[
        str, typer.Option("--swap-space", metavar="SPACE", help="Where its overflow goes.")
    ],
    size: Size = None,
    node: options.NodeName = None,
    node_address: options.NodeAddress = None,
    coordinator: options.Coordinator = options.DEFAULT_COORDINATOR,
) -> None:
    """Run an unmodified program with so much RAM, and the rest of its memory on a space.

    Attaches the space as swap if it is not, and undoes what it did. Needs root; the exit code is
    the program's.
    """
    machine.need_root()
    with options.node_client(coordinator, node, node_address) as client:
        wanted = _wanted(client, swap_space, size, True, None)
    with Journal(wanted.name) as journal:
        swapping = journal.find("swap")
        ours = not journal.steps
        if ours:
            device.attach(wanted, journal)
        elif swapping is None or swapping["device"] not in machine.swaps():
            raise Refused(f"space {swap_space} is attached, but not as swap: detach it first")
    try:
        code = _run_in_group(program, memory)
    finally:
        if ours:
            with Journal(wanted.name) as journal:
                device.detach(journal)
    raise typer.Exit(code)


def _run_in_group(program: list[str], memory_bytes: int) -> int:
    remove_dead(_GROUP)
    group = MemoryGroup.at(f"{_GROUP}{os.getpid()}")
    group.make(memory_bytes)
    try:
        return _run(program, group)
    finally:
        group.remove()


def _wanted(
    client: Client, space: str, size: int | None, swap: bool, priority: int | None
) -> device.Wanted:
    status = client.status()
    found = _find(client, space)
    if found is None and size is not None:
        slots = max(-(-size // _PAGE_BYTES), 1)
        client.create_space(space, page_bytes=_PAGE_BYTES, max_slots=slots)
        found = _find(client, space)
    if found is None:
        raise InvalidRequest(
            f"no space named {space!r} at node {status.name}: say --size to create it"
        )
    space_bytes = found.page_bytes * found.max_slots
    if size is not None and size > space_bytes:
        raise Refused(
            f"space {space} has {units.size(space_bytes)}, not {units.size(size)}: "
            "`vswap space set` can let it grow"
        )
    nbd = _local_first(status)
    if swap:
        for line in checks.missing(_local_pid(status, nbd), _state_dir(nbd)):
            errors.print(f"[yellow]careful:[/] {line}")
    default = min(space_bytes, _MOST_SWAP_BYTES) if swap else space_bytes
    return device.Wanted(
        name=f"{space}@{status.name}", space=space, nbd=nbd,
        size_bytes=(size or default) & ~(_PAGE_BYTES - 1), space_bytes=space_bytes,
        swap=swap, priority=priority,
    )  # fmt: skip


def _find(client: Client, space: str) -> node_pb2.Space | None:
    return next((known for known in client.spaces() if known.name == space), None)


def _local_first(status: node_pb2.NodeStatus) -> str:
    """Where to reach the node's block devices from here: its socket, else TCP."""
    here = [a for a in status.nbd if a.startswith("unix:") and Path(a[5:]).is_socket()]
    other = [a for a in status.nbd if not a.startswith("unix:")]
    if not here + other:
        raise Refused(
            f"node {status.name} serves no block devices that can be reached from here "
            f"(its addresses: {', '.join(status.nbd) or 'none'}; see --nbd of `vswap run node`)"
        )
    return str((here + other)[0])


def _local_pid(status: node_pb2.NodeStatus, nbd: str) -> int:
    return int(status.pid) if nbd.startswith("unix:") else 0


def _state_dir(nbd: str) -> Path | None:
    path = Path(nbd.removeprefix("unix:"))
    return path.parent if nbd.startswith("unix:") and (path.parent / "shard").exists() else None


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


def _refuse_if_attached(journal: Journal) -> None:
    if journal.steps:
        raise Refused(f"{journal.name} is attached already, or half: `vswap detach` undoes it")


def _run(program: list[str], group: MemoryGroup) -> int:
    """Runs a program in the group; passes signals on; the exit code as a shell tells it."""
    try:
        process = subprocess.Popen(program, preexec_fn=lambda: group.enter(os.getpid()))
    except FileNotFoundError:
        print(f"vswap: {program[0]}: no such program", file=sys.stderr)
        return _NOT_FOUND
    except (PermissionError, OSError, subprocess.SubprocessError) as error:
        print(f"vswap: {program[0]}: {error}", file=sys.stderr)
        return _NOT_RUNNABLE

    def pass_on(number: int, _: Any) -> None:
        process.send_signal(number)

    passed = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.signal(number, pass_on) for number in passed}
    # The terminal sends its Ctrl-C to the program as well.
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code
