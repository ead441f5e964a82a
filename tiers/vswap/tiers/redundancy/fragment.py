"""Fragments: what one server has of a segment that is coded over several. Format version 1.

A segment of ``whole`` bytes is cut into K stripes of one length (the last ones may be shorter, or
empty), to which come M of parity. Each is stored behind a header of 96 bytes::

    magic, version, index, K, M, size, whole, cluster, shard, serial,
    xxh3 of the stripe, xxh3 of the header so far, zeros

so that a fragment tells by itself whose it is, and whether it is as it was written.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from xxhash import xxh3_64_intdigest

from vswap.tiers.backend import Buffer, SegmentName

MAGIC = b"VSWAPFRG"
VERSION = 1
_UNIT_BYTES = 16
_HEADER = struct.Struct("<8sHBBBxxxIxxxxQ16s16sQQ")
_HASH = struct.Struct("<Q")
HEADER_BYTES = 96
assert _HEADER.size + _HASH.size <= HEADER_BYTES


@dataclass(frozen=True, slots=True)
class Shape:
    """How a segment of ``whole`` bytes is cut into ``k`` stripes."""

    whole: int
    k: int

    @property
    def stripe(self) -> int:
        """Bytes from one cut to the next: a multiple of what records are aligned to."""
        return -(-self.whole // (self.k * _UNIT_BYTES)) * _UNIT_BYTES

    def size(self, index: int) -> int:
        """Bytes of a stripe, or of parity."""
        stripe = self.stripe
        return max(0, min(stripe, self.whole - index * stripe)) if index < self.k else stripe


@dataclass(frozen=True, slots=True)
class Header:
    """A header that is as it was written."""

    index: int
    k: int
    m: int
    size: int
    whole: int
    digest: int


def pack(name: SegmentName, shape: Shape, m: int, index: int, stripe: Buffer) -> bytes:
    """A fragment: header and stripe. One copy, one hash."""
    header = _HEADER.pack(
        MAGIC, VERSION, index, shape.k, m, len(stripe), shape.whole,
        name.cluster.bytes, name.shard.bytes, name.serial, xxh3_64_intdigest(stripe),
    )  # fmt: skip
    header += _HASH.pack(xxh3_64_intdigest(header))
    return b"".join((header.ljust(HEADER_BYTES, b"\0"), stripe))


def read_header(data: Buffer, name: SegmentName) -> Header | None:
    """The header of this segment's fragment; None where it is no such thing."""
    if len(data) < HEADER_BYTES:
        return None
    (checksum,) = _HASH.unpack_from(data, _HEADER.size)
    if checksum != xxh3_64_intdigest(memoryview(data)[: _HEADER.size]):
        return None
    magic, version, index, k, m, size, whole, cluster, shard, serial, digest = _HEADER.unpack_from(
        data
    )
    own = (name.cluster.bytes, name.shard.bytes, name.serial)
    if magic != MAGIC or version != VERSION or (cluster, shard, serial) != own:
        return None
    return Header(index, k, m, size, whole, digest)


def stripe_of(data: Buffer, name: SegmentName, shape: Shape, m: int, index: int) -> Buffer | None:
    """The stripe of a whole fragment, if it is the one that was written."""
    header = read_header(data, name)
    stripe = memoryview(data)[HEADER_BYTES:]
    if header is None or header.digest != xxh3_64_intdigest(stripe):
        return None
    wanted = Header(index, shape.k, m, shape.size(index), shape.whole, header.digest)
    return stripe if header == wanted and len(stripe) == header.size else None
