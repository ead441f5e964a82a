"""RAM: a backend whose segments are blocks of shared memory, written in place.

Other backends take a segment whole; here a block is filled while it is being read, so that a store
is acknowledged without a copy elsewhere. Whoever holds the name of a block may view it; what keeps
it from being reused is the caller's pin. ``put`` and ``get`` fulfil the common contract.

A block grows from both ends: payload from the front, directory rows from the back, newest lowest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Sequence

import numpy as np

from vswap.tiers.backend import Backend, Buffer, Listed, Read, SegmentName, Usage
from vswap.tiers.record import (
    HEADER_BYTES,
    I64,
    MAX_PAYLOAD_BYTES,
    ROW,
    ROW_BYTES,
    SIZE_BITS,
    U8,
    U64,
    Records,
    loc_offset,
    loc_size,
    make_loc,
    make_locs,
    read_records,
    salt,
    write_headers,
)
from vswap.tiers.region import Mapping
from vswap.tiers.segment import Directory, shard_key
from vswap.wire.errors import BackendRefused, OutOfTiers, PageLost, SegmentExists, VswapError

MIN_BLOCK_BYTES = 256 * 1024
MAX_BLOCK_BYTES = 2 * 2**20
MIN_BLOCKS = 4
_INDEX: U64 = np.arange(MAX_BLOCK_BYTES // 4096, dtype=np.uint64)


def block_size(capacity_bytes: int) -> int:
    """Bytes of a block in an arena of this capacity: a 32nd, a power of two, 256 KiB to 2 MiB."""
    wanted = 1 << max(capacity_bytes // 32, 1).bit_length() - 1
    return min(max(wanted, MIN_BLOCK_BYTES), MAX_BLOCK_BYTES)


class RamBackend(Backend):
    """An arena of equal blocks in one mapping. Not thread-safe, except for reads of live blocks."""

    def __init__(self, mapping: Mapping, capacity_bytes: int) -> None:
        self.block_bytes = block_size(capacity_bytes)
        self.blocks = capacity_bytes // self.block_bytes
        self.segment_bytes = self.block_bytes
        if self.blocks < MIN_BLOCKS:
            raise BackendRefused(
                f"a RAM tier needs at least {MIN_BLOCKS * MIN_BLOCK_BYTES} bytes, "
                f"not {capacity_bytes}"
            )
        self._mapping = mapping
        mapping.advise_huge()
        self.memory: U8 = mapping.bytes
        self.words: U64 = self.memory[: len(self.memory) & ~7].view(np.uint64)
        self._block: dict[SegmentName, int] = {}
        self._length: dict[SegmentName, int] = {}
        self._free = list(range(self.blocks - 1, -1, -1))
        self._warm: deque[int] = deque()
        """Free blocks that have memory still, the last one used last."""
        self._least_warm = 0
        """The fewest there were since the last :meth:`cool`."""

    # -------------------------------------------------------------- blocks, written in place

    @property
    def free_blocks(self) -> int:
        return len(self._free) + len(self._warm)

    def owners(self) -> dict[SegmentName, int]:
        """The block of every segment; a copy."""
        return dict(self._block)

    def unowned(self) -> list[int]:
        """The free blocks; a copy."""
        return [*self._free, *self._warm]

    def allocate(self, name: SegmentName) -> int:
        """A block for a new segment. Raises OutOfTiers: no block, or shared memory is full."""
        if name in self._block:
            raise SegmentExists(f"segment {name.key} exists", name=name.key)
        if self._warm:
            block = self._warm.pop()
            self._least_warm = min(self._least_warm, len(self._warm))
        elif self._free:
            block = self._free[-1]
            self._mapping.reserve(block * self.block_bytes, self.block_bytes)
            self._free.pop()
        else:
            raise OutOfTiers("no free block in the RAM tier", need=self.block_bytes)
        self._block[name] = block
        self._length[name] = self.block_bytes
        return block

    def adopt(self, name: SegmentName, block: int) -> None:
        """Takes up a segment that an earlier life of the process left in ``block``."""
        self._free.remove(block)
        self._block[name] = block
        self._length[name] = self.block_bytes

    def release(self, name: SegmentName) -> None:
        """Frees the segment's block; unknown names are ignored."""
        block = self._block.pop(name, None)
        if block is None:
            return
        del self._length[name]
        self._warm.append(block)

    def cool(self, most: int) -> bool:
        """Gives memory of free blocks back that was not needed since the last round, of at most so
        many blocks; True = there is more in this round. Call it every few seconds.

        A page of a fresh block costs 3 us more to write: the kernel clears it, and maps it.
        """
        unused = min(self._least_warm, most)
        self._punch_warm(unused)
        self._least_warm -= unused
        if self._least_warm:
            return True
        self._least_warm = len(self._warm)
        return False

    def shrink(self) -> int:
        """Gives the memory of all free blocks back; returns how many had some."""
        warm = len(self._warm)
        self._punch_warm(warm)
        self._least_warm = 0
        return warm

    def _punch_warm(self, count: int) -> None:
        for _ in range(count):
            block = self._warm.popleft()
            self._mapping.punch(block * self.block_bytes, self.block_bytes)
            self._free.append(block)

    def view(self, block: int) -> U8:
        start = block * self.block_bytes
        return self.memory[start : start + self.block_bytes]

    # -------------------------------------------------------------- the common contract

    async def open(self) -> None:
        return

    async def close(self) -> None:
        self.memory = np.empty(0, np.uint8)
        self.words = np.empty(0, np.uint64)
        self._mapping.close()

    async def put(self, name: SegmentName, data: Buffer) -> None:
        if len(data) > self.block_bytes:
            raise OutOfTiers(f"segment of {len(data)} bytes exceeds a block", need=len(data))
        block = self.allocate(name)
        self.view(block)[: len(data)] = np.frombuffer(data, np.uint8)
        self._length[name] = len(data)

    async def get(self, reads: Sequence[Read]) -> list[Buffer | VswapError]:
        return [self._get(read) for read in reads]

    def _get(self, read: Read) -> Buffer | VswapError:
        block = self._block.get(read.name)
        if block is None or read.offset + read.length > self._length[read.name]:
            return PageLost(f"segment {read.name.key} is missing or too short")
        return self.view(block)[read.offset : read.offset + read.length].tobytes()

    async def delete(self, names: Sequence[SegmentName]) -> None:
        for name in names:
            self.release(name)

    async def list(self, prefix: str) -> AsyncIterator[Listed]:
        for name, length in list(self._length.items()):
            if name.key.startswith(prefix):
                yield Listed(name.key, length)

    async def usage(self) -> Usage:
        used = (self.blocks - len(self._free)) * self.block_bytes
        return Usage(used, self.blocks * self.block_bytes)


