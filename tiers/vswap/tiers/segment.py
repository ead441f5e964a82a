"""Sealed segments: records back to back, their directory, a trailer. Format version 1.

::

    payload     records (see :mod:`vswap.tiers.record`)
    directory   one row per record: u32 space, u32 slot, u32 loc
    trailer     magic, version, record count, cluster, shard, serial, payload bytes, and xxh3 over
                everything before it

A segment can be parsed alone, in one read, and is immutable.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

import numpy as np
from xxhash import xxh3_64_intdigest

from vswap.tiers.backend import Buffer, SegmentName
from vswap.tiers.record import (
    HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    ROW,
    ROW_BYTES,
    U8,
    U32,
    Records,
    loc_offset,
    loc_size,
    make_loc,
    read_records,
    salt,
    write_headers,
)
from vswap.wire.errors import PageCorrupt

MAGIC = b"VSWAPSEG"
VERSION = 2
_TRAILER = struct.Struct("<8sHHI16s16sQII")
_HASH = struct.Struct("<Q")
TRAILER_BYTES = _TRAILER.size + _HASH.size


def shard_key(shard: UUID) -> int:
    """64 bits of the shard's identity that salt every checksum of its records."""
    return shard.int & (1 << 64) - 1


def segment_size(parts: Sequence[Records]) -> int:
    """Bytes of the segment that :func:`build` makes of these records."""
    return sum(int(part.cost.sum()) for part in parts) + TRAILER_BYTES


@dataclass(frozen=True, slots=True)
class Built:
    """A sealed segment ready for its backend, and where its records lie in it."""

    data: U8
    loc: U32
    payload_bytes: int


def build(parts: Sequence[Records], name: SegmentName) -> Built:
    """Seals records into one segment, in order: one copy of the bytes, one hash over the whole."""
    payload = sum(int(part.size.sum()) for part in parts)
    if payload > MAX_PAYLOAD_BYTES:
        raise ValueError(f"payload of {payload} bytes exceeds {MAX_PAYLOAD_BYTES}")
    count = sum(map(len, parts))
    end = payload + ROW_BYTES * count
    data = np.empty(end + TRAILER_BYTES, np.uint8)
    own = salt(shard_key(name.shard), name.serial)
    rows = data[payload:end].view(ROW)
    start = row = 0
    for part in parts:
        stop = start + int(part.size.sum())
        offset = part.copy_into(data[start:stop]) + start
        write_headers(data, offset, part.sums, part.meta, own)
        own_rows = rows[row : row + len(part)]
        own_rows["space"], own_rows["slot"] = part.space, part.slot
        own_rows["loc"] = make_loc(offset, part.size)
        start, row = stop, row + len(part)
    trailer = _TRAILER.pack(
        MAGIC, VERSION, 0, count, name.cluster.bytes, name.shard.bytes, name.serial, payload, 0
    )
    data[end : end + _TRAILER.size] = np.frombuffer(trailer, np.uint8)
    digest = xxh3_64_intdigest(data[: -_HASH.size].data)
    data[-_HASH.size :] = np.frombuffer(_HASH.pack(digest), np.uint8)
    return Built(data, rows["loc"].copy(), payload)


@dataclass(frozen=True, slots=True)
class Parsed:
    """A segment read back. ``whole`` tells that its hash is right; if not, check each record."""

    records: Records
    loc: U32
    whole: bool


def parse(data: Buffer, name: SegmentName) -> Parsed:
    """Reads a whole segment. Raises PageCorrupt where trailer or directory make no sense.

    A wrong hash alone does not raise: the caller then verifies record by record, since one flipped
    bit must not cost the neighbours.
    """
    array = np.frombuffer(data, np.uint8)
    if len(array) < TRAILER_BYTES:
        raise PageCorrupt(f"segment {name.key} has only {len(array)} bytes")
    end = len(array) - TRAILER_BYTES
    magic, version, _, count, cluster, shard, serial, payload, _ = _TRAILER.unpack_from(data, end)
    if magic != MAGIC or version != VERSION:
        raise PageCorrupt(f"segment {name.key} has no trailer of version {VERSION}")
    if (cluster, shard, serial) != (name.cluster.bytes, name.shard.bytes, name.serial):
        raise PageCorrupt(f"segment {name.key} calls itself by another name")
    if payload + count * ROW_BYTES != end:
        raise PageCorrupt(f"segment {name.key}: lengths do not add up")
    rows = array[payload:end].view(ROW)
    whole = (
        xxh3_64_intdigest(array[: -_HASH.size].data)
        == _HASH.unpack_from(data, end + _TRAILER.size)[0]
    )
    loc = rows["loc"].copy()
    offset, size = loc_offset(loc), loc_size(loc)
    if not whole and count:
        # A damaged directory row must not lead outside the payload.
        sane = (size >= HEADER_BYTES) & (offset + size <= payload)
        rows, loc, offset, size = rows[sane], loc[sane], offset[sane], size[sane]
    records = read_records(
        array[:payload], offset, size, rows["space"], rows["slot"],
        salt(shard_key(name.shard), name.serial),
    )  # fmt: skip
    return Parsed(records, loc, whole)
