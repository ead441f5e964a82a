"""Attaching a space as a block device of this machine, and taking it off again.

Through the kernel's nbd driver where there is one; else ``nbdfuse`` shows the space as a file, and
a loop device makes a block device of it. In between ``nbdkit`` repeats what the node did not
answer: a node that dies and comes back is a pause to the kernel, not an error.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from vswap.cli.device import machine
from vswap.cli.device.journal import Journal, Step
from vswap.cli.device.memory_group import MemoryGroup
from vswap.wire.errors import Refused

_MOUNTS = Path("/run/vswap/mounts")
_RETRY_S = 300
"""How long the kernel's requests wait for a node that is away."""
_APPEAR_S = 15.0
_KEPT_GROUP = "vswap-attached"


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


def has_nbd_driver() -> bool:
    """Whether the kernel has its own NBD client, and the program that sets it up is there."""
    if not Path("/dev/nbd0").exists() and shutil.which("modprobe"):
        subprocess.run(["modprobe", "nbd"], capture_output=True, check=False)
    return Path("/dev/nbd0").exists() and shutil.which("nbd-client") is not None


def attach(wanted: Wanted, journal: Journal) -> str:
    """Attaches; returns the device. What was done is undone if anything fails, or on Ctrl-C."""
    try:
        whole = wanted.size_bytes == wanted.space_bytes
        device = _by_driver(wanted, journal) if whole and has_nbd_driver() else None
        device = device or _by_fuse(wanted, journal)
        if wanted.swap:
            _swap_on(device, wanted, journal)
        return device
    except BaseException:
        detach(journal)
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
    machine.need("nbdfuse", "nbdkit", "fusermount3", "losetup")
    mount = _MOUNTS / wanted.name
    file = mount / "nbd"
    journal.begin("directory", path=str(mount))
    mount.mkdir(parents=True, exist_ok=True, mode=0o700)
    step = journal.begin("mount", path=str(mount), pid=None)
    log = journal.path.with_suffix(".log")
    with open(log, "w") as output:
        process = subprocess.Popen(
            ["nbdfuse", str(file), "--command", *_nbdkit(wanted)],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    journal.amend(step, pid=process.pid)
    _wait_for(file, process, log)
    _protect(process.pid)
    journal.begin("loop", file=str(file))
    out = machine.run(
        "losetup", "--direct-io=on", "--sizelimit", str(wanted.size_bytes), "-f", "--show",
        str(file),
    )  # fmt: skip
    return out.strip()


def _nbdkit(wanted: Wanted) -> list[str]:
    if wanted.nbd.startswith("unix:"):
        where = [f"socket={wanted.nbd.removeprefix('unix:')}"]
    else:
        host, _, port = wanted.nbd.rpartition(":")
        where = [f"hostname={host.strip('[]')}", f"port={port}"]
    return [
        "nbdkit", "-s", "--exit-with-parent", "--filter=retry", "nbd", *where,
        f"export={wanted.space}", f"retries={_RETRY_S}", "retry-delay=1", "retry-exponential=no",
    ]  # fmt: skip


def _wait_for(file: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    until_s = time.monotonic() + _APPEAR_S
    while not (os.path.ismount(file.parent) and file.exists()):
        if process.poll() is not None or time.monotonic() > until_s:
            said = " ".join(log.read_text().split())[-300:]
            raise Refused(f"the device does not appear: {said or 'nbdfuse says nothing'}")
        time.sleep(0.02)


def _protect(pid: int) -> None:
    """Keeps what stands between the kernel and its swap from being killed or swapped out."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    group = MemoryGroup.at(_KEPT_GROUP)
    for process in (str(pid), *children):
        try:
            Path(f"/proc/{process}/oom_score_adj").write_text("-1000")
            group.forbid_swap()
            group.enter(int(process))
        except OSError:
            # The checks of the command say what could not be had.
            continue


def _swap_on(device: str, wanted: Wanted, journal: Journal) -> None:
    machine.need("mkswap", "swapon")
    machine.run("mkswap", "--label", "vswap", device)
    journal.begin("swap", device=device)
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


UNDO = {
    "directory": _undo_directory,
    "mount": lambda step: machine.unmount(Path(step["path"]), step["pid"]),
    "loop": lambda step: machine.loop_off(step["file"]),
    "nbd": _undo_driver,
    "swap": lambda step: machine.swap_off(step["device"]),
}
