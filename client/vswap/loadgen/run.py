"""A load run: clients over one or more nodes, driven in phases by whoever owns it.

The owner connects, then calls `populate`, `run`, `read_back` and the like in any order. Each phase
has a meter of its own, which `LoadRun.now` is while it runs; `LoadRun.total` is all that ended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vswap.client import AsyncClient, AsyncSpace
from vswap.loadgen import workload
from vswap.loadgen.content import Content
from vswap.loadgen.ledger import SHOWN_WRONGS, Ledger
from vswap.loadgen.meter import Meter
from vswap.loadgen.stripe import Pace, Stripe
from vswap.loadgen.workload import Mix
from vswap.wire.errors import InvalidRequest, VswapError

READ_BACK_BATCH = 256
LOCATE_BATCH = 16384

Work: TypeAlias = Coroutine[Any, Any, None]


@dataclass(frozen=True, slots=True)
class LoadSpec:
    """What to do. ``pages`` and ``clients`` are over all nodes, ``rate_pages_s`` as well.

    ``rate_pages_s`` 0 is a closed loop: a client sends when its last reply is there. ``first_slot``
    is where the slots begin in each space.
    """

    workload: str = "uniform"
    mix: Mix = field(default_factory=lambda: Mix(0.7, 0.25, 0.05))
    skew: float = 1.0
    batch: int = 32
    clients: int = 4
    pages: int = 65536
    rate_pages_s: float = 0
    fill: float = 0.2
    seed: int = 1
    first_slot: int = 0
    retry_s: float = 10.0

    def __post_init__(self) -> None:
        if self.clients < 1 or self.batch < 1 or self.rate_pages_s < 0:
            raise InvalidRequest("clients and batch must be at least 1, and the rate not negative")
        if self.pages < self.clients:
            raise InvalidRequest(f"{self.pages} pages are too few for {self.clients} clients")


class LoadRun:
    """The clients of a run, spread over the nodes in turn; each owns a stripe of slots.

    Open it with ``async with``. One phase at a time. ``report`` is called with a line for each of
    the first failures and wrong pages.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        space: str,
        spec: LoadSpec,
        base: NDArray[np.uint8],
        *,
        report: Callable[[str], None] = lambda line: None,
        only: Iterable[int] | None = None,
    ) -> None:
        """``only``: of the clients 0..spec.clients-1 run just these (the rest run elsewhere)."""
        self.spec = spec
        self.total = Meter()
        self.stripes: list[Stripe] = []
        self._addresses = addresses
        self._space_name = space
        self._base = base
        self._only = range(spec.clients) if only is None else only
        self._report_line = report
        self._reported = 0
        self._connections: list[AsyncClient] = []
        self._now = Meter()

    async def __aenter__(self) -> LoadRun:
        try:
            for index in self._only:
                self.stripes.append(await self._stripe(index))
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        for connection in self._connections:
            await connection.close()
        self._connections.clear()

    # -------------------------------------------------------------- phases

    async def populate(self) -> Meter:
        """Store a page in every slot."""
        return await self._phase(lambda stripe, meter: stripe.populate(meter, self.spec.batch))

    async def run(
        self,
        *,
        seconds: float | None = None,
        pages: int | None = None,
        until: asyncio.Event | None = None,
        rate_pages_s: float | None = None,
    ) -> Meter:
        """The workload until the first of the given bounds: time, page operations, an event.

        ``rate_pages_s`` is that of the spec if not given.
        """
        begin_s = time.monotonic()
        meter = Meter()

        def more() -> bool:
            return not (
                (seconds is not None and time.monotonic() - begin_s >= seconds)
                or (pages is not None and meter.pages >= pages)
                or (until is not None and until.is_set())
            )

        rate = self.spec.rate_pages_s if rate_pages_s is None else rate_pages_s
        paces = dict(zip(self.stripes, self._paces(begin_s, rate), strict=True))
        return await self._phase(lambda stripe, m: stripe.run(m, more, paces[stripe]), meter)

    async def overwrite(self, share: float) -> Meter:
        """Store anew in a random share of the slots."""
        return await self._phase(
            lambda stripe, meter: self._some(
                stripe, share, lambda slots: stripe.overwrite(slots, meter)
            )
        )

    async def free(self, share: float) -> Meter:
        """Free a random share of the slots."""
        return await self._phase(
            lambda stripe, meter: self._some(stripe, share, lambda slots: stripe.free(slots, meter))
        )

    async def free_in(self, tier: str, share: float) -> Meter:
        """Free a random share of the pages that lie in a tier right now."""

        async def work(stripe: Stripe, meter: Meter) -> None:
            held = stripe.ledger.all_held()
            there = held[await _lies_in(stripe.space, held, tier)]
            chosen = self._rng(stripe).permutation(there)[: round(share * len(there))]
            for part in _parts(np.sort(chosen), self.spec.batch):
                await stripe.free(part, meter)

        return await self._phase(work)

    async def read_back(self) -> Meter:
        """Load and check every page; slots that were freed must be free."""
        batch = max(1, min(READ_BACK_BATCH, self.stripes[0].space.max_batch))
        return await self._phase(lambda stripe, meter: stripe.read_back(meter, batch))

    # -------------------------------------------------------------- results

    @property
    def now(self) -> Meter:
        """The phase under way; an empty meter between phases."""
        return self._now

    def held_pages(self) -> int:
        """Slots that certainly hold a page right now."""
        return sum(len(stripe.ledger.all_held()) for stripe in self.stripes)

    @property
    def failures(self) -> list[VswapError]:
        return [error for stripe in self.stripes for error in stripe.failures]

    # -------------------------------------------------------------- inside

    async def _phase(
        self, work: Callable[[Stripe, Meter], Work], meter: Meter | None = None
    ) -> Meter:
        meter = Meter() if meter is None else meter
        self._now = meter
        try:
            async with asyncio.TaskGroup() as tasks:
                for stripe in self.stripes:
                    tasks.create_task(work(stripe, meter))
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:
            self._now = Meter()
            self.total.add(meter)
        return meter

    async def _some(
        self, stripe: Stripe, share: float, work: Callable[[NDArray[np.uint64]], Work]
    ) -> None:
        count = stripe.ledger.count
        chosen = np.sort(self._rng(stripe).permutation(count)[: round(share * count)])
        for part in _parts((chosen + stripe.ledger.first).astype(np.uint64), self.spec.batch):
            await work(part)

    def _rng(self, stripe: Stripe) -> np.random.Generator:
        return np.random.default_rng([self.spec.seed, stripe.ledger.first, self.total.ops])

    def _paces(self, begin_s: float, rate_pages_s: float) -> list[Pace | None]:
        if not rate_pages_s:
            return [None for _ in self.stripes]
        page_s = self.spec.clients / rate_pages_s
        shift_s = self.spec.batch / rate_pages_s
        return [Pace(begin_s + at * shift_s, page_s) for at, _ in enumerate(self.stripes)]

    async def _stripe(self, index: int) -> Stripe:
        spec, nodes = self.spec, len(self._addresses)
        space = await self._connect(self._addresses[index % nodes])
        if spec.batch > space.max_batch:
            raise InvalidRequest(f"a batch of {spec.batch} pages is more than {space.max_batch}")
        if space.page_bytes != self._base.shape[1]:
            raise InvalidRequest(
                f"space {space.name} has pages of {space.page_bytes} bytes, the content "
                f"{self._base.shape[1]}"
            )
        first, count = _bounds(index, spec, nodes)
        if first + count > space.max_slots:
            raise InvalidRequest(
                f"space {space.name} has {space.max_slots} slots; {first + count} are needed"
            )
        content = Content(self._base, spec.fill, spec.seed, run=1 + index % nodes)
        rng = np.random.default_rng([spec.seed, index])
        batches = workload.batches(spec.workload, first, count, spec.batch, spec.skew, rng)
        return Stripe(space, Ledger(first, count, content), batches, spec.mix, rng, self._report)

    async def _connect(self, address: str) -> AsyncSpace:
        connection = AsyncClient(address, retry_s=self.spec.retry_s)
        self._connections.append(connection)
        return await connection.space(self._space_name)

    def _report(self, line: str) -> None:
        if self._reported < SHOWN_WRONGS:
            self._report_line(line)
        self._reported += 1


async def _lies_in(space: AsyncSpace, slots: NDArray[np.uint64], tier: str) -> NDArray[np.bool_]:
    """Which of the slots lie in that tier."""
    found = [np.empty(0, np.bool_)]
    for part in _parts(slots, LOCATE_BATCH):
        names, codes = await space.locate_codes(part)
        found.append(codes == names.index(tier) if tier in names else np.zeros(len(part), np.bool_))
    return np.concatenate(found)


def _parts(slots: NDArray[np.uint64], size: int) -> Iterator[NDArray[np.uint64]]:
    for start in range(0, len(slots), size):
        yield slots[start : start + size]


def _bounds(index: int, spec: LoadSpec, nodes: int) -> tuple[int, int]:
    """First slot and number of slots of a client, among the clients of the same node."""
    beside = range(index % nodes, spec.clients, nodes)
    share, rest = divmod(spec.pages, spec.clients)
    sizes = [share + (other < rest) for other in range(spec.clients)]
    first = spec.first_slot + sum(sizes[other] for other in beside if other < index)
    return first, sizes[index]
