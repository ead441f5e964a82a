"""The scrub: reads and verifies every record that is stored, so that damage is found while there
still is a good copy, and not by a client.

Reading is the mover's: what fails its check is read again, looked for elsewhere, and set aside if
that does not help. Nothing is moved. Of a redundant tier every part is looked at, also those that
no reader asks for; what is bad there is repaired like any other loss. Segments that are gone count
as lost at once, and the tables tell which slots they held.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from vswap.node.contents import ContentsReader
from vswap.node.handles import OPEN, SEALED, Handles
from vswap.node.ledger import Ledger
from vswap.node.lost import pages_in
from vswap.node.pacer import Pacer
from vswap.node.reaper import Reaper
from vswap.node.tier import Tier
from vswap.node.tiers import Tiers
from vswap.wire.errors import PageLost, UnknownTier, VswapError

_PAUSE_S = 600.0
"""At least, between two passes. The first one leaves a start in peace."""

_TELL_SLOTS = 1000

logger = structlog.get_logger("vswap.node.scrub")


@dataclass(slots=True)
class LostSlots:
    """Slots of a space whose pages are lost."""

    space: str
    slots: list[int]


@dataclass(slots=True)
class Scrubbed:
    """What a pass has found so far."""

    segments: int = 0
    bytes: int = 0
    segments_left: int = 0
    damaged_pages: int = 0
    """Set aside: no good copy was found."""
    lost_pages: int = 0
    """What the backend does not have: segments, or the ends of torn ones."""
    bad_parts: int = 0
    """Of redundant tiers: parts that a server lacks, or that are damaged."""
    skipped: int = 0
    """Segments of tiers that did not answer."""
    error: str = ""
    """Why they did not."""
    lost: list[LostSlots] = field(default_factory=list)
    """Known once the pass has ended; the first thousand slots."""


class Scrubber:
    """Event loop only."""

    def __init__(
        self, handles: Handles, ledger: Ledger, tiers: Tiers, contents: ContentsReader,
        reaper: Reaper, *, clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self._handles = handles
        self._ledger = ledger
        self._tiers = tiers
        self._contents = contents
        self._reaper = reaper
        self._clock = clock
        self._own = Scrubbed()
        self.counters: Counter[str] = Counter()

    async def run(self, pacer: Pacer, interval_s: float) -> None:
        """A pass every ``interval_s``, for ever; one that takes longer is followed by the next."""
        pause = _PAUSE_S
        while True:
            await asyncio.sleep(pause)
            began, seen = self._clock(), Scrubbed()
            self._own = seen
            await self.scrub(pacer, seen)
            self.counters["scrub_passes"] += 1
            pause = max(interval_s - (self._clock() - began), _PAUSE_S)

    def progress(self) -> dict[str, int]:
        """The counters, and how far the node's own pass is."""
        return {
            **self.counters,
            "scrub_segments_left": self._own.segments_left,
            "scrub_lost_pages": self._own.lost_pages,
        }

    async def scrub(self, pacer: Pacer, seen: Scrubbed, only: str = "") -> Scrubbed:
        """One pass over all tiers, or one; ``seen`` tells how far it is. What is written while it
        runs is left to the next pass. Raises UnknownTier."""
        if only and self._tiers.find(only) is None:
            raise UnknownTier(f"no tier named {only!r}", tier=only)
        chosen = [tier for tier in self._tiers if only in ("", tier.name)]
        queue = [
            (tier, handle, int(self._handles.rows["word"][handle]) >> 4)
            for tier in chosen
            for handle in tier.segments
        ]
        seen.segments_left = len(queue)
        for tier, handle, serial in queue:
            state = self._handles.state(handle)
            if self._handles.serial(handle) == serial and state in (OPEN, SEALED):
                await self._segment(tier, handle, pacer, seen)
            seen.segments_left -= 1
        for tier in chosen:
            await self._name_lost(tier, seen)
        return seen

    async def _segment(self, tier: Tier, handle: int, pacer: Pacer, seen: Scrubbed) -> None:
        self._handles.pins[handle] += 1
        try:
            stored = int(self._handles.rows["stored"][handle])
            await pacer.take(stored)
            before = tier.quarantined
            if self._handles.live_records[handle]:
                contents = await self._contents.read(tier, handle)
                if contents.doubtful is not None:
                    raise contents.doubtful
                if contents.missing:
                    seen.lost_pages += contents.missing
                    tier.suspect = True
                    name = tier.segment_name(handle)
                    logger.error("a segment is torn", tier=tier.name, segment=name.key,
                                 pages=contents.missing)  # fmt: skip
            seen.damaged_pages += tier.quarantined - before
            if tier.redundant is not None:
                name = tier.segment_name(handle)
                seen.bad_parts += (await tier.redundant.verify(name, stored)).bit_count()
            tier.missing.pop(handle, None)
            seen.segments += 1
            seen.bytes += stored
            self.counters["scrubbed_bytes"] += stored
        except PageLost as error:
            seen.lost_pages += int(self._handles.live_records[handle])
            tier.suspect = True
            tier.missing[handle] = int(self._handles.rows["word"][handle])
            logger.error("a segment is lost", tier=tier.name, error=str(error))
        except VswapError as error:
            seen.skipped += 1
            seen.error = f"{tier.name}: {error}"
        finally:
            self._reaper.unpin(handle)

    async def _name_lost(self, tier: Tier, seen: Scrubbed) -> None:
        """Tells which slots lie in segments that the tier does not have."""
        words = self._handles.rows["word"]
        gone = [handle for handle, word in tier.missing.items() if int(words[handle]) == word]
        room = _TELL_SLOTS - sum(len(lost.slots) for lost in seen.lost)
        if not gone or room <= 0:
            return
        async for space, slots, _ in pages_in(tier, gone, self._ledger):
            some = slots[:room].tolist()
            seen.lost.append(LostSlots(space.name, some))
            logger.error("pages are lost", tier=tier.name, space=space.name, slots=some[:10])
            room -= len(some)
            if room <= 0:
                return
