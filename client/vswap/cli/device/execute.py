"""`vswap exec`: an unmodified program with little RAM, and the rest of its memory on a space."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from typing import Annotated, Any

import typer

from vswap.cli import options, units
from vswap.cli.device import attach as device
from vswap.cli.device import machine
from vswap.cli.device.checks import relay_lacks
from vswap.cli.device.commands import Overwrite, Size
from vswap.cli.device.journal import Journal, Users
from vswap.cli.device.memory_group import MemoryGroup, remove_dead
from vswap.cli.device.wanted import careful, must_hold_nothing, what_to_attach
from vswap.wire.errors import Refused

_GROUP = "vswap-exec-"
_NOT_FOUND, _NOT_RUNNABLE = 127, 126
_OURS = "for exec"
"""A step of nothing: `vswap exec` made the attachment, and the last one undoes it."""
_OF_A_TERMINAL = (signal.SIGINT, signal.SIGQUIT)
_PASSED_ON = (*_OF_A_TERMINAL, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


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
    overwrite: Overwrite = False,
    node: options.NodeName = None,
    node_address: options.NodeAddress = None,
    coordinator: options.Coordinator = options.DEFAULT_COORDINATOR,
) -> None:
    """Run an unmodified program with so much RAM, and the rest of its memory on a space.

    Attaches the space as swap if it is not, and undoes what it did. Needs root; the exit code is
    the program's.
    """
    machine.need_root()
    device.need_programs(swap=True)
    # Only the program is short of memory, so the node is not in danger.
    with options.node_client(coordinator, node, node_address) as client:
        wanted = what_to_attach(client, swap_space, size, swap=True, priority=None, strict=False)
    with machine.ended_politely(), contextlib.ExitStack() as stack:
        with Journal(wanted.name, wait=True) as journal:
            if not journal.steps:
                if not overwrite:
                    with options.node_client(coordinator, node, node_address) as client:
                        must_hold_nothing(client, swap_space)
                journal.begin(_OURS)
                device.attach(wanted, journal)
                careful(relay_lacks(journal.log))
            _check_swapping(journal, swap_space)
            users = stack.enter_context(Users(wanted.name))
        try:
            code = _run_in_group(program, memory)
        finally:
            with Journal(wanted.name, wait=True) as journal:
                if journal.find(_OURS) and not users.others():
                    device.detach(journal)
    raise typer.Exit(code)


def _check_swapping(journal: Journal, space: str) -> None:
    swapping = journal.find("swap")
    if swapping is None or swapping["device"] not in machine.swaps():
        raise Refused(f"space {space} is attached, but not as swap: `vswap detach` it first")


def _run_in_group(program: list[str], memory_bytes: int) -> int:
    remove_dead(_GROUP)
    group = MemoryGroup.at(f"{_GROUP}{os.getpid()}")
    group.make(memory_bytes)
    try:
        return _run(program, group)
    finally:
        group.remove()


def _run(program: list[str], group: MemoryGroup) -> int:
    """Runs a program in the group; passes signals on; the exit code as a shell tells it."""
    process: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def pass_on(number: int, _: Any) -> None:
        if number in _OF_A_TERMINAL and _in_foreground():
            return
        if process is None:
            early.append(number)
        else:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    try:
        process = subprocess.Popen(program, preexec_fn=lambda: group.enter(os.getpid()))
        for number in early:
            process.send_signal(number)
        code = process.wait()
    except FileNotFoundError:
        print(f"vswap: {program[0]}: no such program", file=sys.stderr)
        return _NOT_FOUND
    except (OSError, subprocess.SubprocessError) as error:
        print(f"vswap: {program[0]}: {error}", file=sys.stderr)
        return _NOT_RUNNABLE
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _in_foreground() -> bool:
    """Whether what is typed at a terminal comes to us, and then also to the program."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)
