"""Upkeep of redundant tiers: which segments lack what, and how a server comes back.

A segment is degraded if some server has no part of it that is good. Its row says so (``lacking``,
one bit per server), from before the write is acknowledged until the segment is gone: so the note
outlives the daemon. Repair is to evacuate degraded segments into their own tier.

A server that is down serves nobody until its *audit*: the shard lists its own prefix there, deletes
what is in no row (deletes that the server missed), and notes every segment whose part is missing or
of another length (writes that it missed; all of them, where it lost its memory or is another server
in the place of one). Writes that are under way when it begins are waited for: of these, too, the
server may have acknowledged its part, and lost it since. The same is done for each server when the
shard opens, and for one of which a reader found a part missing that should be there, or that was
started again unseen.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import structlog

from vswap.node.handles import SEALED, STATE_BITS, WRITING, Handles
from vswap.node.tier import Tier
from vswap.tiers.backend import SegmentName, prefix
from vswap.tiers.record import I64, U64, Mask
from vswap.tiers.redundancy.base import Redundant
from vswap.wire.errors import VswapError

_BACKOFF_FIRST_S = 0.25
_BACKOFF_MOST_S = 10.0
_STEADY_S = 30.0
"""Up for so long, a server is no longer one that keeps failing."""
_PULSE_S = 1.0
_WRITES_S = 0.02
_NEWEST = 64
_BATCH = 256

logger = structlog.get_logger("vswap.node.upkeep")


@dataclass(slots=True)
class _Care:
    """One server of one tier. ``due_at``: when it is looked at again, if it is down."""

    failures: int = 0
    due_at: float = 0.0
    up_at: float = 0.0
    suspect: bool = True
    """Its parts were not held against the rows since something about them was odd."""
    life: str = ""
    pulse_at: float = 0.0
    task: asyncio.Task[None] | None = None


class Upkeep:
    """Event loop only. :meth:`watch` is called now and then; it never waits."""

    def __init__(self, handles: Handles, *, clock: Callable[[], float], rng: random.Random) -> None:
        self._handles = handles
        self._clock = clock
        self._rng = rng
        self._cares: dict[tuple[Redundant, int], _Care] = {}

    # ---------------------------------------------------------------- what is degraded

    def adopt(self, tier: Tier) -> None:
        """Hears from now on what the tier's backend tells of damage."""
        backend = tier.redundant
        if backend is not None:
            backend.on_damage = partial(self._note, tier, backend)

    def _note(self, tier: Tier, backend: Redundant, name: SegmentName, places: int) -> None:
        handle = self._find(tier, name)
        if handle is None:
            return
        new = places & ~int(self._handles.rows["lacking"][handle])
        self._handles.rows["lacking"][handle] |= places
        if self._handles.state(handle) != SEALED:
            return
        for place, member in enumerate(backend.members):
            if new >> place & 1 and member.up:
                self._care(backend, place).suspect = True

    def _find(self, tier: Tier, name: SegmentName) -> int | None:
        if name != SegmentName(tier.segment_name(0).cluster, self._handles.shard, name.serial):
            return None
        for handle in islice(reversed(tier.segments), _NEWEST):
            if self._handles.serial(handle) == name.serial:
                return handle
        return self._handles.find(name.serial)

    def degraded(self, tier: Tier) -> I64:
        """Handles of the tier's degraded segments."""
        return self._lacking_more_than(tier, 0)

    def repairable(self, tier: Tier) -> I64:
        """Those that would lack less if they were written again now."""
        backend = tier.redundant
        return self._lacking_more_than(tier, backend.down.bit_count() if backend else 0)

    def only_on(self, tier: Tier, place: int) -> int:
        """Live segments that could not be read any more if that server's parts were gone."""
        backend, handles = tier.redundant, self.degraded(tier)
        if backend is None:
            return 0
        without = self._handles.rows["lacking"][handles] | np.uint16(1 << place)
        gone = np.bitwise_count(without) > len(backend.members) - backend.need
        return int(np.count_nonzero(gone & (self._handles.live_records[handles] > 0)))

    def _lacking_more_than(self, tier: Tier, count: int) -> I64:
        if tier.redundant is None:
            return np.zeros(0, np.int64)
        handles = np.fromiter(tier.segments, np.int64, len(tier.segments))
        lacking: Mask = np.bitwise_count(self._handles.rows["lacking"][handles]) > count
        lacking &= self._handles.states(handles) == SEALED
        return handles[lacking]

    # ---------------------------------------------------------------- servers

    def watch(self, tier: Tier) -> None:
        """Looks after servers that are down and due, or suspect."""
        backend = tier.redundant
        if backend is None or not tier.opened:
            return
        now = self._clock()
        for place, member in enumerate(backend.members):
            care = self._care(backend, place)
            if care.task is not None:
                continue
            if member.up:
                work = self._look_again if care.suspect else None
                if work is None and now >= care.pulse_at:
                    work = self._feel_pulse
            else:
                if care.up_at:
                    self._fell(tier, backend, place, care)
                work = self._bring_back if now >= care.due_at else None
            if work is not None:
                care.task = asyncio.create_task(work(tier, backend, place, care))
                care.task.add_done_callback(partial(self._done, care))

    def suspect(self, tier: Tier) -> None:
        """Has every server of the tier audited again."""
        backend = tier.redundant
        if backend is not None:
            for place in range(len(backend.members)):
                self._care(backend, place).suspect = True

    def replaced(self, backend: Redundant, place: int) -> None:
        """Another server is in that place."""
        care = self._cares.pop((backend, place), None)
        if care is not None and care.task is not None:
            care.task.cancel()

    def forget(self, tier: Tier) -> None:
        """The tier is gone."""
        backend = tier.redundant
        if backend is not None:
            for place in range(len(backend.members)):
                self.replaced(backend, place)

    async def close(self) -> None:
        tasks = [care.task for care in self._cares.values() if care.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _care(self, backend: Redundant, place: int) -> _Care:
        return self._cares.setdefault((backend, place), _Care())

    def _done(self, care: _Care, task: asyncio.Task[None]) -> None:
        care.task = None
        if not task.cancelled() and task.exception() is not None:
            logger.error("upkeep failed unexpectedly", exc_info=task.exception())

    def _fell(self, tier: Tier, backend: Redundant, place: int, care: _Care) -> None:
        """A server that goes down soon after it came back waits longer each time."""
        member = backend.members[place]
        logger.warning("server is down", tier=tier.name, server=member.label, error=member.error)
        steady = self._clock() - care.up_at > _STEADY_S
        care.failures = 0 if steady else care.failures
        care.up_at, care.suspect = 0.0, True
        self._put_off(care)

    def _put_off(self, care: _Care) -> None:
        wait = min(_BACKOFF_FIRST_S * 2 ** min(care.failures, 10), _BACKOFF_MOST_S)
        care.failures += 1
        care.due_at = self._clock() + wait * self._rng.uniform(0.5, 1.0)

    async def _bring_back(self, tier: Tier, backend: Redundant, place: int, care: _Care) -> None:
        member = backend.members[place]
        try:
            await member.backend.open()
            missing = await self._audit(tier, backend, place)
        except VswapError as error:
            backend.given_up(place, error)
            self._put_off(care)
            return
        # In the turn in which the audit ended: nothing was deleted without it since.
        backend.restore(place)
        care.up_at, care.suspect = self._clock(), False
        logger.info("server is back", tier=tier.name, server=member.label, missing=missing)

    async def _look_again(self, tier: Tier, backend: Redundant, place: int, care: _Care) -> None:
        care.suspect, care.up_at = False, care.up_at or self._clock()
        try:
            missing = await self._audit(tier, backend, place)
        except VswapError as error:
            care.suspect = True
            backend.failed(place, error)
            return
        if missing:
            label = backend.members[place].label
            logger.warning("server lacks segments", tier=tier.name, server=label, missing=missing)

    async def _feel_pulse(self, tier: Tier, backend: Redundant, place: int, care: _Care) -> None:
        """Notices without any traffic that a server is gone, or came back while nobody looked."""
        care.pulse_at = self._clock() + _PULSE_S
        try:
            life = await backend.members[place].backend.life()
        except VswapError as error:
            backend.failed(place, error)
            return
        if care.life and life != care.life:
            logger.warning("server was restarted", server=backend.members[place].label)
            care.suspect = True
        care.life = life

    async def _audit(self, tier: Tier, backend: Redundant, place: int) -> int:
        """Holds what a server lists against the rows; returns how many parts it newly lacks."""
        handles, member = self._handles, backend.members[place].backend
        await self._writes_end(tier)
        # A serial taken from here on is not a stray even if it shows up in the listing.
        next_serial = handles.next_serial()
        before = np.fromiter(tier.segments, np.int64, len(tier.segments))
        before = before[handles.states(before) == SEALED]
        words: U64 = handles.rows["word"][before].copy()
        own = tier.segment_name(0)
        listed: dict[int, int] = {}
        async for item in member.list(prefix(own.cluster, own.shard)):
            name = SegmentName.parse(item.key)
            if name is not None and name.serial < next_serial:
                listed[name.serial] = item.bytes
        missing = 0
        for start in range(0, len(before), _BATCH):
            turn = slice(start, start + _BATCH)
            missing += self._lacks(tier, backend, place, before[turn], words[turn], listed)
            await asyncio.sleep(0)
        while strays := self._strays(listed):
            if tier.fenced:
                return missing
            for start in range(0, len(strays), _BATCH):
                some = strays[start : start + _BATCH]
                await member.delete([SegmentName(own.cluster, own.shard, s) for s in some])
            for serial in strays:
                del listed[serial]
        return missing

    async def _writes_end(self, tier: Tier) -> None:
        """Waits for the writes that are under way now; each has its deadline."""
        own = np.fromiter(tier.segments, np.int64, len(tier.segments))
        own = own[self._handles.states(own) == WRITING]
        words: U64 = self._handles.rows["word"][own].copy()
        while (self._handles.rows["word"][own] == words).any():
            await asyncio.sleep(_WRITES_S)

    def _lacks(
        self, tier: Tier, backend: Redundant, place: int, handles: I64, words: U64,
        listed: dict[int, int],
    ) -> int:  # fmt: skip
        """Notes which segments, if they are still those of ``words``, have no good part there."""
        rows, missing = self._handles.rows, 0
        for handle in handles[rows["word"][handles] == words].tolist():
            name, stored = tier.segment_name(handle), int(rows["stored"][handle])
            if listed.get(name.serial) != backend.part_bytes(name, place, stored):
                lacking = int(rows["lacking"][handle])
                missing += not lacking >> place & 1
                rows["lacking"][handle] = lacking | 1 << place
        return missing

    def _strays(self, listed: dict[int, int]) -> list[int]:
        """Serials that are in no row, of whatever tier: two of them may lie on one server."""
        serials = np.fromiter(listed, np.uint64, len(listed))
        words: U64 = self._handles.rows["word"][self._handles.in_use()]
        strays: list[int] = serials[~np.isin(serials, words >> np.uint64(STATE_BITS))].tolist()
        return strays
