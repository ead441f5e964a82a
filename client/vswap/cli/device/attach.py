"""Attaching a space as a block device of this machine, and taking it off again.

Through the kernel's nbd driver where there is one; else ``nbdfuse`` shows the space as a file, and
a loop device makes a block device of it. In between a relay of our own asks again what the node did
not answer: a node that dies and comes back is a pause to the kernel, not an error.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from vswap.cli.device import machine
from vswap.cli.device.journal import Journal, Step
from vswap.cli.device.memory_group import MemoryGroup
from vswap.wire.errors import Refused, VswapError

_MOUNTS = Path("/run/vswap/mounts")
_APPEAR_S = 15.0
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
    machine.need(*([] if has_nbd_driver() else ["nbdfuse", "fusermount3", "losetup"]))
    machine.need(*(["mkswap", "swapon"] if swap else []))


def has_nbd_driver() -> bool:
    """Whether the kernel has its own NBD client, and the program that sets it up is there."""
    if not Path("/dev/nbd0").exists() and shutil.which("modprobe"):
        subprocess.run(["modprobe", "nbd"], capture_output=True, check=False)
    return Path("/dev/nbd0").exists() and shutil.which("nbd-client") is not None


def attach(wanted: Wanted, journal: Journal) -> str:
    """Attaches; returns the device. What was done is undone if anything fails, or on Ctrl-C.

    Raises Refused. What cannot be undone stays in the journal, for `detach`.
    """
    try:
        whole = wanted.size_bytes == wanted.space_bytes
        device = _by_driver(wanted, journal) if whole and has_nbd_driver() else None
        device = device or _by_fuse(wanted, journal)
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


def _by_driver(wanted: Wanted, journal: Journal) -> str:
    device = next(
        (f"/dev/{path.name}" for path in sorted(Path("/sys/block").glob("nbd*"))
         if not (path / "pid").exists()),
        None,
    )  # fmt: skip
    if device is None:
        raise Refused("all of the kernel's nbd devices are in use")
    where = (
        ["-unix", wanted.nbd.removeprefix("unix:")]
        if wanted.nbd.startswith("unix:")
        else list(wanted.nbd.rsplit(":", 1))
    )
    journal.begin("nbd", device=device)
    extra = ["-swap"] if wanted.swap else []
    machine.run("nbd-client", *where, device, "-name", wanted.space, "-persist", *extra)
    return device


def _by_fuse(wanted: Wanted, journal: Journal) -> str:
    machine.need("nbdfuse", "fusermount3", "losetup")
    group = _group_without_swap(wanted, journal) if wanted.swap else None
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
    log = journal.path.with_suffix(".log")
    with open(log, "w") as output:
        process = subprocess.Popen(
            ["nbdfuse", str(file), "--command", sys.executable, "-m", "vswap.cli.device.relay",
             wanted.nbd, wanted.space, str(wanted.size_bytes)],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            # From the start: memory stays charged to the group in which it was first touched.
            preexec_fn=lambda: group.enter(os.getpid()) if group else None,
        )  # fmt: skip
    journal.amend(step, pid=process.pid)
    _wait_for(file, process, log)
    for one in (process.pid, *machine.children(process.pid)):
        # Not every machine permits it; what they need is small.
        with contextlib.suppress(OSError):
            Path(f"/proc/{one}/oom_score_adj").write_text("-1000")
    return file


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


def _wait_for(file: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    until_s = time.monotonic() + _APPEAR_S
    while not (os.path.ismount(file.parent) and file.exists()):
        if process.poll() is not None or time.monotonic() > until_s:
            said = " ".join(log.read_text().split())[-300:]
            raise Refused(f"the device does not appear: {said or 'nbdfuse says nothing'}")
        time.sleep(0.02)


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


def _undo_driver(step: Step) -> None:
    name = Path(step["device"]).name
    if Path(f"/sys/block/{name}/pid").exists():
        machine.run("nbd-client", "-d", step["device"])


def _undo_group(step: Step) -> None:
    with contextlib.suppress(Refused):
        # At worst an empty group is left; a machine without groups has none.
        MemoryGroup.at(step["name"]).remove()


UNDO = {
    "for exec": lambda step: None,
    "directory": _undo_directory,
    "mount": lambda step: machine.unmount(Path(step["path"]), step["pid"]),
    "loop": lambda step: machine.loop_off(step["file"]),
    "nbd": _undo_driver,
    "group": _undo_group,
    "swap": lambda step: machine.swap_off(step["device"]),
}
