"""Attaching a space as a block device of this machine, and taking it off again.

Through the kernel's nbd driver where there is one; else ``nbdfuse`` shows the space as a file, and
a loop device makes a block device of it. Either is served by a relay of our own, which asks again
what the node did not answer: a node that dies and comes back is a pause to the kernel, not an
error.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from vswap.cli.device import driver, export, machine
from vswap.cli.device.journal import Journal, Step
from vswap.cli.device.memory_group import MemoryGroup
from vswap.wire.errors import Refused, VswapError

_MOUNTS = Path("/run/vswap/mounts")
_APPEAR_S = 60.0
"""On a machine that is very busy. That a process has died is noticed at once."""
_KEPT_GROUP = "vswap-device-"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to attach."""

    name: str
    """Of the attachment: SPACE@NODE."""
    space: str
    nbd: str
    """Where the node serves it: unix:/path or host:port."""
    size_bytes: int
    """Of the device; at most the space's."""
    space_bytes: int
    swap: bool
    priority: int | None
    force: bool = False
    """Also where it cannot be kept from being swapped out to itself."""


def need_programs(*, swap: bool) -> None:
    """Raises Refused with what to install, before anything is done."""
    machine.need(*([] if driver.usable() else ["nbdfuse", "fusermount3", "losetup"]))
    machine.need(*(["mkswap", "swapon"] if swap else []))


def attach(wanted: Wanted, journal: Journal) -> str:
    """Attaches; returns the device. What was done is undone if anything fails, or on Ctrl-C.

    Raises Refused. What cannot be undone stays in the journal, for `detach`.
    """
    try:
        group = _group_without_swap(wanted, journal) if wanted.swap else None
        way = _by_driver if driver.usable() else _by_fuse
        device = way(wanted, journal, group)
        if wanted.swap:
            _swap_on(device, wanted, journal)
        return device
    except BaseException as error:
        try:
            detach(journal)
        except VswapError as left:
            why = str(error) or "interrupted"
            raise Refused(
                f"{why}; undoing failed too: {left}; `vswap detach {wanted.space}` tries again"
            ) from error
        raise


def detach(journal: Journal) -> None:
    """Undoes every step, in order."""
    journal.undo(UNDO)


# -------------------------------------------------------------------- the ways to a device


def _by_driver(wanted: Wanted, journal: Journal, group: MemoryGroup | None) -> str:
    """The kernel has one end of a pair of sockets, the relay the other: neither sees it end.

    A command that is killed on the way leaves nothing but what the journal tells. Before the kernel
    has its end, that end dies with us, and then the relay ends by itself.
    """
    ours, theirs = socket.socketpair()
    with ours:
        step = journal.begin("relay", pid=None)
        with theirs:
            process = _start(_relay(wanted), theirs.fileno(), journal, group)
        journal.amend(step, pid=process.pid)
        _spare(process.pid)
        offer = _offer(ours, journal)
        owner = f"vswap {wanted.name}"
        journal.begin("nbd", owner=owner)
        return driver.connect(ours, size_bytes=offer.size_bytes, flags=offer.flags, owner=owner)


def _by_fuse(wanted: Wanted, journal: Journal, group: MemoryGroup | None) -> str:
    file = _fuse(wanted, journal, group)
    journal.begin("loop", file=str(file))
    return machine.run("losetup", "--direct-io=on", "-f", "--show", str(file)).strip()


def _fuse(wanted: Wanted, journal: Journal, group: MemoryGroup | None) -> Path:
    """Shows the space as a file; returns it."""
    mount = _MOUNTS / wanted.name
    file = mount / "nbd"
    journal.begin("directory", path=str(mount))
    mount.mkdir(parents=True, exist_ok=True, mode=0o700)
    step = journal.begin("mount", path=str(mount), pid=None)
    command = ["nbdfuse", str(file), "--command", *_relay(wanted)]
    process = _start(command, subprocess.DEVNULL, journal, group)
    journal.amend(step, pid=process.pid)
    _wait_for(file, process, journal)
    _spare(process.pid, *machine.children(process.pid))
    return file


# -------------------------------------------------------------------- what serves it


def _relay(wanted: Wanted) -> list[str]:
    return [sys.executable, "-m", "vswap.cli.device.relay", wanted.nbd, wanted.space,
            str(wanted.size_bytes)]  # fmt: skip


def _start(
    command: list[str], stdin: int, journal: Journal, group: MemoryGroup | None
) -> subprocess.Popen[bytes]:
    """Starts what outlives us."""
    with open(journal.log, "w") as output:
        return subprocess.Popen(
            command, stdin=stdin, stdout=output, stderr=output, start_new_session=True,
            # From the start: memory stays charged to the group in which it was first touched.
            preexec_fn=lambda: group.enter(os.getpid()) if group else None,
        )  # fmt: skip


def _spare(*pids: int) -> None:
    """Asks the out-of-memory killer to look elsewhere."""
    for pid in pids:
        # Not every machine permits it; what they need is small.
        with contextlib.suppress(OSError):
            Path(f"/proc/{pid}/oom_score_adj").write_text("-1000")


def _group_without_swap(wanted: Wanted, journal: Journal) -> MemoryGroup | None:
    """For what stands between the kernel and its swap, which must never be swapped out itself."""
    name = _KEPT_GROUP + wanted.name
    journal.begin("group", name=name)
    try:
        group = MemoryGroup.at(name)
        group.forbid_swap()
        return group
    except Refused:
        if wanted.force:
            return None
        raise


def _offer(connection: socket.socket, journal: Journal) -> export.Offer:
    """What the relay offers, once it has reached the node."""
    connection.settimeout(_APPEAR_S)
    try:
        offer = export.take_greeting(connection)
    except (OSError, EOFError) as error:
        raise _does_not_appear(journal, "the relay") from error
    connection.settimeout(None)
    return offer


def _wait_for(file: Path, process: subprocess.Popen[bytes], journal: Journal) -> None:
    until_s = time.monotonic() + _APPEAR_S
    while not (os.path.ismount(file.parent) and file.exists()):
        if process.poll() is not None or time.monotonic() > until_s:
            raise _does_not_appear(journal, "nbdfuse")
        time.sleep(0.02)


def _does_not_appear(journal: Journal, who: str) -> Refused:
    said = " ".join(journal.log.read_text().split())[-300:]
    return Refused(f"the device does not appear: {said or f'{who} says nothing'}")


def _swap_on(device: str, wanted: Wanted, journal: Journal) -> None:
    journal.begin("swap", device=device)
    machine.run("mkswap", "--label", "vswap", device)
    flags = [] if wanted.priority is None else ["--priority", str(wanted.priority)]
    machine.run("swapon", "--discard", *flags, device)


# -------------------------------------------------------------------- undoing


def _undo_directory(step: Step) -> None:
    path = Path(step["path"])
    if path.exists():
        path.rmdir()


def _undo_group(step: Step) -> None:
    with contextlib.suppress(Refused):
        # At worst an empty group is left; a machine without groups has none.
        MemoryGroup.at(step["name"]).remove()


UNDO = {
    "for exec": lambda step: None,
    "directory": _undo_directory,
    "mount": lambda step: machine.unmount(Path(step["path"]), step["pid"]),
    "loop": lambda step: machine.loop_off(step["file"]),
    "relay": lambda step: machine.end(step["pid"]),
    "nbd": lambda step: driver.disconnect(step["owner"]),
    "group": _undo_group,
    "swap": lambda step: machine.swap_off(step["device"]),
}
