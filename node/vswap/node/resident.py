"""Reading pages that lie in RAM: in place, here and now.

What a block device does for most of its requests, so it is written for batches of 1 to 64 pages,
where the number of numpy calls is what counts: 25 us and 0.5 us a raw page, checked.
"""

from __future__ import annotations

from typing import cast

import numpy as np
from xxhash import xxh3_64_intdigest

from vswap.node.handles import Handles
from vswap.node.spaces import Space
from vswap.node.tier import Tier
from vswap.tiers.backend import Buffer
from vswap.tiers.codec import ZSTD, decode_many, decode_zstd
from vswap.tiers.record import HEADER_BYTES, SIZE_BITS, U64, identity, meta_codec
from vswap.wire.errors import PageCorrupt

_HANDLE_SHIFT = np.uint64(32)
_HANDLE_MASK = np.uint64((1 << 28) - 1)
_OFFSET_SHIFT = np.uint64(12)
_OFFSET_MASK = np.uint64(((1 << 19) - 1) << 1)
"""Of an entry: the offset, in units of 8 bytes."""
_SIZE_MASK = np.uint64((1 << SIZE_BITS) - 1)
"""Of an entry: the record's size, in units of 16 bytes."""
_RAW_MASK = np.uint64(0xEFFF)
"""Of a record's meta: what is but the page's size if the page is raw and has no padding."""
_CODEC_MASK, _ZSTD = np.uint64(15 << 12), np.uint64(ZSTD << 12)
_FOUR, _EIGHT, _FIFTEEN, _HEADER = (np.uint64(n) for n in (4, 8, 15, HEADER_BYTES))


class Resident:
    """Event loop only."""

    def __init__(self, handles: Handles) -> None:
        self._handles = handles

    def pages(self, tier: Tier, space: Space, slots: U64, words: U64) -> list[Buffer | None]:
        """The pages of slots whose entries point into a RAM tier; None where the check fails.

        Raw pages are views of the tier, good until the caller gives way to the event loop.
        """
        arena = tier.ram
        assert arena is not None
        handles = ((words >> _HANDLE_SHIFT) & _HANDLE_MASK).astype(np.intp)
        index = self._handles.blocks[handles].astype(np.intp)
        index *= arena.block_bytes >> 3
        index += ((words >> _OFFSET_SHIFT) & _OFFSET_MASK).astype(np.intp)
        sums = arena.words[index] ^ self._handles.salts[handles]
        index += 1
        meta = arena.words[index]
        index += 1
        starts = (index << 3).tolist()
        memory = arena.memory.data
        raw = np.count_nonzero((meta & _RAW_MASK) == space.page_shift) == len(slots)
        views: list[Buffer]
        if raw:
            length = space.page_bytes
            views = [memory[start : start + length] for start in starts]
        else:
            lengths = (words & _SIZE_MASK) << _FOUR
            lengths -= (meta >> _EIGHT) & _FIFTEEN
            lengths -= _HEADER
            views = [memory[a : a + n] for a, n in zip(starts, lengths.tolist(), strict=True)]
        hashes = np.fromiter(map(xxh3_64_intdigest, views), np.uint64, len(views))
        good = (hashes ^ sums) == identity(space.number, slots, meta)
        if np.count_nonzero(good) != len(slots):
            # The way through the queue tells what is wrong with them.
            return [None] * len(slots)
        if raw:
            return cast(list[Buffer | None], views)
        try:
            if np.count_nonzero(meta & _CODEC_MASK == _ZSTD) == len(slots):
                pages = decode_zstd(views, space.page_bytes)
            else:
                pages = decode_many(meta_codec(meta).tolist(), views, space.page_bytes)
            return cast(list[Buffer | None], pages)
        except PageCorrupt:
            return [None] * len(slots)
