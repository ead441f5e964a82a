"""The least that a compressing NBD server could be: vswap's own transport over zstd frames.

No table, no checksums, no accounting, nothing that outlives it. It measures what zstandard alone
costs in service: with a client on the other processor, and the socket's copies in the caches. In a
loop by itself it costs less than any server could pay.

``python -m benchmarks.bare_nbd SOCKET SIZE``. Beside the socket lies SOCKET.spent: the nanoseconds
of CPU that zstandard took so far, as a 64-bit word.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import cast

import numpy as np
import uvloop
import zstandard

from benchmarks.common import PAGE_BYTES
from vswap.node.device import Device
from vswap.node.frontends.nbd.budget import Budget
from vswap.node.frontends.nbd.connection import Connection
from vswap.node.frontends.nbd.handshake import Offer
from vswap.tiers.backend import Buffer
from vswap.tiers.record import U8, U64

_INFLIGHT_BYTES = 64 * 2**20


class BareDevice:
    """As much of a :class:`Device` as reads and writes of whole pages ask for."""

    def __init__(self, pages: int, spent: Path) -> None:
        self._compress = zstandard.ZstdCompressor(level=1).compress
        self._decompress = zstandard.ZstdDecompressor().decompress
        self._frames = [self._compress(bytes(PAGE_BYTES))] * pages
        self._spent = np.memmap(spent, np.uint64, "w+", shape=1)

    def peek(self, slots: U64) -> list[Buffer | None]:
        frames, decompress = self._frames, self._decompress
        start = time.thread_time_ns()
        pages: list[Buffer | None] = [decompress(frames[k], PAGE_BYTES) for k in slots.tolist()]
        self._spent += np.uint64(time.thread_time_ns() - start)
        return pages

    def write_now(self, slots: U64, pages: U8, hashes: U64 | None = None) -> bool:
        start = time.thread_time_ns()
        frames = list(map(self._compress, pages))
        self._spent += np.uint64(time.thread_time_ns() - start)
        kept = self._frames
        for slot, frame in zip(slots.tolist(), frames, strict=True):
            kept[slot] = frame
        return True

    def window(self) -> None:
        return None


class _Exports:
    def __init__(self, size_bytes: int) -> None:
        self._offer = Offer("s", size_bytes, PAGE_BYTES)

    def names(self) -> list[str]:
        return ["s"]

    def find(self, name: str) -> Offer | None:
        return self._offer


async def _serve(path: str, size_bytes: int) -> None:
    bare = BareDevice(size_bytes // PAGE_BYTES, Path(f"{path}.spent"))
    exports, budget, open_now = _Exports(size_bytes), Budget(_INFLIGHT_BYTES), set[Connection]()

    def accept() -> Connection:
        made = Connection(
            exports, lambda _: cast(Device, bare), budget, Counter(), open_now.discard
        )  # fmt: skip
        open_now.add(made)
        return made

    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    async with await loop.create_unix_server(accept, path):
        await ended.wait()
        for connection in list(open_now):
            connection.abort()


if __name__ == "__main__":
    uvloop.run(_serve(sys.argv[1], int(sys.argv[2])))
