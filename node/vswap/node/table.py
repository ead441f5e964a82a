"""The swap table of one space: a flat sparse array of entries in shared memory.

The kernel's demand paging is the chunk table: a chunk of 8192 slots is allocated when its first
slot is used and punched when its last one is freed. Since reading a hole would allocate it, the
chunk counts are consulted before any index.

The file begins with a page of its own: whose table it is, and how many slots are in use. A table
that was zeroed, exchanged or cut is found by it, and not taken for one with fewer pages.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from vswap.tiers.record import I64, U8, U64
from vswap.tiers.region import Region
from vswap.wire.errors import OutOfTiers, StateInvalid

CHUNK_SLOTS = 8192
_CHUNK_SHIFT = 13
_WORD_BYTES = 8
_CHUNK_BYTES = CHUNK_SLOTS * _WORD_BYTES
MAX_SLOTS = 1 << 32

_MAGIC = b"VSWAPTBL"
_HEAD_BYTES = 4096
_HEAD = np.dtype([("magic", "S8"), ("shard", "V16"), ("name", "S24")])
_USED, _CHANGING = 0, 1
"""Two numbers behind it: the slots in use, and 1 while they do not count exactly that."""


class SwapTable:
    """Entries (8 bytes) and heat (1 byte) per slot. Written by the event loop alone.

    Each entry changes with one aligned store, so that a kill leaves no torn word. ``heat`` is a
    saturating count of loads that the evacuator halves; it is a hint, and dies with the process.
    """

    def __init__(
        self, region: Region, name: str, max_slots: int, shard: UUID, *, create: bool
    ) -> None:
        """Raises StateInvalid where what is there is not this shard's, or not what it was;
        OutOfTiers when shared memory is full."""
        size = -(-max_slots // CHUNK_SLOTS) * CHUNK_SLOTS
        self.max_slots = max_slots
        self._name = name
        make = region.create if create else region.open
        self._words_map = make(f"{name}.table", _HEAD_BYTES + size * _WORD_BYTES)
        try:
            self._words_map.reserve(0, _HEAD_BYTES)
            head = self._words_map.array(_HEAD, 0, 1)
            signed = np.array([(_MAGIC, shard.bytes, name.encode())], _HEAD)
            if create:
                head[:] = signed
            elif head.tobytes() != signed.tobytes():
                raise self._damaged("it does not begin as this table does")
        except (OutOfTiers, StateInvalid):
            self._words_map.close(unlink=create)
            raise
        self._heat_map = region.create(f"{name}.heat", size)
        self._region = region
        self._counts: I64 = self._words_map.array("<i8", _HEAD.itemsize, 2)
        self._words: U64 = self._words_map.array("<u8", _HEAD_BYTES)
        self._heat: U8 = self._heat_map.bytes
        self._used: NDArray[np.int32] = np.zeros(size // CHUNK_SLOTS, np.int32)
        """Per chunk: 0 = not allocated, else slots in use + 1. Zeros cost no memory."""
        if not create:
            self._adopt()

    def _adopt(self) -> None:
        """Takes up what lies in the file, and holds it against what the file says of itself."""
        for chunk, _, _ in self._present():
            # Entries lie here: whatever fails, nothing of it may be punched.
            self._words_map.reserve(_at(chunk), _CHUNK_BYTES)
            self._heat_map.reserve(chunk * CHUNK_SLOTS, CHUNK_SLOTS)
            words = self._words[chunk * CHUNK_SLOTS : (chunk + 1) * CHUNK_SLOTS]
            self._used[chunk] = np.count_nonzero(words) + 1
        found = int(self._used.sum()) - int(np.count_nonzero(self._used))
        if self._counts[_CHANGING]:
            # Killed in the middle of a change, of which any part may have been made.
            self._counts[_USED] = found
            self._counts[_CHANGING] = 0
        elif self._counts[_USED] != found:
            raise self._damaged(f"{found} slots are in use, {self._counts[_USED]} were")

    def _present(self) -> Iterator[tuple[int, int, int]]:
        """What is allocated, chunk by chunk: (chunk, first slot, slot after the last one)."""
        for start, end in self._words_map.extents():
            low = max(start - _HEAD_BYTES, 0) // _WORD_BYTES
            high = max(end - _HEAD_BYTES, 0) // _WORD_BYTES
            for chunk in range(low >> _CHUNK_SHIFT, -(-high // CHUNK_SLOTS)):
                first = chunk * CHUNK_SLOTS
                yield chunk, max(low, first), min(high, first + CHUNK_SLOTS)

    def _damaged(self, why: str) -> StateInvalid:
        path = self._words_map.path
        return StateInvalid(
            f"{path} is damaged: {why}; --fresh starts empty, and loses the pages", path=str(path)
        )

    def grow(self, max_slots: int) -> None:
        """Raises the maximum. The slots in use stay as they are."""
        size = -(-max_slots // CHUNK_SLOTS) * CHUNK_SLOTS
        table, heat = f"{self._name}.table", f"{self._name}.heat"
        words_map = self._region.open(table, _HEAD_BYTES + size * _WORD_BYTES, grow=True)
        heat_map = self._region.open(heat, size, grow=True)
        self._words_map.close()
        self._heat_map.close()
        self._words_map, self._heat_map = words_map, heat_map
        self._counts = words_map.array("<i8", _HEAD.itemsize, 2)
        self._words, self._heat = words_map.array("<u8", _HEAD_BYTES), heat_map.bytes
        more = np.zeros(size // CHUNK_SLOTS - len(self._used), np.int32)
        self._used = np.concatenate((self._used, more))
        self.max_slots = max_slots

    def get(self, slots: U64) -> U64:
        """The entries of slots (n,), all below ``max_slots``."""
        # Signed: unsigned indices are converted first, which takes longer than all the rest.
        index = slots.view(np.int64)
        present = self._used[index >> _CHUNK_SHIFT] > 1
        if np.count_nonzero(present) == len(slots):
            return self._words[index]
        words = np.zeros(len(slots), np.uint64)
        words[present] = self._words[index[present]]
        return words

    def reserve(self, slots: U64) -> None:
        """Allocates the chunks of these slots. Raises OutOfTiers when shared memory is full."""
        chunks = slots >> _CHUNK_SHIFT
        missing = self._used[chunks] == 0
        if not np.count_nonzero(missing):
            return
        fresh = np.unique(chunks[missing]).tolist()
        for i, chunk in enumerate(fresh):
            try:
                self._words_map.reserve(_at(chunk), _CHUNK_BYTES)
                self._heat_map.reserve(chunk * CHUNK_SLOTS, CHUNK_SLOTS)
            except OutOfTiers:
                for reserved in fresh[: i + 1]:
                    self._punch(reserved)
                raise
            self._used[chunk] = 1

    def set(self, slots: U64, words: U64, old: U64) -> None:
        """Writes entries; ``old`` is what :meth:`get` says of them now; slots are distinct.

        Chunks of slots that become non-free were reserved before.
        """
        n = len(slots)
        if np.count_nonzero(words) == n == np.count_nonzero(old):
            self._words[slots.view(np.int64)] = words
            return
        delta = (words != 0).astype(np.int32) - (old != 0)
        present = slots
        if not words.all():
            keep = (words != 0) | (old != 0)
            present, words = slots[keep], words[keep]
        self._counts[_CHANGING] = 1
        self._words[present] = words
        self._counts[_USED] += delta.sum()
        self._counts[_CHANGING] = 0
        if delta.any():
            np.add.at(self._used, slots >> _CHUNK_SHIFT, delta)
            if (delta < 0).any():
                self._punch_empty(slots[delta < 0])

    def exchange(self, slots: U64, words: U64) -> U64:
        """Sets entries that are not free, of distinct slots; returns what they replace.

        Raises OutOfTiers when shared memory is full; nothing changed then.
        """
        index = slots.view(np.int64)
        if np.count_nonzero(self._used[index >> _CHUNK_SHIFT] > 1) == len(slots):
            old = self._words[index]
            if np.count_nonzero(old) == len(slots):
                self._words[index] = words
                return old
        self.reserve(slots)
        old = self.get(slots)
        self.set(slots, words, old)
        return old

    def _punch_empty(self, slots: U64) -> None:
        chunks = slots >> _CHUNK_SHIFT
        for chunk in np.unique(chunks[self._used[chunks] == 1]).tolist():
            self._punch(chunk)

    def _punch(self, chunk: int) -> None:
        """Gives the memory of a chunk back that has no slot in use."""
        self._words_map.punch(_at(chunk), _CHUNK_BYTES)
        self._heat_map.punch(chunk * CHUNK_SLOTS, CHUNK_SLOTS)
        self._used[chunk] = 0

    # ---------------------------------------------------------------- heat

    def warm(self, slots: U64) -> None:
        """Counts a load of slots that hold something."""
        heat = self._heat[slots]
        self._heat[slots] = heat + (heat < 255)

    def heat(self, slots: U64) -> U8:
        """Heat of slots in allocated chunks."""
        return self._heat[slots]

    def cool(self, slots: U64) -> None:
        """Halves the heat of slots in allocated chunks."""
        self._heat[slots] >>= 1

    # ---------------------------------------------------------------- scans

    def chunks(self) -> I64:
        """The allocated chunks, ascending."""
        return np.flatnonzero(self._used)

    def scan(self, chunk: int) -> tuple[U64, U64]:
        """Slots in use of a chunk, and their entries (copies)."""
        if not self._used[chunk]:
            # It was punched since somebody asked for chunks: reading it would allocate it.
            return np.zeros(0, np.uint64), np.zeros(0, np.uint64)
        start = chunk * CHUNK_SLOTS
        words = self._words[start : start + CHUNK_SLOTS]
        used = np.flatnonzero(words).astype(np.uint64)
        return used + np.uint64(start), words[used]

    def counted(self, chunk: int) -> int:
        """Slots in use of an allocated chunk, as the count says that is kept."""
        return int(self._used[chunk]) - 1

    def astray(self) -> I64:
        """Chunks that count as not allocated, and yet hold entries: a restart would find them."""
        found = [
            chunk
            for chunk, first, last in self._present()
            if not self._used[chunk] and self._words[first:last].any()
        ]
        return np.array(found, np.int64)

    @property
    def allocated_bytes(self) -> int:
        return int(np.count_nonzero(self._used)) * CHUNK_SLOTS * (_WORD_BYTES + 1)

    def close(self, *, unlink: bool = False) -> None:
        self._counts = self._counts.copy()
        self._words = np.zeros(0, np.uint64)
        self._heat = np.zeros(0, np.uint8)
        self._words_map.close(unlink=unlink)
        self._heat_map.close(unlink=unlink)


def held(path: Path) -> int:
    """Slots in use in a table that nobody has opened; 1 if it was being changed."""
    with open(path, "rb") as file:
        file.seek(_HEAD.itemsize)
        return int(np.frombuffer(file.read(16).ljust(16, b"\0"), "<i8").max())


def _at(chunk: int) -> int:
    """Where a chunk begins in the file."""
    return _HEAD_BYTES + chunk * _CHUNK_BYTES
