"""The one mover: every way in which a stored page changes its place.

Demotion, migration, drain and compaction differ only in which segments are handed in and what
``choose`` answers::

    1  pin the segment; nobody else picks it
    2  read it, verify its hash, view the directory
    3  live = the entries that still point at its records
    4  choose a destination per live record; copy the encoded bytes (recode only where the
       destination's codec asks for it)
    5  append to the destination's log, wait for the backend's acknowledgement
    6  compare-and-set each entry; who was stored again meanwhile is dead on arrival
    7  unpin; the reaper deletes the segment when nothing is live and nobody reads

A failure before 6 changes nothing. At every await each live slot has a readable copy.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import structlog

from vswap.node import entry
from vswap.node.codecs import Codecs
from vswap.node.contents import TURN_RECORDS, ContentsReader
from vswap.node.handles import OPEN, SEALED, Handles
from vswap.node.ledger import Ledger, by_space
from vswap.node.log import MOVED
from vswap.node.pacer import Pacer, Unpaced
from vswap.node.reaper import Reaper
from vswap.node.tier import Tier
from vswap.node.tiers import Tiers
from vswap.tiers.record import U8, U64, Records, meta_page_bytes
from vswap.wire.errors import PageLost, VswapError

CHOOSE_RECORDS = 512
"""Records looked at in one turn: columns only, a fifth of a millisecond."""

_READS = 3
_WRITES = 3

STAY = 0
"""A chooser's answer: the record stays in its segment."""

Chooser = Callable[[Tier, Records], U8]
"""Answers, per live record of a tier, the tag of its destination. The tier's own tag = rewrite."""

logger = structlog.get_logger("vswap.node.evacuator")


@dataclass(slots=True)
class Moved:
    """What an evacuation did; ``error`` is why some of it did not happen."""

    pages: int = 0
    bytes: int = 0
    logical_bytes: int = 0
    segments: int = 0
    stayed: int = 0
    """Records that found no destination."""
    stopped: VswapError | None = None
    """Why it ended early: a destination failed, or the source is away."""
    hindered: VswapError | None = None
    """Why some of the source could not be read. The rest moved."""
    answered: bool = False
    """The source gave something."""
    unreadable: dict[int, VswapError] = field(default_factory=dict)
    """Segments, by serial, nothing of which could be read, and why."""

    @property
    def error(self) -> VswapError | None:
        return self.stopped or self.hindered


@dataclass(slots=True)
class _Piece:
    """Live records of one segment on their way; keeps the segment pinned."""

    handle: int
    records: Records
    words: U64


@dataclass(slots=True)
class _Run:
    """One call of :meth:`Evacuator.evacuate`."""

    source: Tier
    moved: Moved
    staged: defaultdict[int, list[_Piece]] = field(default_factory=lambda: defaultdict(list))
    staged_bytes: Counter[int] = field(default_factory=Counter)
    thorough: bool = False
    writes: set[asyncio.Task[None]] = field(default_factory=set)


