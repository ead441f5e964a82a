"""What the commands ask of the machine: programs, mounts, loop devices, swap areas."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vswap.wire.errors import Refused

_PACKAGES = {
    "nbdfuse": "libnbd-bin",
    "fusermount3": "fuse3",
    "losetup": "util-linux",
    "mkswap": "util-linux",
    "swapon": "util-linux",
}
"""Where Debian and Ubuntu have them."""
_RELAY = "vswap.cli.device.relay"
"""On the command line of all that we start and leave behind."""
_COMMAND_S = 60.0
_SWAPOFF_S = 3600.0
"""Everything that is on it must come back first."""
_SWAP_MAGIC = b"SWAPSPACE2"
"""The end of a swap area's first page."""


def need_root() -> None:
    """Raises Refused."""
    if sys.platform != "linux":
        raise Refused(
            "block devices and swap need Linux; pages are stored and loaded from anywhere"
        )
    if os.geteuid() != 0:
        raise Refused("only root can attach devices: use sudo, or `vswap` in a root shell")


@contextlib.contextmanager
def ended_politely() -> Iterator[None]:
    """What would end us at once is a Ctrl-C: it is undone what was begun."""

    def interrupt(number: int, _: Any) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def need(*programs: str) -> None:
    """Raises Refused with what to install where a program is missing."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        packages = " ".join(sorted({_PACKAGES.get(program, program) for program in missing}))
        raise Refused(f"{', '.join(missing)} not found: apt-get install {packages}")


def run(*command: str, timeout_s: float = _COMMAND_S) -> str:
    """Standard output. Raises Refused with what the command said. A Ctrl-C is ours, not its."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=timeout_s,
            start_new_session=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise Refused(f"{' '.join(command)}: no end after {timeout_s:.0f} s") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
        raise Refused(f"{' '.join(command)}: {said}")
    return done.stdout


def children(pid: int) -> list[int]:
    """Processes that a process of one thread, or its first thread, has started."""
    told = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in told.split()]


def swaps() -> list[str]:
    """Devices that the kernel swaps on."""
    lines = Path("/proc/swaps").read_text().splitlines()[1:]
    return [line.split()[0] for line in lines]


def swap_off(device: str) -> None:
    """Ends swapping on a device. What was swapped means nothing any more, and is freed.

    So is what `mkswap` made of it, if it got no further.
    """
    if device in swaps():
        run("swapoff", device, timeout_s=_SWAPOFF_S)
    elif not _is_swap_area(device):
        return
    with contextlib.suppress(Refused):
        run("blkdiscard", "--force", device)


def _is_swap_area(device: str) -> bool:
    with contextlib.suppress(OSError), open(device, "rb") as file:
        return file.read(mmap.PAGESIZE).endswith(_SWAP_MAGIC)
    return False


def loops_of(file: str) -> list[str]:
    """Loop devices on a file."""
    out = subprocess.run(
        ["losetup", "-n", "-O", "NAME,BACK-FILE", "-l"], capture_output=True, text=True, check=False
    ).stdout
    return [line.split()[0] for line in out.splitlines() if line.split()[1:2] == [file]]


def loop_off(file: str) -> None:
    for device in loops_of(file):
        run("losetup", "-d", device)
    until_s = time.monotonic() + 10
    while loops_of(file):
        if time.monotonic() > until_s:
            raise Refused(f"the loop device on {file} is still in use")
        time.sleep(0.05)


def unmount(path: Path, pid: int | None) -> None:
    """Unmounts a FUSE directory, and waits for the process behind it."""
    until_s = time.monotonic() + 10
    while os.path.ismount(path):
        done = subprocess.run(["umount", str(path)], capture_output=True, text=True, check=False)
        if done.returncode and time.monotonic() > until_s:
            raise Refused(f"{path} cannot be unmounted: {done.stderr.strip()}")
        time.sleep(0.05 if done.returncode else 0)
    end(pid)


def end(pid: int | None) -> None:
    """Ends a process of ours, politely first."""
    if pid is None or not _is_ours(pid):
        return
    for number, patience_s in ((None, 5.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        if number is not None:
            os.kill(pid, number)
        until_s = time.monotonic() + patience_s
        while _is_ours(pid):
            if time.monotonic() > until_s:
                break
            time.sleep(0.02)
        else:
            return


def _is_ours(pid: int) -> bool:
    """Whether the process lives and is the one we started: numbers are used again."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z" and _RELAY in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False
