"""Fill pages: pages that repeat one 32-bit word. The word is the entry; nothing else is stored."""

from __future__ import annotations

import numpy as np

from vswap.tiers.record import U8, U32, Mask


def find_fills(pages: U8) -> tuple[Mask, U32]:
    """Which pages (n, page_bytes) repeat their first word, and that word.

    Three words are compared first: pages that differ there, which is nearly all others, are not
    read further.
    """
    words = pages.view(np.uint32)
    first = words[:, 0].copy()
    fills = words[:, 1] == first
    if not np.count_nonzero(fills):
        return fills, first
    half = words.shape[1] // 2
    fills &= (words[:, half] == first) & (words[:, -1] == first)
    maybe = np.flatnonzero(fills)
    if len(maybe):
        fills[maybe] = (words[maybe] == first[maybe, None]).all(axis=1)
    return fills, first
