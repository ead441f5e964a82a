"""Whether swapping on this machine is safe: what serves the swap must never be swapped itself."""

from __future__ import annotations

import os
from pathlib import Path

from vswap.cli.device.memory_group import may_be_swapped

_SAFE_OOM_SCORE = -500
_IO_FLUSHER = 0x00080000 | 0x00100000
"""PF_MEMALLOC_NOIO and PF_LOCAL_THROTTLE of the kernel: what PR_SET_IO_FLUSHER sets."""
_START_SO = "start it with --swap-safe, as root"
_RELAY_LACKS = "vswap: no "
"""How the relay begins a line of its log about what it could not get."""


def could_wait_for_itself(pid: int) -> str:
    """How a node of this machine could end up on its own swap, and how to mend it; "": it cannot.

    ``pid`` 0: the node is on another machine. A machine that runs short of memory would push the
    node's own memory to the swap that the node serves, and then wait for itself, for ever. It does
    not matter where the shortage is confined to a control group, as `vswap exec` does.
    """
    if not _lives(pid) or locked_bytes(pid) or not may_be_swapped(pid):
        return ""
    return (
        f"the node (pid {pid}) could be swapped out to itself: start it with --swap-safe, as root, "
        "or in a control group that may not swap"
    )


def missing(pid: int, state_dir: Path | None) -> list[str]:
    """What else a node of this machine lacks, a line each, with how to mend it."""
    if not _lives(pid):
        return []
    found = []
    tried = bool(locked_bytes(pid))
    score = int(Path(f"/proc/{pid}/oom_score_adj").read_text())
    if score > _SAFE_OOM_SCORE:
        how = f"it may not change that itself: echo -1000 > /proc/{pid}/oom_score_adj"
        found.append(
            f"the out-of-memory killer may pick the node (oom_score_adj {score}): "
            + (how if tried else _START_SO)
        )
    if not is_io_flusher(Path(f"/proc/{pid}/stat")):
        how = "it may not tell that itself, which takes CAP_SYS_RESOURCE and Linux 5.6"
        found.append(
            "the kernel does not know that the node does I/O for it (PR_SET_IO_FLUSHER): "
            + (how if tried else _START_SO)
        )
    if state_dir is not None and is_swappable(state_dir, Path("/proc/mounts")):
        when = "" if could_wait_for_itself(pid) else " while it restarts"
        found.append(
            f"the node's pages in {state_dir} can be swapped out{when}: mount a tmpfs with "
            "-o noswap there (Linux 6.4)"
        )
    return found


def relay_lacks(log: Path) -> list[str]:
    """What the relay of a device could not get, a line each, by its log."""
    return [
        f"of the device's relay: no {line.removeprefix(_RELAY_LACKS)}"
        for line in log.read_text().splitlines()
        if line.startswith(_RELAY_LACKS)
    ]


def locked_bytes(pid: int) -> int:
    """Of a process's address space: what the kernel never swaps out."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmLck:"):
            return int(line.split()[1]) * 1024
    return 0


def _lives(pid: int) -> bool:
    return pid > 0 and Path(f"/proc/{pid}").exists()


def is_io_flusher(told: Path) -> bool:
    """Whether a process is one, by its ``/proc/PID/stat``."""
    flags = int(told.read_text().rpartition(")")[2].split()[6])
    return flags & _IO_FLUSHER == _IO_FLUSHER


def is_swappable(path: Path, mounts: Path) -> bool:
    """Whether a directory lies on a tmpfs, and that not mounted ``noswap``."""
    best, kind, options = "", "", ""
    for line in mounts.read_text().splitlines():
        _, where, what, how, *_ = line.split()
        if os.path.commonpath([where, path]) == where and len(where) >= len(best):
            best, kind, options = where, what, how
    return kind == "tmpfs" and "noswap" not in options.split(",")
