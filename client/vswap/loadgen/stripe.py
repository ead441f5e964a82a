"""One client of the load generator: its own slots, one operation at a time, all checked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vswap.client import AsyncSpace
from vswap.loadgen.ledger import Ledger, Wrong
from vswap.loadgen.meter import Meter
from vswap.loadgen.workload import Mix
from vswap.wire.errors import OutcomeUnknown, PageCorrupt, PageLost, SlotNotFound, VswapError

Slots = NDArray[np.uint64]

_AFTER_FAILURE_S = 0.1
_KEPT_FAILURES = 16


@dataclass(frozen=True, slots=True)
class Pace:
    """Open loop: from ``start_s`` on (monotonic) a page is due every ``page_s`` seconds.

    Operations are batches, so each is due when the pages before it are. An operation that starts
    late, because the one before it took long, is measured from when it was due: what a waiting user
    would see.
    """

    start_s: float
    page_s: float


class Stripe:
    """A client and its slots. Exactly one task may use it at a time."""

    def __init__(
        self,
        space: AsyncSpace,
        ledger: Ledger,
        batches: Iterator[Slots],
        mix: Mix,
        rng: np.random.Generator,
        report: Callable[[str], None],
    ) -> None:
        self.space = space
        self.ledger = ledger
        self._batches = batches
        self._mix = mix
        self._rng = rng
        self._report = report
        self.failures: list[VswapError] = []

    async def populate(self, meter: Meter, batch: int) -> None:
        """Store a page in every slot, in order."""
        for start in range(0, self.ledger.count, batch):
            stop = min(start + batch, self.ledger.count)
            slots = np.arange(start, stop, dtype=np.uint64) + np.uint64(self.ledger.first)
            await self._write(slots, meter, None)

    async def run(self, meter: Meter, more: Callable[[], bool], pace: Pace | None) -> None:
        """Operations of the mix while ``more()``; as fast as replies come, or at a pace."""
        due_s = pace.start_s if pace else None
        while more():
            if pace is not None and due_s is not None:
                # Never sleep past the end of the run: at a slow pace the next turn may lie beyond.
                while more() and (wait_s := due_s - time.monotonic()) > 0:
                    await asyncio.sleep(min(wait_s, 0.1))
                if not more():
                    return
            pages = await self._one(meter, due_s)
            if pace is not None and due_s is not None:
                due_s += pages * pace.page_s

    async def free(self, slots: Slots, meter: Meter) -> None:
        """Free those of the slots that hold a page."""
        held = self.ledger.held(slots)
        if len(held):
            await self._free(held, meter)

    async def overwrite(self, slots: Slots, meter: Meter) -> None:
        await self._write(slots, meter, None)

    async def read_back(self, meter: Meter, batch: int) -> None:
        """Load and check every slot that holds a page; those that hold none must be free."""
        held = self.ledger.all_held()
        for start in range(0, len(held), batch):
            await self._read(held[start : start + batch], meter, None)
        for slot in self.ledger.all_doubtful():
            await self._read_doubtful(np.array([slot], np.uint64), meter)
        free = self.ledger.all_free()
        for start in range(0, len(free), 64 * batch):
            await self._check_free(free[start : start + 64 * batch], meter)

    # -------------------------------------------------------------- single operations

    async def _one(self, meter: Meter, due_s: float | None) -> int:
        """One operation; returns how many pages it was about."""
        slots = next(self._batches)
        wanted = self._mix.choose(self._rng)
        held = self.ledger.held(slots)
        if wanted == "write" or not len(held):
            await self._write(slots, meter, due_s)
            return len(slots)
        if wanted == "read":
            await self._read(held, meter, due_s)
        else:
            await self._free(held, meter)
        return len(held)

    async def _write(self, slots: Slots, meter: Meter, due_s: float | None) -> None:
        pages = self.ledger.storing(slots)
        begun_s = time.monotonic()
        try:
            await self.space.store(slots, pages)
        except OutcomeUnknown as error:
            await self._failed(error, meter)
        except VswapError as error:
            self.ledger.refused(slots)
            await self._failed(error, meter)
        else:
            self.ledger.stored(slots)
            meter.store.record(time.monotonic() - (begun_s if due_s is None else due_s))
            meter.pages_stored += len(slots)
            meter.ops += 1

    async def _read(self, slots: Slots, meter: Meter, due_s: float | None) -> None:
        begun_s = time.monotonic()
        try:
            pages = await self.space.load(slots)
        except (SlotNotFound, PageLost, PageCorrupt) as error:
            meter.lost_pages += int(error.fields.get("slots_count", 1))
            await self._failed(error, meter)
        except VswapError as error:
            await self._failed(error, meter)
        else:
            meter.load.record(time.monotonic() - (begun_s if due_s is None else due_s))
            meter.pages_loaded += len(slots)
            meter.ops += 1
            self._wrong(self.ledger.check(slots, pages), meter)

    async def _free(self, slots: Slots, meter: Meter) -> None:
        self.ledger.freeing(slots)
        try:
            freed = await self.space.free(slots)
        except OutcomeUnknown as error:
            await self._failed(error, meter)
        except VswapError as error:
            self.ledger.not_freed(slots)
            await self._failed(error, meter)
        else:
            self.ledger.freed(slots)
            meter.pages_freed += freed
            meter.ops += 1

    async def _read_doubtful(self, slot: Slots, meter: Meter) -> None:
        try:
            pages = await self.space.load(slot)
        except SlotNotFound:
            return
        except VswapError as error:
            await self._failed(error, meter)
        else:
            meter.pages_loaded += 1
            self._wrong(self.ledger.check(slot, pages), meter)

    async def _check_free(self, slots: Slots, meter: Meter) -> None:
        try:
            names, codes = await self.space.locate_codes(slots)
        except VswapError as error:
            await self._failed(error, meter)
        else:
            still = slots[codes != names.index("free")]
            self._wrong([Wrong(int(slot), "nothing (freed)", "a page") for slot in still], meter)

    def _wrong(self, wrongs: list[Wrong], meter: Meter) -> None:
        meter.wrong_pages += len(wrongs)
        for wrong in wrongs:
            self._report(f"wrong page at {self.space.name}: {wrong}")

    async def _failed(self, error: VswapError, meter: Meter) -> None:
        meter.failed_ops += 1
        if len(self.failures) < _KEPT_FAILURES:
            self.failures.append(error)
        self._report(f"failed: {type(error).__name__}: {error}")
        await asyncio.sleep(_AFTER_FAILURE_S)
