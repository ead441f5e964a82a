"""Whether swapping on this machine is safe: what serves the swap must never be swapped itself."""

from __future__ import annotations

import os
from pathlib import Path

from vswap.cli.device.memory_group import may_be_swapped

_SAFE_OOM_SCORE = -500


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
    score = int(Path(f"/proc/{pid}/oom_score_adj").read_text())
    if score > _SAFE_OOM_SCORE:
        how = (
            f"it may not change that itself: echo -1000 > /proc/{pid}/oom_score_adj"
            if locked_bytes(pid) else "start it with --swap-safe, as root"
        )  # fmt: skip
        found.append(f"the out-of-memory killer may pick the node (oom_score_adj {score}): {how}")
    if state_dir is not None and could_wait_for_itself(pid) and not _never_swapped(state_dir):
        found.append(
            f"the node's pages in {state_dir} can be swapped out: start it with --swap-safe, or "
            "mount a tmpfs with -o noswap there"
        )
    return found


def locked_bytes(pid: int) -> int:
    """Of a process's address space: what the kernel never swaps out."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmLck:"):
            return int(line.split()[1]) * 1024
    return 0


def _lives(pid: int) -> bool:
    return pid > 0 and Path(f"/proc/{pid}").exists()


def _never_swapped(path: Path) -> bool:
    """Whether a directory lies on a tmpfs that was mounted ``noswap``."""
    best, options = "", ""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, _, how, *_ = line.split()
        if os.path.commonpath([where, path]) == where and len(where) >= len(best):
            best, options = where, how
    return "noswap" in options.split(",")
