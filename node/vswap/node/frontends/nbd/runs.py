"""Runs: requests of one page each, one behind the other, understood with a few numpy calls.

What a busy client sends mostly. A loop over them takes longer than storing their pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vswap.node.frontends.nbd import wire
from vswap.node.frontends.nbd.wire import Command
from vswap.tiers.record import U8, U64

_FEWEST = 4
_MOST = 128
"""A turn's worth."""
_HEAD_BYTES = 8
"""What is the same in all: magic, flags, command."""


@dataclass(frozen=True, slots=True)
class Run:
    """``n`` requests in range; slots may repeat. Good until the client's buffer is used again."""

    cookies: U64
    """As they travel: big-endian."""
    offsets: U64
    """As they travel."""
    slots: U64
    pages: U8
    """(n, page_bytes) of writes; (n, 0) of reads."""

    def requests(self, page_bytes: int) -> list[tuple[int, int]]:
        """(cookie, offset) of each."""
        cookies = self.cookies.byteswap().tolist()
        return [
            (c, slot * page_bytes) for c, slot in zip(cookies, self.slots.tolist(), strict=True)
        ]


class Runs:
    """Finds runs of one command, without flags, for one connection."""

    def __init__(self, command: Command, *, size_bytes: int, page_bytes: int) -> None:
        payload = page_bytes if command == Command.WRITE else 0
        # Native integers, which are compared as they are: numpy is slow at others.
        self._row = np.dtype(
            {
                "names": ["head", "cookie", "offset", "length", "page"],
                "formats": ["=u8", "=u8", "=u8", "=u4", ("u1", (payload,))],
                "offsets": [0, 8, 16, 24, wire.REQUEST.size],
                "itemsize": wire.REQUEST.size + payload,
            }
        )
        request = wire.REQUEST.pack(wire.REQUEST_MAGIC, 0, command, 0, 0, page_bytes)
        sample: Any = np.frombuffer(request + bytes(payload), self._row)[0]
        self.head = request[:_HEAD_BYTES]
        self._head, self._length = sample["head"], sample["length"]
        self._shift = np.uint64(page_bytes.bit_length() - 1)
        self._mask = np.uint64(page_bytes - 1)
        self._pages = np.uint64(size_bytes // page_bytes)

    def begins(self, data: memoryview, position: int) -> bool:
        """Whether a look at the next few requests promises a run."""
        step = self._row.itemsize
        return (
            len(data) - position >= _FEWEST * step
            and data[position : position + _HEAD_BYTES] == self.head
            and data[position + step : position + step + _HEAD_BYTES] == self.head
            and data[position + 2 * step : position + 2 * step + _HEAD_BYTES] == self.head
        )

    def take(self, data: memoryview) -> tuple[Run, int] | None:
        """The run at the beginning of ``data``, and its bytes; None = it is too short."""
        rows: NDArray[Any] = np.frombuffer(
            data, self._row, min(len(data) // self._row.itemsize, _MOST)
        )
        offsets = rows["offset"]
        where = offsets.byteswap()
        slots = where >> self._shift
        good = rows["head"] == self._head
        good &= rows["length"] == self._length
        good &= slots < self._pages
        good &= (where & self._mask) == 0
        n = len(rows)
        if np.count_nonzero(good) < n:
            n = int(good.argmin())
            if n < _FEWEST:
                return None
            rows, offsets, slots = rows[:n], offsets[:n], slots[:n]
        return Run(rows["cookie"], offsets, slots, rows["page"]), n * self._row.itemsize
