"""What is under way between a block device and its node: bytes in, bytes out, no I/O.

Remembers every request until it is answered, so that all of them can be asked again of a node that
went away and came back. That is safe: reads, writes and trims of the same blocks give the same
result however often they are done, and who asks keeps no two of them on one block under way.
"""

from __future__ import annotations

from errno import EIO

from vswap.node.frontends.nbd import wire
from vswap.node.frontends.nbd.wire import Command

_PAYLOAD = {Command.WRITE}


class Malformed(Exception):
    """Not the bytes of a peer that keeps to the protocol (simple replies)."""


class Traffic:
    """One device's requests. ``ended``: the device said good-bye. ``leaving``: the node did."""

    def __init__(self) -> None:
        self._pending: dict[int, tuple[bytes, int]] = {}
        """By cookie: the whole request, and how many bytes follow its reply."""
        self._requests = bytearray()
        self._replies = bytearray()
        self.ended = False
        self.leaving = False

    def __len__(self) -> int:
        return len(self._pending)

    def asked(self, data: bytes) -> bytes:
        """Takes what arrived from the device; returns what to hand on: whole requests."""
        buffer = self._requests
        buffer += data
        at = 0
        size = wire.REQUEST.size
        while len(buffer) - at >= size and not self.ended:
            magic, _, command, cookie, _, length = wire.REQUEST.unpack_from(buffer, at)
            if magic != wire.REQUEST_MAGIC:
                raise Malformed("a request without its magic number")
            end = at + size + (length if command in _PAYLOAD else 0)
            if len(buffer) < end:
                break
            if command == Command.DISC:
                self.ended = True
            else:
                follows = length if command == Command.READ else 0
                self._pending[cookie] = bytes(buffer[at:end]), follows
            at = end
        whole = bytes(buffer[:at])
        del buffer[:at]
        return whole

    def answered(self, data: bytes) -> bytes:
        """Takes what arrived from the node; returns what to hand on: whole replies.

        That it shuts down is no answer: ``leaving`` is set, and the request asked again later.
        """
        buffer = self._replies
        buffer += data
        at = start = 0
        size = wire.SIMPLE_REPLY.size
        parts = []
        while len(buffer) - at >= size:
            magic, error, cookie = wire.SIMPLE_REPLY.unpack_from(buffer, at)
            request = self._pending.get(cookie)
            if magic != wire.SIMPLE_REPLY_MAGIC or request is None:
                raise Malformed("a reply to nothing that was asked")
            end = at + size + (0 if error else request[1])
            if len(buffer) < end:
                break
            if error == wire.ESHUTDOWN:
                self.leaving = True
                parts.append(buffer[start:at])
                start = end
            else:
                del self._pending[cookie]
            at = end
        parts.append(buffer[start:at])
        del buffer[:at]
        return b"".join(parts)

    def again(self) -> bytes:
        """All that is not answered, for a new connection to the node."""
        self._replies.clear()
        self.leaving = False
        return b"".join(request for request, _ in self._pending.values())

    def fail(self) -> bytes:
        """Answers everything with an I/O error."""
        replies = [
            wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, EIO, cookie) for cookie in self._pending
        ]
        self._pending.clear()
        return b"".join(replies)