class Evacuator:
    """Moves records between tiers. Event loop only; several evacuations may run at once."""

    def __init__(
        self,
        handles: Handles,
        ledger: Ledger,
        tiers: Tiers,
        codecs: Codecs,
        contents: ContentsReader,
        reaper: Reaper,
    ) -> None:
        self._handles = handles
        self._ledger = ledger
        self._tiers = tiers
        self._codecs = codecs
        self._contents = contents
        self._reaper = reaper
        self._busy: set[int] = set()
        self.promised: Counter[int] = Counter()
        """Bytes staged for each tier and not yet charged there: choosers count them as taken."""
        self.promised_to: Counter[tuple[int, int]] = Counter()
        """The same by (space number, tag)."""
        self.counters: Counter[str] = Counter()

    def movable(self, tier: Tier) -> list[int]:
        """Segments of a tier that an evacuation may take now, oldest first."""
        states = (OPEN, SEALED)
        return [
            handle
            for handle in tier.segments
            if handle not in self._busy
            and self._handles.state(handle) in states
            and not self._tiers.is_head(tier.tag, handle)
        ]

    def busy_in(self, tier: Tier) -> bool:
        """Whether an evacuation has segments of the tier in hand."""
        return any(handle in self._busy for handle in tier.segments)

    async def evacuate(
        self,
        tier: Tier,
        segments: Iterable[int],
        choose: Chooser,
        *,
        pacer: Pacer | None = None,
        moved: Moved | None = None,
        until: Callable[[], bool] | None = None,
        thorough: bool = False,
    ) -> Moved:
        """Evacuates segments of one tier, in this order, until all are done or ``until`` is true.

        Never raises for what a backend does: see :attr:`Moved.error`. ``thorough``: every segment
        is tried whatever the source answers, and record by record where it does not come as a
        whole. Pass ``moved`` to watch the progress. Cancelling it is safe at any await.
        """
        pace = pacer or Unpaced()
        run = _Run(tier, moved if moved is not None else Moved(), thorough=thorough)
        run.moved.stopped = None
        queue = [h for h in segments if h not in self._busy]
        try:
            for start in range(0, len(queue), _READS):
                if run.moved.stopped is not None or (until is not None and until()):
                    break
                batch = [
                    handle
                    for handle in queue[start : start + _READS]
                    if handle in tier.segments
                    and handle not in self._busy
                    and self._handles.state(handle) in (OPEN, SEALED)
                ]
                # Pinned before the pacer waits: they must be what they were when they were picked.
                self._busy.update(batch)
                self._handles.pins[batch] += 1
                try:
                    await pace.take(sum(int(self._handles.live_bytes[h]) for h in batch))
                    await asyncio.gather(*(self._segment(run, tier, h, choose) for h in batch))
                finally:
                    self._busy.difference_update(batch)
                    for handle in batch:
                        self._reaper.unpin(handle)
            for tag, pieces in run.staged.items():
                while pieces:
                    await self._launch(run, tag)
            await asyncio.gather(*run.writes)
        finally:
            for task in run.writes:
                task.cancel()
            await asyncio.gather(*run.writes, return_exceptions=True)
            for tag, pieces in run.staged.items():
                self._release(tag, pieces)
        return run.moved

    # ---------------------------------------------------------------- steps 1 to 4

    async def _segment(self, run: _Run, tier: Tier, handle: int, choose: Chooser) -> None:
        if not self._handles.live_records[handle]:
            return
        serial = self._handles.serial(handle)
        try:
            contents = await self._contents.read(tier, handle, thorough=run.thorough)
        except VswapError as error:
            run.moved.unreadable[serial] = run.moved.hindered = error
            if not (run.thorough or isinstance(error, PageLost) or _serves_others(tier)):
                run.moved.stopped = error
            return
        records, loc = contents.records, contents.loc
        words = entry.tier_words(tier.tag, handle, loc)
        if contents.doubtful or contents.missing:
            # It keeps a drain open. What is right of it moves first.
            why = run.moved.hindered = contents.doubtful or PageLost(
                f"{contents.missing} records of segment {tier.segment_name(handle).key} are missing"
            )
            if not self._ledger.live(records, tier.tag, handle, loc).any():
                run.moved.unreadable[serial] = why
                return
        run.moved.answered = True
        for start in range(0, len(records), CHOOSE_RECORDS):
            turn = slice(start, start + CHOOSE_RECORDS)
            await self._turn(run, tier, handle, records.take(turn), words[turn], choose)
            await asyncio.sleep(0)
            if run.moved.stopped is not None:
                return
        run.moved.segments += 1

    async def _turn(
        self, run: _Run, tier: Tier, handle: int, records: Records, words: U64, choose: Chooser
    ) -> None:
        live = self._ledger.live(records, tier.tag, handle, entry.lows(words))
        if not live.all():
            records, words = records.take(live), words[live]
        if not len(records):
            return
        targets = choose(tier, records)
        for tag in np.unique(targets).tolist():
            index = targets == tag
            chosen = records.take(index)
            if tag == STAY:
                run.moved.stayed += len(chosen)
                continue
            target = self._tiers.by_tag(tag)
            if target.ram is not None:
                for start in range(0, len(chosen), TURN_RECORDS):
                    part = slice(start, start + TURN_RECORDS)
                    await self._into_ram(run, target, chosen.take(part), words[index][part])
                    await asyncio.sleep(0)
            else:
                await self._stage(run, tag, _Piece(handle, chosen, words[index]))

    # ---------------------------------------------------------------- steps 5 to 7

    async def _into_ram(self, run: _Run, target: Tier, records: Records, words: U64) -> None:
        try:
            ready = await self._codecs.transcode(records, target.codec)
            placed = self._tiers.ram_log(target).place(ready, MOVED)
        except VswapError as error:
            run.moved.stopped = error
            return
        self._finish(run, target, ready, words, placed.words)
        self._tiers.settle(target, placed)

    async def _stage(self, run: _Run, tag: int, piece: _Piece) -> None:
        self._handles.pins[piece.handle] += 1
        run.staged[tag].append(piece)
        run.staged_bytes[tag] += int(piece.records.cost.sum())
        self._promise(tag, piece.records, 1)
        while run.staged_bytes[tag] >= self._tiers.by_tag(tag).segment_bytes:
            await self._launch(run, tag)

    async def _launch(self, run: _Run, tag: int) -> None:
        """Writes one segment of what is staged, in the background; at most a few at once."""
        while len(run.writes) >= _WRITES:
            await asyncio.wait(run.writes, return_when=asyncio.FIRST_COMPLETED)
        pieces = self._take_segment(run, tag)
        if not pieces:
            return
        cost = sum(int(piece.records.cost.sum()) for piece in pieces)
        run.staged_bytes[tag] -= cost
        task = asyncio.create_task(self._write(run, tag, pieces))
        run.writes.add(task)
        # Not in the task itself: one that is cancelled before its first step runs no finally.
        task.add_done_callback(lambda _: self._release(tag, pieces))
        task.add_done_callback(run.writes.discard)

    def _promise(self, tag: int, records: Records, sign: int) -> None:
        cost = records.cost
        self.promised[tag] += sign * int(cost.sum())
        for number, index in by_space(records.space):
            key = (number, tag)
            self.promised_to[key] += sign * int(cost[index].sum())
            if not self.promised_to[key]:
                del self.promised_to[key]

    def _release(self, tag: int, pieces: list[_Piece]) -> None:
        for piece in pieces:
            self._promise(tag, piece.records, -1)
            self._reaper.unpin(piece.handle)

    def _take_segment(self, run: _Run, tag: int) -> list[_Piece]:
        """Takes what fills one segment off the staged pieces; splits the last one if need be."""
        room = self._tiers.by_tag(tag).segment_bytes
        staged, taken = run.staged[tag], []
        while staged:
            piece = staged[0]
            ends = np.cumsum(piece.records.cost)
            fit = int(np.searchsorted(ends, room, side="right"))
            if fit == len(ends):
                taken.append(staged.pop(0))
                room -= int(ends[-1])
                continue
            if fit:
                head, tail = slice(0, fit), slice(fit, None)
                taken.append(_Piece(piece.handle, piece.records.take(head), piece.words[head]))
                staged[0] = _Piece(piece.handle, piece.records.take(tail), piece.words[tail])
                self._handles.pins[piece.handle] += 1
            break
        return taken

    async def _write(self, run: _Run, tag: int, pieces: list[_Piece]) -> None:
        target = self._tiers.by_tag(tag)
        try:
            parts = [await self._codecs.transcode(p.records, target.codec) for p in pieces]
            log = self._tiers.segment_log(target)
            placed = await log.place(parts, compacting=target is run.source)
            try:
                start = 0
                for part, piece in zip(parts, pieces, strict=True):
                    end = start + len(part)
                    self._finish(run, target, part, piece.words, placed.words[start:end])
                    start = end
                    await asyncio.sleep(0)
            finally:
                self._tiers.settle(target, placed)
        except VswapError as error:
            run.moved.stopped = error

    def _finish(self, run: _Run, target: Tier, records: Records, old: U64, new: U64) -> None:
        moved = self._ledger.flip_where(records, old, new)
        done = records if moved.all() else records.take(moved)
        run.moved.pages += len(done)
        run.moved.bytes += int(done.cost.sum())
        run.moved.logical_bytes += int(meta_page_bytes(done.meta).sum())
        self.counters["evacuated_pages"] += len(done)
        self.counters[f"moved_to_{target.name}_pages"] += len(done)


def _serves_others(tier: Tier) -> bool:
    """Whether a segment that cannot be read now says nothing of the tier's others: too many of its
    servers are away, and enough for others are up."""
    return tier.redundant is not None and tier.redundant.usable
