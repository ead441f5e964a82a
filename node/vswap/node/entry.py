"""The 8-byte entry of a swap table: where a slot's page is.

::

    63..60 tag      0 free, 1 fill, 2..14 tiers, 15 poisoned
    59..32 handle   of the segment (28 bits)
    31..13 offset   of the record in the segment, in units of 16 bytes
    12..0  size     of the record, in units of 16 bytes

The low half is the record's ``loc`` (:mod:`vswap.tiers.record`). A fill entry's low half is the
32-bit word that the page repeats. A poisoned entry stands for a page that is known to be gone or
damaged; its handle field holds the tag of the tier that had it, its low half says why.
"""

from __future__ import annotations

import numpy as np

from vswap.tiers.record import I64, U8, U32, U64, loc_size

FREE = 0
FILL = 1
FIRST_TIER = 2
LAST_TIER = 14
POISON = 15
TAGS = 16

POISON_CORRUPT = 1
POISON_LOST = 2

HANDLE_BITS = 28
MAX_HANDLES = 1 << HANDLE_BITS

ZERO_WORD = np.uint64(FILL << 60)
"""The entry of a page of zeros."""

TAG_SHIFT = np.uint64(60)
_HANDLE_SHIFT = np.uint64(32)
_HANDLE_MASK = np.uint64(MAX_HANDLES - 1)
_LOW_MASK = np.uint64(0xFFFFFFFF)


def tags(words: U64) -> U8:
    return (words >> TAG_SHIFT).astype(np.uint8)


def handles(words: U64) -> I64:
    return ((words >> _HANDLE_SHIFT) & _HANDLE_MASK).astype(np.int64)


def lows(words: U64) -> U32:
    return (words & _LOW_MASK).astype(np.uint32)


def sizes(words: U64) -> I64:
    """Bytes of the record in its segment; meaningful for tier entries only."""
    return loc_size(words)


def fill_words(patterns: U32) -> U64:
    return patterns.astype(np.uint64) | np.uint64(FILL << 60)


def tier_words(tag: int, handle: int, loc: U32) -> U64:
    return loc.astype(np.uint64) | np.uint64((tag << 60) | (handle << 32))


def poison_word(tag: int, reason: int) -> np.uint64:
    return np.uint64((POISON << 60) | (tag << 32) | reason)