def append(block: U8, records: Records, *, payload: int, count: int, own: np.uint64) -> np.ndarray:
    """Appends records to a block that holds ``payload`` bytes and ``count`` rows; returns locs.

    The caller has made sure of the room: ``records.cost.sum()`` bytes between the two ends. The
    rows count only once the caller has published the new count.
    """
    size = int(records.size.sum())
    offset = records.copy_into(block[payload : payload + size]) + payload
    write_headers(block, offset, records.sums, records.meta, own)
    loc = make_loc(offset, records.size)
    end = len(block) - ROW_BYTES * count
    rows = block[end - ROW_BYTES * len(records) : end].view(ROW)[::-1]
    rows["space"], rows["slot"], rows["loc"] = records.space, records.slot, loc
    return loc


def append_raw(
    block: U8, pages: U8 | None, *, space: int, slots: U64, sums: U64, meta: int, size: int,
    payload: int, count: int, own: np.uint64,
) -> U64:  # fmt: skip
    """:func:`append` for pages (n, page_bytes) as they are: one copy of the bytes, or none where
    they lie there already (None; see :func:`places_raw`).

    ``size`` is that of a record; ``sums`` (n,) are portable; ``meta`` is the same for all.
    """
    n = len(slots)
    records = places_raw(block, size, payload, n)
    if pages is not None:
        records[:, HEADER_BYTES:] = pages
    headers = records.view(np.uint64)
    headers[:, 0] = sums ^ own
    headers[:, 1] = meta
    loc = _INDEX[:n] * np.uint64(make_locs(size, 0))
    loc += np.uint64(make_locs(payload, size))
    end = len(block) - ROW_BYTES * count
    rows = block[end - ROW_BYTES * n : end].view(ROW)[::-1]
    rows["space"], rows["slot"], rows["loc"] = space, slots, loc
    return loc


def append_encoded(
    block: U8, data: bytes, size: I64, *, space: int, slots: U64, sums: U64, meta: U64,
    payload: int, count: int, own: np.uint64,
) -> U64:  # fmt: skip
    """:func:`append` for freshly encoded pages of one space: ``data`` are their records, of
    ``size`` (n,) bytes, back to back, with empty headers; ``sums`` (n,) are portable."""
    offset = np.cumsum(size)
    offset -= size
    offset += payload
    block.data[payload : payload + len(data)] = data
    words = block.view(np.uint64)
    index = offset >> 3
    words[index] = sums ^ own
    index += 1
    words[index] = meta
    loc = ((offset << (SIZE_BITS - 4)) | (size >> 4)).view(np.uint64)
    end = len(block) - ROW_BYTES * count
    rows = block[end - ROW_BYTES * len(size) : end].view(ROW)[::-1]
    rows["space"], rows["slot"], rows["loc"] = space, slots, loc
    return loc


def places_raw(block: U8, size: int, payload: int, n: int) -> U8:
    """Where the next ``n`` records of ``size`` bytes will lie: (n, size), headers included."""
    return block[payload : payload + n * size].reshape(n, size)


def read_directory(block: U8, count: int) -> Directory:
    """The first ``count`` rows of a block, oldest first; copies."""
    return Directory.of(block[len(block) - ROW_BYTES * count :].view(ROW)[::-1])


def read_block(block: U8, count: int, name: SegmentName) -> tuple[Records, np.ndarray]:
    """The first ``count`` records of a block, oldest first, as views, and their locs. Rows that
    point out of it are left out."""
    rows = block[len(block) - ROW_BYTES * count :].view(ROW)[::-1]
    loc = rows["loc"].copy()
    offset, size = loc_offset(loc), loc_size(loc)
    sane = (size >= HEADER_BYTES) & (offset + size <= len(block))
    if np.count_nonzero(sane) < count:
        rows, loc, offset, size = rows[sane], loc[sane], offset[sane], size[sane]
    own = salt(shard_key(name.shard), name.serial)
    return read_records(block, offset, size, rows["space"], rows["slot"], own), loc


assert MAX_BLOCK_BYTES <= MAX_PAYLOAD_BYTES
