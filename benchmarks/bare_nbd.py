"""The least that a compressing NBD server could be: vswap's own transport over a list of pages.

No table, no checksums, no accounting, nothing that outlives it. With ``zstd`` pages are compressed
one by one, with ``none`` they are kept as they are: what the two differ by is what bare zstandard
costs in a server, with a client on the other processor and the socket's copies in the caches. By
itself, in a loop, it costs less than any server could pay.

``python -m benchmarks.bare_nbd SOCKET SIZE none|zstd``.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, cast

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

    def __init__(
        self, pages: int, encode: Callable[[Any], bytes], decode: Callable[[bytes], bytes]
    ) -> None:
        self._pages = [encode(np.zeros(PAGE_BYTES, np.uint8))] * pages
        self._encode, self._decode = encode, decode

    def peek(self, slots: U64) -> list[Buffer | None]:
        pages, decode = self._pages, self._decode
        return [decode(pages[slot]) for slot in slots.tolist()]

    def write_now(self, slots: U64, pages: U8, hashes: U64 | None = None) -> bool:
        kept, encode = self._pages, self._encode
        for slot, page in zip(slots.tolist(), pages, strict=True):
            kept[slot] = encode(page)
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


async def _serve(socket: str, size_bytes: int, codec: str) -> None:
    compress = zstandard.ZstdCompressor(level=1).compress
    decompress = zstandard.ZstdDecompressor().decompress
    encode: Callable[[Any], bytes] = bytes
    decode: Callable[[bytes], bytes] = bytes
    if codec == "zstd":
        encode, decode = compress, lambda frame: decompress(frame, PAGE_BYTES)
    bare = BareDevice(size_bytes // PAGE_BYTES, encode, decode)
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
    async with await loop.create_unix_server(accept, socket):
        await ended.wait()
        for connection in list(open_now):
            connection.abort()


if __name__ == "__main__":
    uvloop.run(_serve(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
