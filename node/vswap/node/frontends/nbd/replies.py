"""Replies as bytes. A client that did not negotiate structured replies gets simple ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vswap.node.frontends.nbd import wire
from vswap.tiers.record import U32, U64

_MAX_TEXT_BYTES = 1024


class _Template:
    """Replies that differ in cookie and offset only."""

    def __init__(self, reply: bytes, **fields: int) -> None:
        """``fields``: where in the reply they are."""
        self._reply = reply
        self.row = np.dtype(
            {
                "names": list(fields), "formats": ["=u8"] * len(fields),
                "offsets": list(fields.values()), "itemsize": len(reply),
            }
        )  # fmt: skip

    def fill(self, **fields: U64) -> bytearray:
        """One reply for each row of the fields, which are as they travel."""
        replies = bytearray(self._reply * len(fields["cookie"]))
        rows = np.frombuffer(replies, self.row)
        for name in self.row.names or ():
            rows[name] = fields[name]
        return replies


class Replies:
    """Makes the replies for one connection."""

    def __init__(self, *, structured: bool, page_bytes: int) -> None:
        self.structured = structured
        self._done = _Template(self.done(0), cookie=8)
        header = self.data(0, 0, page_bytes)
        self._page = _Template(header, cookie=8, **({"offset": 20} if structured else {}))

    def done_all(self, cookies: U64) -> bytearray:
        """:meth:`done` of many; ``cookies`` as they travel."""
        return self._done.fill(cookie=cookies)

    def pages(self, cookies: U64, offsets: U64) -> list[bytearray]:
        """:meth:`data` of many reads of one page; both as they travel."""
        replies, size = self._page.fill(cookie=cookies, offset=offsets), self._page.row.itemsize
        return [replies[start : start + size] for start in range(0, len(replies), size)]

    def done(self, cookie: int) -> bytes:
        """A success without data. Also what ends a structured reply in several chunks."""
        if self.structured:
            return wire.CHUNK.pack(wire.CHUNK_MAGIC, wire.CHUNK_DONE, wire.CHUNK_NONE, cookie, 0)
        return wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, 0, cookie)

    def error(self, cookie: int, errno: int, why: str) -> bytes:
        if not self.structured:
            return wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, errno, cookie)
        text = why.encode()[:_MAX_TEXT_BYTES].decode(errors="ignore").encode()
        body = errno.to_bytes(4, "big") + len(text).to_bytes(2, "big") + text
        return (
            wire.CHUNK.pack(wire.CHUNK_MAGIC, wire.CHUNK_DONE, wire.CHUNK_ERROR, cookie, len(body))
            + body
        )

    def data(self, cookie: int, offset: int, length: int, *, last: bool = True) -> bytes:
        """What precedes ``length`` bytes of data, all that was asked for, or a part.

        A part is possible in structured replies only.
        """
        if not self.structured:
            return wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, 0, cookie)
        return wire.DATA_CHUNK.pack(
            wire.CHUNK_MAGIC, wire.CHUNK_DONE if last else 0, wire.CHUNK_DATA, cookie,
            length + 8, offset,
        )  # fmt: skip

    def block_status(self, cookie: int, extents: Sequence[tuple[int, U32, U32]]) -> bytes:
        """One chunk per context: (id, lengths in bytes, states)."""
        parts = []
        for number, lengths, states in extents:
            pairs = np.column_stack((lengths, states)).astype(">u4").tobytes()
            parts.append(
                wire.CHUNK.pack(
                    wire.CHUNK_MAGIC, 0, wire.CHUNK_BLOCK_STATUS, cookie, 4 + len(pairs)
                )
            )
            parts.append(number.to_bytes(4, "big") + pairs)
        return b"".join(parts) + self.done(cookie)
