"""Whether swapping on this machine is safe: what serves the swap must never be swapped itself."""

from __future__ import annotations

import os
from pathlib import Path


def missing(pid: int, state_dir: Path | None) -> list[str]:
    """What a node of this machine lacks, a line each, with how to mend it. Empty: all is well.

    A machine that runs short of memory may push the node's own memory to the swap that the node
    serves, and then waits for itself. None of it matters while the pressure is confined to a
    control group, as `vswap exec` does.
    """
    if not pid or not Path(f"/proc/{pid}").exists():
        return []
    found = []
    if not _locked_bytes(pid):
        found.append(
            f"the node's memory is not locked (pid {pid}): start it with --swap-safe, as root"
        )
    score = int(Path(f"/proc/{pid}/oom_score_adj").read_text())
    if score > -500:
        how = (
            "start it with --swap-safe, as root" if not _locked_bytes(pid)
            else f"it may not change that itself: echo -1000 > /proc/{pid}/oom_score_adj"
        )  # fmt: skip
        found.append(f"the out-of-memory killer may pick the node (oom_score_adj {score}): {how}")
    if state_dir is not None and not _never_swapped(state_dir) and not _locked_bytes(pid):
        found.append(
            f"the node's pages in {state_dir} can be swapped out: mount a tmpfs with -o noswap "
            "there, or start the node with --swap-safe"
        )
    return found


def _locked_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmLck:"):
            return int(line.split()[1]) * 1024
    return 0


def _never_swapped(path: Path) -> bool:
    """Whether a directory lies on a tmpfs that was mounted ``noswap``."""
    best, options = "", ""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, _, how, *_ = line.split()
        if os.path.commonpath([where, path]) == where and len(where) >= len(best):
            best, options = where, how
    return "noswap" in options.split(",")
