"""Sealed segments: records back to back, their directory, a trailer. Format version 2.

::

    payload     records (see :mod:`vswap.tiers.record`)
    directory   one row per record: u32 space, u32 slot, u32 loc
    trailer     magic, version, record count, cluster, shard, serial, payload bytes, and xxh3 over
                everything before it

A segment can be parsed alone, in one read, and is immutable. Where its backend cuts it into stripes
of one length, no record lies across a cut: zeros fill the end of a stripe, and come before the
directory, and count as payload.
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
    MAX_PAYLOAD_BYTES,
    ROW,
    ROW_BYTES,
    U8,
    U32,
    UNIT_BYTES,
    Records,
    cut,
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


def segment_size(parts: Sequence[Records], stripes: int = 1) -> int:
    """Bytes of the segment that :func:`build` makes of these records."""
    if stripes > 1:
        return stripes * _cuts(parts, stripes)[0]
    return sum(int(part.cost.sum()) for part in parts) + TRAILER_BYTES


def _cuts(parts: Sequence[Records], stripes: int) -> tuple[int, list[slice]]:
    """The least length of a stripe, nearly, and which records each of them takes."""
    sizes = np.concatenate([part.size for part in parts])
    tail = ROW_BYTES * len(sizes) + TRAILER_BYTES
    largest = int(sizes.max(initial=0))
    stripe = max(-(-(int(sizes.sum()) + tail) // stripes), largest)
    # What is free at the end of a stripe is less than a record.
    step = max(largest // 8, UNIT_BYTES)
    while True:
        stripe = -(-stripe // UNIT_BYTES) * UNIT_BYTES
        runs = cut(sizes, stripe, stripe)
        end = (len(runs) - 1) * stripe + int(sizes[runs[-1]].sum())
        if end + tail <= stripes * stripe:
            return stripe, runs
        stripe += step


def _striped(parts: Sequence[Records], runs: Sequence[slice]) -> list[list[Records]]:
    """The parts, parted again by stripe."""
    found: list[list[Records]] = []
    for run in runs:
        start, some = 0, []
        for part in parts:
            end = start + len(part)
            if max(run.start, start) < min(run.stop, end):
                some.append(part.take(slice(max(run.start - start, 0), run.stop - start)))
            start = end
        found.append(some)
    return found


@dataclass(frozen=True, slots=True)
class Built:
    """A sealed segment ready for its backend, and where its records lie in it."""

    data: U8
    loc: U32
    payload_bytes: int


def build(parts: Sequence[Records], name: SegmentName, stripes: int = 1) -> Built:
    """Seals records into one segment, in order: one copy of the bytes, one hash over the whole.

    With ``stripes`` its length is a multiple of them, and no record lies across a cut.
    """
    count = sum(map(len, parts))
    payload = sum(int(part.size.sum()) for part in parts)
    columns, stripe = [list(parts)], payload
    if stripes > 1:
        stripe, runs = _cuts(parts, stripes)
        columns = _striped(parts, runs)
        payload = stripes * stripe - ROW_BYTES * count - TRAILER_BYTES
    if payload > MAX_PAYLOAD_BYTES:
        raise ValueError(f"payload of {payload} bytes exceeds {MAX_PAYLOAD_BYTES}")
    end = payload + ROW_BYTES * count
    data = (np.empty if stripes == 1 else np.zeros)(end + TRAILER_BYTES, np.uint8)
    own = salt(shard_key(name.shard), name.serial)
    rows = data[payload:end].view(ROW)
    row = 0
    for i, column in enumerate(columns):
        start = i * stripe
        for part in column:
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
class Directory:
    """Which slots a segment's records are of, and where they lie; columns (n,)."""

    space: U32
    slot: U32
    loc: U32

    @classmethod
    def of(cls, rows: np.ndarray) -> Directory:
        return cls(rows["space"].copy(), rows["slot"].copy(), rows["loc"].copy())


def parse_directory(data: Buffer, name: SegmentName, payload: int) -> Directory:
    """Reads what follows a segment's payload. Raises PageCorrupt where it makes no sense.

    The hash, which is over the payload as well, is not verified.
    """
    return Directory.of(_rows(np.frombuffer(data, np.uint8), name, payload)[0])


def parse(data: Buffer, name: SegmentName) -> tuple[Records, U32]:
    """A whole segment's records, and their locs. Raises PageCorrupt where its hash is not right:
    then nothing that it says of itself is to be believed, and each record is to be checked."""
    array = np.frombuffer(data, np.uint8)
    rows, payload = _rows(array, name)
    [digest] = _HASH.unpack_from(data, len(data) - _HASH.size)
    if xxh3_64_intdigest(array[: -_HASH.size].data) != digest:
        raise PageCorrupt(f"segment {name.key} fails its check")
    loc = rows["loc"].copy()
    records = read_records(
        array[:payload], loc_offset(loc), loc_size(loc), rows["space"], rows["slot"],
        salt(shard_key(name.shard), name.serial),
    )  # fmt: skip
    return records, loc


def _rows(array: U8, name: SegmentName, start: int = 0) -> tuple[np.ndarray, int]:
    """The directory of a segment of which the bytes from ``start`` on are given, and the length of
    the payload, after a look at the trailer."""
    if len(array) < TRAILER_BYTES:
        raise PageCorrupt(f"segment {name.key} has only {len(array)} bytes")
    end = len(array) - TRAILER_BYTES
    magic, version, _, count, cluster, shard, serial, payload, _ = _TRAILER.unpack_from(
        array.data, end
    )
    if magic != MAGIC or version != VERSION:
        raise PageCorrupt(f"segment {name.key} has no trailer of version {VERSION}")
    if (cluster, shard, serial) != (name.cluster.bytes, name.shard.bytes, name.serial):
        raise PageCorrupt(f"segment {name.key} calls itself by another name")
    if payload < start or payload + count * ROW_BYTES != start + end:
        raise PageCorrupt(f"segment {name.key}: lengths do not add up")
    return array[payload - start : end].view(ROW), payload
