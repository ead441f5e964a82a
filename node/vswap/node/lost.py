"""Pages that no backend has any more: counting them, and giving them up.

Giving up is an operator's word. The entries then say *lost*: loads fail as PageLost at once, a new
store or a free of the slot mends it. No directory can be read that says which slots a lost segment
held, so the tables are searched.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

import numpy as np

from vswap.node import entry
from vswap.node.handles import SEALED, Handles
from vswap.node.ledger import Ledger
from vswap.node.spaces import Space
from vswap.node.tier import Tier
from vswap.tiers.record import I64, U64


async def give_up(tier: Tier, segments: Iterable[int], ledger: Ledger) -> int:
    """Marks every page in these segments of a tier as lost; returns how many pages.

    A chunk of a table (8192 slots) is one turn. The segments die of it. Harmless to repeat.
    """
    poison = entry.poison_word(tier.tag, entry.POISON_LOST)
    lost = 0
    async for space, slots, words in pages_in(tier, segments, ledger):
        ledger.flip(space, slots, np.full(len(slots), poison, np.uint64), words)
        lost += len(slots)
    return lost


async def pages_in(
    tier: Tier, segments: Iterable[int], ledger: Ledger
) -> AsyncIterator[tuple[Space, U64, U64]]:
    """Slots, and their entries, that lie in these segments: per chunk, as of the caller's turn."""
    wanted = np.fromiter(segments, np.int64)
    for space in list(ledger.spaces):
        for chunk in space.table.chunks().tolist():
            if space.deleted:
                break
            slots, words = space.table.scan(chunk)
            mine = np.flatnonzero(entry.tags(words) == tier.tag)
            mine = mine[np.isin(entry.handles(words[mine]), wanted)]
            if len(mine):
                yield space, slots[mine], words[mine]
            await asyncio.sleep(0)


def note_missing(tier: Tier, before: dict[int, int], listed: set[int], handles: Handles) -> None:
    """Notes which segments a listing of the tier lacks. ``before``: the tier's segments (handle ->
    word of the row) as they were before the listing began."""
    tier.missing = {
        handle: word
        for handle, word in before.items()
        if int(handles.rows["word"][handle]) == word and handles.serial(handle) not in listed
    }


def sealed(tier: Tier, handles: Handles) -> dict[int, int]:
    """The tier's sealed segments: handle -> word of the row."""
    own = np.fromiter(tier.segments, np.int64, len(tier.segments))
    own = own[handles.states(own) == SEALED]
    return dict(zip(own.tolist(), handles.rows["word"][own].tolist(), strict=True))


def lost_pages(tier: Tier, handles: Handles, ledger: Ledger) -> int:
    """Pages of a tier whose loads fail for good: given up, or in segments that it does not have.

    Of a redundant tier: of which too few servers have a good part. If bytes are bad in different
    places of several parts, some of these pages can be read still, until a repair tells.
    """
    missing = {h for h, word in tier.missing.items() if int(handles.rows["word"][h]) == word}
    missing.update(_too_few_parts(tier, handles))
    return int(ledger.lost_by_tag[tier.tag]) + int(handles.live_records[list(missing)].sum())


def _too_few_parts(tier: Tier, handles: Handles) -> list[int]:
    """Segments of a redundant tier of which more servers lack their part than are to spare."""
    backend = tier.redundant
    if backend is None:
        return []
    own = np.fromiter(tier.segments, np.int64, len(tier.segments))
    servers = np.uint16((1 << len(backend.members)) - 1)
    lacking: I64 = np.bitwise_count(handles.rows["lacking"][own] & servers).astype(np.int64)
    found: list[int] = own[lacking > len(backend.members) - backend.need].tolist()
    return found
