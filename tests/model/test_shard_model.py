"""A real shard against a dict: whatever is done to it, and whatever its backends do to it.

Invariants: every acknowledged page is readable and equal; one authoritative place per live page; an
older store never wins; a failed operation changed nothing, or may have happened where the error
says so; once all is quiet, every backend lists exactly the segments that the shard knows.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray
from shards import page, ram

from vswap.node import entry
from vswap.node.directives import Directive, MoveKind
from vswap.node.seams import Seams
from vswap.node.shard import Shard
from vswap.node.tier import TierState
from vswap.tiers.backend import Backend, prefix
from vswap.tiers.factory import make_backend
from vswap.tiers.spec import TierSpec
from vswap.tiers.wrappers.faulty import FaultPlan, Faulty
from vswap.wire.errors import (
    OutOfTiers,
    PageCorrupt,
    SlotNotFound,
    TierUnavailable,
)

T = TypeVar("T")
MIB = 2**20
SLOTS = 1500
CALM = FaultPlan()
STORMS = (
    FaultPlan(seed=1, error=0.2, delay=0.3, delay_ms=2),
    FaultPlan(seed=2, lost=0.3),
    FaultPlan(seed=3, flip=0.2),
    FaultPlan(seed=4, error=0.1, lost=0.1, flip=0.05, delay=0.2, delay_ms=1),
)
batches = st.tuples(st.integers(0, SLOTS - 1), st.integers(1, 300), st.integers(1, 5))


class ShardMachine(RuleBasedStateMachine):
    """Rules run one after the other or, in ``together``, at once."""

    @initialize()
    def start(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.root = Path(tempfile.mkdtemp(prefix="vswap-model-"))
        self.model: dict[int, int] = {}
        """Slot to version of the page it must hold."""
        self.version = 0
        self.jobs = 0
        self.generation = 0
        self.draining = False
        self.faulty: list[Faulty] = []
        self.run(self._open())
        # Full from the start: pages in every tier.
        for first in range(0, SLOTS, 150):
            self.run(self._store(np.arange(first, first + 150, dtype=np.uint64)))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, 60))

    def _make(self, spec: TierSpec) -> Backend:
        backend = Faulty(make_backend(spec), CALM)
        self.faulty.append(backend)
        return backend

    async def _open(self) -> None:
        self.faulty.clear()
        (self.root / "state").mkdir(exist_ok=True)
        self.shard = await Shard.open(
            self.root / "state",
            [ram(mib=1), ram("zram", mib=1, codec="zstd:1", rank=1), self._tier("disk", 2)],
            seams=Seams(make_backend=self._make, threads=2, late_s=0.05),
        )
        self.space = self.shard.spaces.create("s", max_slots=SLOTS + 1000, exist_ok=True)
        await self._configure()

    def _tier(self, name: str, rank: int) -> TierSpec:
        return TierSpec(
            name=name, url=f"file://{self.root}/{name}", capacity_bytes=64 * MIB, rank=rank,
            codec="zstd:1",
        )  # fmt: skip

    async def _configure(self) -> None:
        """The cluster's tiers, granted in full."""
        await self.shard.join(UUID(int=7))
        self.generation += 1
        states = {"near": TierState.DRAINING if self.draining else TierState.ACTIVE}
        tiers = [
            (self._tier(name, rank), states.get(name, TierState.ACTIVE))
            for name, rank in (("near", 3), ("far", 4))
        ]
        await self.shard.configure(max(self.generation, self.shard.generation + 1), tiers)
        for name in ("near", "far"):
            self.shard.set_grant(name, 64 * MIB)

    # ------------------------------------------------------------ pages

    def _slots(self, batch: tuple[int, int, int]) -> NDArray[np.uint64]:
        first, count, step = batch
        return np.unique((first + np.arange(count, dtype=np.uint64) * np.uint64(step)) % SLOTS)

    def _page(self, slot: int, version: int) -> NDArray[np.uint8]:
        if (slot + version) % 9 == 0:
            return np.full(1024, slot * 65536 + version, np.uint32).view(np.uint8)
        if (slot + version) % 9 == 1:
            return np.random.default_rng([slot, version]).integers(0, 256, 4096, np.uint8)
        return page(slot, version)

    async def _store(self, slots: NDArray[np.uint64]) -> None:
        self.version += 1
        version = self.version
        content = np.stack([self._page(slot, version) for slot in slots.tolist()])
        try:
            await self.shard.pager.store(self.space, slots, content)
        except (TierUnavailable, OutOfTiers):
            return
        for slot in slots.tolist():
            # Of stores under way at once, the one admitted last wins.
            self.model[slot] = max(self.model.get(slot, 0), version)

    async def _check(self, slots: NDArray[np.uint64]) -> None:
        for _ in range(200):
            try:
                loaded = await self.shard.pager.load(self.space, slots)
                break
            except TierUnavailable:
                await asyncio.sleep(0.01)
        else:
            raise AssertionError("a tier stays unavailable")
        for slot, got in zip(slots.tolist(), loaded, strict=True):
            assert (got == self._page(slot, self.model[slot])).all(), (slot, self.model[slot])

    @rule(batch=batches)
    def store(self, batch: tuple[int, int, int]) -> None:
        self.run(self._store(self._slots(batch)))

    @rule(batch=batches)
    def free(self, batch: tuple[int, int, int]) -> None:
        slots = self._slots(batch)
        had = [slot for slot in slots.tolist() if slot in self.model]
        assert self.run(self.shard.pager.free(self.space, slots)) == len(had)
        for slot in had:
            del self.model[slot]

    @rule(batch=batches)
    def load(self, batch: tuple[int, int, int]) -> None:
        self.calm_reads()
        slots = self._slots(batch)
        missing = [slot for slot in slots.tolist() if slot not in self.model]
        if missing:
            with pytest.raises(SlotNotFound) as error:
                self.run(self.shard.pager.load(self.space, slots))
            assert error.value.fields["slots"] == missing[:64]
        slots = np.array([s for s in slots.tolist() if s in self.model], np.uint64)
        if len(slots):
            self.run(self._check(slots))

    @rule(batch=batches, confirm=st.booleans(), again=st.integers(0, 3))
    def load_exclusive(self, batch: tuple[int, int, int], confirm: bool, again: int) -> None:
        self.calm_reads()
        slots = np.array([s for s in self._slots(batch).tolist() if s in self.model], np.uint64)
        if not len(slots):
            return
        pages, token = self.run(self.shard.pager.load_exclusive(self.space, slots))
        for slot, got in zip(slots.tolist(), pages, strict=True):
            assert (got == self._page(slot, self.model[slot])).all()
        before = dict(self.model)
        if again:
            self.run(self._store(slots[:again]))
        if confirm:
            self.run(self.shard.pager.confirm(self.space, token))
            # The reply may be lost: confirming again is harmless.
            self.run(self.shard.pager.confirm(self.space, token))
            for slot in slots.tolist():
                if self.model[slot] == before[slot]:
                    del self.model[slot]

    @rule(batches_=st.lists(batches, min_size=2, max_size=6))
    def together(self, batches_: list[tuple[int, int, int]]) -> None:
        """Stores and checks at once, over the same slots."""

        async def everything() -> None:
            await asyncio.gather(*(self._store(self._slots(batch)) for batch in batches_))

        self.run(everything())

    # ------------------------------------------------------------ faults and moves

    def calm_reads(self) -> None:
        """Loads are checked for their bytes; what they do in a storm is :meth:`load_in_a_storm`."""
        for backend in self.faulty:
            backend.plan = CALM

    @rule(storm=st.sampled_from(STORMS))
    def storm(self, storm: FaultPlan) -> None:
        for backend in self.faulty:
            backend.plan = storm

    @rule(batch=batches)
    def load_in_a_storm(self, batch: tuple[int, int, int]) -> None:
        """Wrong bytes are never returned: right ones, or an error."""
        slots = np.array([s for s in self._slots(batch).tolist() if s in self.model], np.uint64)
        if not len(slots):
            return

        async def once() -> None:
            try:
                loaded = await self.shard.pager.load(self.space, slots)
            except (TierUnavailable, PageCorrupt):
                return
            for slot, got in zip(slots.tolist(), loaded, strict=True):
                assert (got == self._page(slot, self.model[slot])).all()

        self.run(once())

    @rule(
        kind=st.sampled_from(MoveKind),
        source=st.sampled_from(["near", "far", "disk"]),
        destination=st.sampled_from(["zram", "disk", "near", "far"]),
        meanwhile=st.lists(batches, min_size=1, max_size=5),
    )
    def move(
        self,
        kind: MoveKind,
        source: str,
        destination: str,
        meanwhile: list[tuple[int, int, int]],
    ) -> None:
        """Some time of a job, while pages are stored; it may go on during the next rules."""
        if kind is MoveKind.DRAIN:
            source, self.draining = "near", True
            self.run(self._configure())
        elif source == destination:
            return
        self.jobs += 1
        directive = Directive(
            f"job{self.jobs}", kind, source, destination if kind is MoveKind.MIGRATE else "",
            byte_budget=300_000 if kind is MoveKind.MIGRATE else 0, target_utilisation=0.95,
        )  # fmt: skip

        async def some_time() -> None:
            self.shard.directives.start(directive)
            for batch in meanwhile:
                for _ in range(batch[2]):
                    await asyncio.sleep(0)
                await self._store(self._slots(batch))
            for _ in range(20):
                await asyncio.sleep(0.002)
                if all(p.state == "done" for p in self.shard.directives.progress()):
                    break

        self.run(some_time())

    @precondition(lambda self: self.draining)
    @rule()
    def activate(self) -> None:
        self.stop_jobs()
        self.draining = False
        self.run(self._configure())

    def stop_jobs(self) -> None:
        for progress in self.shard.directives.progress():
            self.shard.directives.stop(progress.job_id)

    @rule()
    def restart(self) -> None:
        self.calm_reads()
        self.run(self.shard.close())
        self.run(self._open())

    # ------------------------------------------------------------ invariants

    @invariant()
    def books_are_right(self) -> None:
        if not hasattr(self, "shard"):
            return
        every = np.arange(SLOTS, dtype=np.uint64)
        words = self.space.table.get(every)
        assert set(every[words != 0].tolist()) == set(self.model)
        tags = entry.tags(words)
        assert (np.bincount(tags, minlength=16)[1:] == self.space.pages_by_tag[1:]).all()
        assert not (tags == entry.POISON).any()
        tier = (tags >= entry.FIRST_TIER) & (tags <= entry.LAST_TIER)
        per_handle = np.bincount(entry.handles(words[tier]), minlength=1)
        live = self.shard.handles.live_records
        assert (live[: len(per_handle)] == per_handle).all()
        assert not live[len(per_handle) :].any()

    async def _quiet(self) -> None:
        for _ in range(400):
            await asyncio.sleep(0.01)
            if not self.shard.reaper.pending and not any(tier.writing for tier in self.shard.tiers):
                return
        raise AssertionError("deletions never end")

    def teardown(self) -> None:
        if not hasattr(self, "shard"):
            return
        try:
            self.calm_reads()
            self.stop_jobs()
            every = np.array(sorted(self.model), np.uint64)
            if len(every):
                self.run(self._check(every))
            self.run(self.shard.reclaim.close())
            self.run(self._quiet())
            assert not self.shard.handles.pins.any()
            assert not any(self.shard.evacuator.promised.values())
            self.run(self._nothing_leaked())
            self.run(self.shard.close())
        finally:
            self.loop.close()
            shutil.rmtree(self.root, ignore_errors=True)

    async def _nothing_leaked(self) -> None:
        for tier in self.shard.tiers:
            if tier.ram is not None:
                blocks = tier.ram.blocks - tier.ram.free_blocks
                assert blocks == len(tier.segments)
                continue
            # A write whose reply was lost may have landed after its deletion: the sweep finds it.
            await self.shard._sweeper.sweep(tier)
            listed = {item.key async for item in tier.backend.list(prefix())}
            assert listed == {tier.segment_name(handle).key for handle in tier.segments}


ShardMachine.TestCase.settings = settings(
    max_examples=20,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestShard = ShardMachine.TestCase
