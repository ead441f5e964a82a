"""The ledger: the one place where entries change, with all the accounting that follows.

Every change of a swap table goes through :meth:`Ledger.flip`, in one turn of the event loop:
entries, live bytes and records per segment, pages and bytes per space and tier. So the books are
right between any two awaits, and a segment nobody points at any more is noticed the moment its last
entry goes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vswap.node import entry
from vswap.node.handles import Handles
from vswap.node.spaces import Space, Spaces
from vswap.tiers.record import I64, ROW_BYTES, SIZE_BITS, U32, U64, Mask, Records
from vswap.tiers.segment import Directory

_TAG_AND_SIZE = np.uint64(15 << 60 | (1 << SIZE_BITS) - 1)


class Ledger:
    """Books over the handles and spaces of a shard. Event loop only."""

    def __init__(self, handles: Handles, spaces: Spaces) -> None:
        self.handles = handles
        self.spaces = spaces
        self.pages_by_tag: I64 = np.zeros(entry.TAGS, np.int64)
        self.bytes_by_tag: I64 = np.zeros(entry.TAGS, np.int64)
        self.logical_by_tag: I64 = np.zeros(entry.TAGS, np.int64)
        self.lost_by_tag: I64 = np.zeros(entry.TAGS, np.int64)
        """Pages that were given up, by the tier that they were in."""
        self.on_dead: Callable[[int], None] = lambda handle: None
        """Called with a handle whose last live record went."""
        self.watchers: list[Callable[[Space, U64, U64, U64], None]] = []
        """Called after every change with (space, slots, what they said, what they say now)."""

    def flip(self, space: Space, slots: U64, words: U64, old: U64) -> None:
        """Sets entries; ``old`` are the entries of these slots now; slots are distinct."""
        space.table.set(slots, words, old)
        left = self._account(space, old, -1)
        self._account(space, words, +1)
        space.peak_bytes = max(space.peak_bytes, space.live_bytes)
        self._tell(space, slots, old, words)
        self._bury(left)

    def put(
        self, space: Space, slots: U64, words: U64, tag: int, places: list[tuple[int, int, int]],
        size: int = 0,
    ) -> None:  # fmt: skip
        """:meth:`flip` to entries that all point into one tier, whatever these slots say now.
        ``places``: (handle, pages, bytes with directory rows) of them. ``size`` of every record,
        if it is the same: half the numpy calls where they replace the like.

        Raises OutOfTiers when shared memory is full; nothing changed then.
        """
        books, n = self.handles, len(slots)
        old = space.table.exchange(slots, words)
        like = np.uint64(tag << 60 | size >> 4)
        if size and np.count_nonzero((old & _TAG_AND_SIZE) == like) == n:
            handles = entry.handles(old)
            np.subtract.at(books.live_bytes, handles, size + ROW_BYTES)
            np.subtract.at(books.live_records, handles, 1)
            left = [handles]
        else:
            left = self._account(space, old, -1)
            cost = sum(amount for _, _, amount in places)
            space.pages_by_tag[tag] += n
            self.pages_by_tag[tag] += n
            self.logical_by_tag[tag] += n * space.page_bytes
            space.bytes_by_tag[tag] += cost
            self.bytes_by_tag[tag] += cost
            space.peak_bytes = max(space.peak_bytes, space.live_bytes)
        for handle, count, amount in places:
            books.live_bytes[handle] += amount
            books.live_records[handle] += count
        self._tell(space, slots, old, words)
        self._bury(left)

    def _tell(self, space: Space, slots: U64, old: U64, words: U64) -> None:
        for watch in self.watchers:
            watch(space, slots, old, words)

    def _bury(self, left: list[I64]) -> None:
        """Tells of segments whose last live record went."""
        for handles in left:
            dead = handles[self.handles.live_records[handles] == 0]
            if len(dead):
                for handle in set(dead.tolist()):
                    self.on_dead(handle)

    def flip_where(self, records: Records, old: U64, words: U64) -> Mask:
        """Compare-and-set: moves each record's slot from ``old`` to ``words`` if it still says
        ``old``; returns who moved. Losers were stored again or freed meanwhile."""
        moved = np.zeros(len(records), np.bool_)
        for number, index in by_space(records.space):
            space = self.spaces.by_number.get(number)
            if space is None:
                continue
            slots = records.slot[index].astype(np.uint64)
            now = space.table.get(slots)
            same = now == old[index]
            moved[index] = same
            self.flip(space, slots[same], words[index][same], now[same])
        return moved

    def live(self, records: Records | Directory, tag: int, handle: int, loc: U32) -> Mask:
        """Which records of a segment are live: the entry of their slot points at them."""
        words = entry.tier_words(tag, handle, loc)
        alive = np.zeros(len(loc), np.bool_)
        for number, index in by_space(records.space):
            space = self.spaces.by_number.get(number)
            if space is None:
                continue
            slots = records.slot[index].astype(np.uint64)
            inside = slots < space.max_slots
            slots[~inside] = 0
            alive[index] = inside & (space.table.get(slots) == words[index])
        return alive

    def recount(self) -> U64:
        """Rebuilds all books from the tables; returns the entries that point at no segment.

        Used at start. 10 million slots take well under a second.
        """
        strays: list[U64] = []
        states = self.handles.states(np.arange(len(self.handles.live_bytes)))
        for space in self.spaces:
            for chunk in space.table.chunks().tolist():
                _, words = space.table.scan(chunk)
                tags = entry.tags(words)
                tiers = words[(tags >= entry.FIRST_TIER) & (tags <= entry.LAST_TIER)]
                known = entry.handles(tiers) < len(states)
                known[known] = np.isin(states[entry.handles(tiers[known])], (1, 3))
                strays.append(tiers[~known])
                if known.all():
                    self._account(space, words, +1)
            space.peak_bytes = space.live_bytes
        return np.concatenate(strays) if strays else np.zeros(0, np.uint64)

    def _account(self, space: Space, words: U64, sign: int) -> list[I64]:
        """Adds (or takes away) what entries stand for; returns the handles they point at."""
        if not len(words):
            return []
        tags = words >> entry.TAG_SHIFT
        tag = int(tags[0])
        if np.count_nonzero(tags == tag) == len(words):
            handles = self._account_tag(space, tag, words, sign)
            return [] if handles is None else [handles]
        parts = [
            self._account_tag(space, tag, words[tags == tag], sign)
            for tag in np.unique(tags).tolist()
        ]
        return [handles for handles in parts if handles is not None]

    def _account_tag(self, space: Space, tag: int, words: U64, sign: int) -> I64 | None:
        """:meth:`_account` for entries of one tag."""
        if tag == entry.FREE:
            return None
        pages = sign * len(words)
        space.pages_by_tag[tag] += pages
        self.pages_by_tag[tag] += pages
        self.logical_by_tag[tag] += pages * space.page_bytes
        if not entry.FIRST_TIER <= tag <= entry.LAST_TIER:
            if tag == entry.POISON:
                lost = words[entry.lows(words) == entry.POISON_LOST]
                np.add.at(self.lost_by_tag, entry.handles(lost), sign)
            return None
        handles = entry.handles(words)
        cost = entry.sizes(words)
        cost += ROW_BYTES
        amount = sign * int(cost.sum())
        space.bytes_by_tag[tag] += amount
        self.bytes_by_tag[tag] += amount
        books = self.handles
        first = int(handles[0])
        if np.count_nonzero(handles == first) == len(handles):
            books.live_bytes[first] += amount
            books.live_records[first] += pages
            return handles[:1]
        np.add.at(books.live_bytes, handles, cost * sign)
        np.add.at(books.live_records, handles, sign)
        return handles


def by_space(spaces: U32) -> list[tuple[int, I64 | slice]]:
    """Groups the rows of a column of space numbers; almost always there is one group."""
    if not len(spaces):
        return []
    first = int(spaces[0])
    if (spaces == first).all():
        return [(first, slice(None))]
    return [(int(n), np.flatnonzero(spaces == n)) for n in np.unique(spaces)]
