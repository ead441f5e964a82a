"""What the protocol makes of a stream of bytes; written against the document, not the server."""

from __future__ import annotations

import errno
import random
import struct
from dataclasses import dataclass

import nbd_client as nbd

HEADER = struct.Struct(">IHHQQI")
MAX_BYTES = 32 << 20
_MAGIC = struct.pack(">I", nbd.REQUEST)
_FLAGS = {
    nbd.READ: nbd.FUA, nbd.WRITE: nbd.FUA, nbd.FLUSH: nbd.FUA, nbd.TRIM: nbd.FUA,
    nbd.CACHE: nbd.FUA, nbd.WRITE_ZEROES: nbd.FUA | nbd.NO_HOLE | nbd.FAST_ZERO,
    nbd.BLOCK_STATUS: nbd.FUA | nbd.REQ_ONE,
}  # fmt: skip


def request(
    command: int, offset: int = 0, length: int = 0, *, flags: int = 0, cookie: int = 7
) -> bytes:
    return HEADER.pack(nbd.REQUEST, flags, command, cookie, offset, length)


@dataclass(frozen=True, slots=True, order=True)
class Told:
    """A request, or its errno."""

    cookie: int
    command: int
    offset: int = 0
    length: int = 0
    flags: int = 0
    data: bytes = b""
    error: int = 0


@dataclass(frozen=True, slots=True)
class Understood:
    """Of a stream to its end, or to a goodbye, or to ``garbage``."""

    requests: list[Told]
    begun: Told | None
    """A write whose data is not all there."""
    garbage: bool


def understand(stream: bytes, size_bytes: int, *, structured: bool) -> Understood:
    """For a client with meta contexts, if its replies are ``structured``."""
    found: list[Told] = []
    at, end = 0, len(stream)
    while end - at >= HEADER.size:
        magic, flags, command, cookie, offset, length = HEADER.unpack_from(stream, at)
        if magic != nbd.REQUEST or command == nbd.DISC:
            return Understood(found, None, magic != nbd.REQUEST)
        at += HEADER.size
        error = _error(command, flags, offset, length, size_bytes, structured)
        data = b""
        if command == nbd.WRITE:
            data = stream[at : at + length]
            at += length
        told = Told(cookie, command, offset, length, flags, data, error)
        if at > end:
            return Understood(found, told, garbage=False)
        found.append(told)
    return Understood(found, None, garbage=end - at >= 4 and stream[at : at + 4] != _MAGIC)


def _error(
    command: int, flags: int, offset: int, length: int, size_bytes: int, structured: bool
) -> int:
    allowed = _FLAGS.get(command)
    if allowed is None:
        return errno.EINVAL
    if command == nbd.READ and structured:
        allowed |= nbd.DF
    if flags & ~allowed or (command == nbd.FLUSH and (offset or length)):
        return errno.EINVAL
    if offset + length > size_bytes:
        return errno.ENOSPC if command in (nbd.WRITE, nbd.WRITE_ZEROES) else errno.EINVAL
    if command in (nbd.READ, nbd.WRITE) and length > MAX_BYTES:
        return errno.EOVERFLOW if flags & nbd.DF else errno.EINVAL
    if command == nbd.BLOCK_STATUS and not (length and structured):
        return errno.EINVAL
    return 0


def pieces(rng: random.Random, stream: bytes, most: int = 4) -> list[bytes]:
    """The stream, cut in so many places at most."""
    cuts = sorted(rng.randrange(len(stream) + 1) for _ in range(rng.randrange(most)))
    return [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
