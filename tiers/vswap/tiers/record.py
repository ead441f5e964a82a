"""Records: encoded pages with what it takes to check them, in columns.

A record is a 16-byte header, the encoded page, and padding to 16 bytes::

    u64 checksum   xxh3(encoded) ^ identity(space, slot, meta) ^ salt(shard, serial)
    u64 meta       sequence << 16 | codec << 12 | padding << 8 | page_shift

so that one ranged read returns all that verifying and decoding needs: a misdirected read fails by
space and slot, a stale one by serial, a flipped header bit by meta. The checksum without its last
term is the record's *portable* sum: moving a record to another segment re-XORs a column and hashes
nothing.

Beside it in the segment's directory lies the record's row: space, slot, and ``loc``, the low half
of the entry that points at it (offset and size in units of 16 bytes).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from vswap.tiers.backend import Buffer

U8: TypeAlias = NDArray[np.uint8]
U32: TypeAlias = NDArray[np.uint32]
U64: TypeAlias = NDArray[np.uint64]
I64: TypeAlias = NDArray[np.int64]
Mask: TypeAlias = NDArray[np.bool_]

UNIT_BYTES = 16
HEADER_BYTES = 16
ROW = np.dtype([("space", "<u4"), ("slot", "<u4"), ("loc", "<u4")])
ROW_BYTES = ROW.itemsize

SIZE_BITS = 13
OFFSET_BITS = 19
MAX_PAYLOAD_BYTES = UNIT_BYTES << OFFSET_BITS
_SIZE_MASK = (1 << SIZE_BITS) - 1

_UNITS = np.int64(-UNIT_BYTES)
_HEADER = bytes(HEADER_BYTES)
_PADDING = [bytes(n) for n in range(UNIT_BYTES)]

_K1 = np.uint64(0x9E3779B97F4A7C15)
_C1 = np.uint64(0xBF58476D1CE4E5B9)
_C2 = np.uint64(0x94D049BB133111EB)
_ALL = (1 << 64) - 1
_S27, _S30, _S31, _S32 = (np.uint64(n) for n in (27, 30, 31, 32))


def mix(x: U64) -> U64:
    """Scrambles 64 bits (the finaliser of splitmix64), element by element, in place."""
    x ^= x >> _S30
    x *= _C1
    x ^= x >> _S27
    x *= _C2
    x ^= x >> _S31
    return x


def identity(space: U32 | int, slot: U32 | U64, meta: U64 | int) -> U64:
    """What ties a checksum to a slot of a space and to one store of it.

    For a given ``meta`` no two slots have the same, and for a slot no two ``meta``: each step can
    be undone. It is on the path of every page that is read or stored, so the steps are few.
    """
    if isinstance(space, int):
        key = slot + np.uint64(space << 32)
    else:
        key = (space.astype(np.uint64) << _S32) | slot
    key *= _K1
    key ^= np.uint64(meta) if isinstance(meta, int) else meta
    key ^= key >> _S32
    key *= _C1
    return key


def salt(shard_key: int, serial: int) -> np.uint64:
    """What ties a checksum to one segment of one shard: :func:`salts` of one, ten times as fast."""
    return np.uint64(_mix(_mix(shard_key ^ serial * int(_K1) & _ALL) + int(_K1) & _ALL))


def _mix(x: int) -> int:
    """:func:`mix` of one number."""
    x = (x ^ x >> 30) * int(_C1) & _ALL
    x = (x ^ x >> 27) * int(_C2) & _ALL
    return x ^ x >> 31


def salts(shard_key: int, serials: U64) -> U64:
    """:func:`salt`, element by element."""
    return mix(mix(np.uint64(shard_key) ^ (serials * _K1)) + _K1)


def make_meta(sequence: U64, codec: U8, padding: NDArray[np.integer], page_shift: U64) -> U64:
    meta: U64 = (sequence << np.uint64(16)) | page_shift
    meta |= codec.astype(np.uint64) << np.uint64(12)
    meta |= padding.astype(np.uint64) << np.uint64(8)
    return meta


def raw_meta(sequence: int, page_shift: int) -> int:
    """:func:`make_meta` of a page that is stored as it is."""
    return sequence << 16 | page_shift


def meta_sequence(meta: U64) -> U64:
    return meta >> np.uint64(16)


def meta_codec(meta: U64) -> U8:
    return ((meta >> np.uint64(12)) & np.uint64(15)).astype(np.uint8)


def meta_padding(meta: U64) -> I64:
    return ((meta >> np.uint64(8)) & np.uint64(15)).astype(np.int64)


def meta_page_bytes(meta: U64) -> I64:
    return np.left_shift(np.int64(1), (meta & np.uint64(31)).astype(np.int64))


def make_loc(offset: I64, size: I64) -> U32:
    """``loc`` of records at byte ``offset`` of their segment, ``size`` bytes long."""
    return ((offset >> 4 << SIZE_BITS) | (size >> 4)).astype(np.uint32)


def make_locs(offset: int, size: int) -> int:
    """:func:`make_loc` of one record."""
    return offset >> 4 << SIZE_BITS | size >> 4


def loc_offset(loc: U32) -> I64:
    """Byte offset in the segment."""
    return (loc >> np.uint32(SIZE_BITS)).astype(np.int64) * UNIT_BYTES


def loc_size(loc: NDArray[np.unsignedinteger]) -> I64:
    """Bytes of the record in the segment, header and padding included. Takes entries as well."""
    return (loc.astype(np.uint64) & np.uint64(_SIZE_MASK)).astype(np.int64) * UNIT_BYTES


@dataclass(slots=True)
class Records:
    """``n`` records in columns. Immutable by convention; ``blob`` may be a view of a segment.

    ``offset`` and ``size`` are bytes, multiples of 16, and locate each record in ``blob``, whose
    first byte is 8-byte aligned. ``sums`` are portable (see above). Headers inside ``blob`` may be
    stale: the columns are what counts.
    """

    blob: U8
    offset: I64
    size: I64
    space: U32
    slot: U32
    meta: U64
    sums: U64

    def __len__(self) -> int:
        return len(self.offset)

    @property
    def cost(self) -> I64:
        """Bytes each record takes in a segment, its directory row included."""
        return self.size + ROW_BYTES

    def take(self, index: Mask | I64 | slice) -> Records:
        """A selection; shares ``blob``."""
        return Records(
            self.blob,
            self.offset[index],
            self.size[index],
            self.space[index],
            self.slot[index],
            self.meta[index],
            self.sums[index],
        )

    def copy(self) -> Records:
        """The same records in a blob of their own, as small as can be."""
        blob = np.empty(int(self.size.sum()), np.uint8)
        return replace(self, blob=blob, offset=self.copy_into(blob))

    def encoded(self) -> list[memoryview]:
        """The encoded pages, as views."""
        view = self.blob.data
        start = self.offset + HEADER_BYTES
        end = self.offset + self.size - meta_padding(self.meta)
        return [view[a:b] for a, b in zip(start.tolist(), end.tolist(), strict=True)]

    def valid(self, encoded: Sequence[Buffer] | None = None) -> Mask:
        """Which records pass their check; pass :meth:`encoded` if at hand. 0.2 us a record."""
        views = self.encoded() if encoded is None else encoded
        hashes = np.fromiter(map(xxh3_64_intdigest, views), np.uint64, len(self))
        good: Mask = (hashes ^ identity(self.space, self.slot, self.meta)) == self.sums
        return good

    def copy_into(self, target: U8) -> I64:
        """Copies the records back to back to ``target``, in order; returns their new offsets.

        Neighbours travel in one piece. Headers are copied as they are; see :func:`write_headers`.
        """
        new = np.cumsum(self.size) - self.size
        if not len(self):
            return new
        if len(self.blob) == len(target) and np.array_equal(new, self.offset):
            target[:] = self.blob
            return new
        breaks = np.flatnonzero(self.offset[1:] != self.offset[:-1] + self.size[:-1]) + 1
        first = np.concatenate(([0], breaks))
        last = np.concatenate((breaks, [len(self)])) - 1
        source, sink = self.blob.data, target.data
        for a, b, c, d in zip(
            self.offset[first].tolist(),
            (self.offset[last] + self.size[last]).tolist(),
            new[first].tolist(),
            (new[last] + self.size[last]).tolist(),
            strict=True,
        ):
            sink[c:d] = source[a:b]
        return new


def write_headers(target: U8, offset: I64, sums: U64, meta: U64, serial_salt: np.uint64) -> None:
    """Writes the headers of records that lie at ``offset`` of ``target`` (8-byte aligned)."""
    words = target[: len(target) & ~7].view(np.uint64)
    index = offset >> 3
    words[index] = sums ^ serial_salt
    words[index + 1] = meta


def read_records(
    blob: U8, offset: I64, size: I64, space: U32, slot: U32, serial_salt: np.uint64 | U64
) -> Records:
    """Records that lie in ``blob``; their headers carry ``serial_salt`` (one, or one each)."""
    words = blob[: len(blob) & ~7].view(np.uint64)
    index = offset >> 3
    return Records(
        blob,
        offset,
        size,
        np.ascontiguousarray(space),
        np.ascontiguousarray(slot),
        words[index + 1],
        words[index] ^ serial_salt,
    )


def pack(
    encoded: Sequence[Buffer],
    codec: U8,
    *,
    space: U32,
    slot: U32,
    sequence: U64,
    page_shift: U64,
) -> Records:
    """Makes records of freshly encoded pages: one copy of the bytes, one hash a page."""
    size, padding = sizes(encoded)
    blob = np.frombuffer(join(encoded, padding), np.uint8)
    meta = make_meta(sequence, codec, padding, page_shift)
    sums = hashes(encoded) ^ identity(space, slot, meta)
    return Records(blob, np.cumsum(size) - size, size, space, slot, meta, sums)


def hashes(encoded: Iterable[Buffer]) -> U64:
    """The xxh3 of encoded pages."""
    return np.array(list(map(xxh3_64_intdigest, encoded)), np.uint64)


def sizes(encoded: Sequence[Buffer]) -> tuple[I64, I64]:
    """Bytes of the records of encoded pages, and of the padding in each."""
    length = np.array(list(map(len, encoded)), np.int64)
    size = (length + (HEADER_BYTES + UNIT_BYTES - 1)) & _UNITS
    return size, size - length - HEADER_BYTES


def join(encoded: Sequence[Buffer], padding: I64) -> bytes:
    """Records back to back, with empty headers."""
    parts: list[Buffer] = [_HEADER] * (3 * len(encoded))
    parts[1::3] = encoded
    parts[2::3] = map(_PADDING.__getitem__, padding.tolist())
    return b"".join(parts)


def concatenate(parts: Sequence[Records]) -> Records:
    """One ``Records`` of several; copies the bytes where there is more than one part."""
    if len(parts) == 1:
        return parts[0]
    blob = np.empty(sum(int(p.size.sum()) for p in parts), np.uint8)
    offsets, base = [], 0
    for part in parts:
        end = base + int(part.size.sum())
        offsets.append(part.copy_into(blob[base:end]) + base)
        base = end
    return Records(
        blob,
        np.concatenate(offsets),
        np.concatenate([p.size for p in parts]),
        np.concatenate([p.space for p in parts]),
        np.concatenate([p.slot for p in parts]),
        np.concatenate([p.meta for p in parts]),
        np.concatenate([p.sums for p in parts]),
    )


def cut(cost: I64, first_room: int, next_room: int) -> list[slice]:
    """Cuts records of ``cost`` bytes into runs: the first within ``first_room``, others within
    ``next_room``. The first run may be empty; every record must fit ``next_room``."""
    ends = np.cumsum(cost)
    runs, start, done, room = [], 0, 0, first_room
    while True:
        end = int(np.searchsorted(ends, done + room, side="right"))
        runs.append(slice(start, end))
        if end == len(cost):
            return runs
        if end == start and runs[1:]:
            raise ValueError(f"a record of {int(cost[end])} bytes does not fit {next_room}")
        start, done, room = end, int(ends[end - 1]) if end else 0, next_room
