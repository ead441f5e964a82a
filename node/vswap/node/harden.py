"""What a node does so that the machine it runs on can swap on it."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_PR_SET_IO_FLUSHER = 57
_OOM_SCORE_ADJ = -1000


def harden() -> dict[str, str]:
    """Locks memory, tells the kernel that we do I/O for it, asks the out-of-memory killer to look
    elsewhere. Returns what could not be had, and why; each is useful without the others.

    Memory is locked as it is touched (MCL_ONFAULT): locking all at once would allocate the sparse
    tables whole.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    failed = {}
    if libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT):
        failed["memory lock"] = os.strerror(ctypes.get_errno())
    if libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0):
        failed["io flusher"] = os.strerror(ctypes.get_errno())
    try:
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE_ADJ))
    except OSError as error:
        failed["oom score"] = os.strerror(error.errno or 0)
    return failed
