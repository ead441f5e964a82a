"""Giving memory back: what the C library keeps of freed memory is bounded too.

glibc keeps what is freed, in an arena for each of many threads, cut into pieces: after an overload
it held twice of what was in use.
"""

from __future__ import annotations

import asyncio
import ctypes

import structlog

_M_ARENA_MAX = -8
_ARENAS = 2
_EVERY_S = 2.0

logger = structlog.get_logger("vswap.node")


async def trim_memory() -> None:
    """Runs till it is cancelled. On another C library it ends at once."""
    libc = ctypes.CDLL(None)
    try:
        mallopt, trim = libc.mallopt, libc.malloc_trim
    except AttributeError:
        logger.info("not glibc: freed memory may stay with the process")
        return
    mallopt(_M_ARENA_MAX, _ARENAS)
    while True:
        await asyncio.sleep(_EVERY_S)
        # A thread: ctypes lets go of the interpreter meanwhile.
        await asyncio.to_thread(trim, 0)
