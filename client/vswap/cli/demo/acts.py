"""The demo's acts. Everything told is measured: by nodes, by checked loads, by the servers."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable

import numpy as np
from numpy.typing import NDArray

from vswap.cli import units, watch
from vswap.cli.demo.cluster import Cluster
from vswap.cli.demo.plan import OBJECTS, PAGE_BYTES, REDIS_A, REDIS_B
from vswap.cli.demo.result import Result
from vswap.cli.demo.sample import Sample
from vswap.cli.demo.story import Story, Tiers
from vswap.loadgen import report
from vswap.loadgen.run import LoadRun
from vswap.v1 import coordinator_pb2
from vswap.wire.errors import InternalError

Job = coordinator_pb2.Job

SAMPLE_PAGES = 2000
SAMPLE_SHARES = 20
OVERWRITTEN = 0.05
FREED_OF_COMPACTED = 0.62
MIGRATED_SHARE = 8
"""One part in so many of the destination's capacity."""
COMPACT_TARGET = 0.92

# Of the speed of the fill.
LOAD_SHARE = 0.4

_POLL_S = 0.1
_STALLED_S = 60.0


class Acts:
    """Plays on a running cluster, in the order of the methods."""

    def __init__(
        self,
        cluster: Cluster,
        run: LoadRun,
        sample: Sample,
        story: Story,
        base: NDArray[np.uint8],
        seconds: float,
    ) -> None:
        self._cluster = cluster
        self._run = run
        self._sample = sample
        self._story = story
        self._base = base
        self._seconds = seconds
        self._rate_pages_s = 0.0
        self.result = Result()

    async def fill(self) -> None:
        """Store every page; the sample's pages come in between, so that they spread."""
        pages = self._cluster.plan.pages

        async def sample_stores() -> None:
            for share in range(SAMPLE_SHARES):
                while self._run.now.pages_stored < pages * share / SAMPLE_SHARES:
                    await asyncio.sleep(_POLL_S)
                await asyncio.to_thread(self._sample.store_more, SAMPLE_PAGES // SAMPLE_SHARES)

        async def work() -> float:
            begin_s = time.monotonic()
            stores = asyncio.create_task(sample_stores())
            try:
                await self._run.populate()
                await stores
            finally:
                stores.cancel()
            return time.monotonic() - begin_s

        took_s = await self._story.during(
            work(), self._look(lambda: f"{units.count(self._run.now.pages_stored)} pages stored")
        )
        self._rate_pages_s = LOAD_SHARE * self._cluster.plan.pages / took_s
        self.result.logical_bytes = self._run.held_pages() * PAGE_BYTES
        self.result.tiers = await self._tiers()
        self._story.line(
            f"{units.size(self.result.logical_bytes)} of pages stored in {units.duration(took_s)}"
        )
        self._story.table(self.result.tiers)
        await self._show_sample()

    async def before(self) -> None:
        """Load without anything else going on: what the drain is compared with.

        At a fixed rate, well below what the machine can do: at its limit latencies would only tell
        how many requests queue.
        """
        seconds = self._seconds / 2
        begin_s = time.monotonic()
        self.result.before = await self._run.run(seconds=seconds, rate_pages_s=self._rate_pages_s)
        self.result.before_s = time.monotonic() - begin_s
        self._story.line(
            f"{units.count(self.result.before.pages)} page operations in "
            f"{units.duration(self.result.before_s)}, every loaded page checked (at a fixed rate "
            f"of {units.count(round(self._rate_pages_s))} pages/s, {LOAD_SHARE:.0%} of the speed "
            "of the fill)"
        )

    async def drain(self) -> None:
        """Empty a Redis server while clients go on, then switch it off."""
        keys_before, bytes_before = await asyncio.to_thread(self._cluster.redis_keys, REDIS_A)
        self._story.line(
            f"the server itself lists {units.count(keys_before)} keys, {units.size(bytes_before)}"
        )
        # Slow enough that there is something to see of the load meanwhile.
        rate = round(bytes_before / self._seconds)
        spec = coordinator_pb2.JobSpec(kind="MOVE_KIND_DRAIN", tier=REDIS_A, rate_bytes_s=rate)
        self._story.line(f"vswap drain {REDIS_A} --rate {units.rate(rate).replace(' ', '')}")
        stop = asyncio.Event()
        load = asyncio.create_task(self._run.run(until=stop, rate_pages_s=self._rate_pages_s))
        try:
            job = await self._job(spec)
        finally:
            stop.set()
        self.result.during = await load
        keys_left, _ = await asyncio.to_thread(self._cluster.redis_keys, REDIS_A)
        self.result.drain = {
            "tier": REDIS_A,
            "pages_moved": job.pages_moved,
            "bytes_moved": job.bytes_moved,
            "seconds": round(job.ended_at - job.created_at, 3),
            "ops_meanwhile": self.result.during.pages,
            "keys_before": keys_before,
            "keys_left": keys_left,
        }
        self._story.line(
            f"{units.count(job.pages_moved)} pages moved during "
            f"{units.count(self.result.during.pages)} page operations; the server lists "
            f"{keys_left} keys now"
        )
        for what, before in self.result.before.latency_us().items():
            during = self.result.during.latency_us()[what]
            self._story.line(
                f"{what} of a batch: p50 {units.micros(before['p50'])} before, "
                f"{units.micros(during['p50'])} during; p99 {units.micros(before['p99'])} before, "
                f"{units.micros(during['p99'])} during"
            )
        await asyncio.to_thread(self._cluster.operator.remove_tier, REDIS_A)
        self._cluster.redis.pop(REDIS_A).stop()
        self._story.line(f"{REDIS_A} is switched off")
        await self._check_sample()

    async def change(self) -> None:
        """Overwrite and free, which leaves dead records behind."""
        written = await self._run.overwrite(OVERWRITTEN)
        freed = await self._run.free_in(REDIS_B, FREED_OF_COMPACTED)
        await asyncio.to_thread(self._sample.change, SAMPLE_PAGES // 10, SAMPLE_PAGES // 10)
        self._story.line(
            f"{units.count(written.pages_stored)} pages overwritten, "
            f"{units.count(freed.pages_freed)} pages of {REDIS_B} freed; the client with the list "
            f"overwrote {SAMPLE_PAGES // 10} of its pages and freed as many"
        )
        await self._show_sample()

    async def compact(self) -> None:
        """Rewrite what is left in a Redis server so that it takes no more than it needs."""
        before, live_before = await self._utilisation()
        memory_before = await asyncio.to_thread(self._cluster.redis_memory, REDIS_B)
        self._story.line(
            f"the server itself lists {units.size(before)}; {units.size(live_before)} of it are "
            f"pages in use ({units.percent(live_before / before)})"
        )
        spec = coordinator_pb2.JobSpec(
            kind="MOVE_KIND_COMPACT", tier=REDIS_B, target_utilisation=COMPACT_TARGET
        )
        self._story.line(f"vswap compact {REDIS_B} --target {COMPACT_TARGET}")
        await self._job(spec)
        after, live_after = await self._utilisation()
        memory_after = await asyncio.to_thread(self._cluster.redis_memory, REDIS_B)
        self.result.compaction = {
            "tier": REDIS_B,
            "utilisation_before": round(live_before / before, 4),
            "utilisation_after": round(live_after / after, 4),
            "backend_bytes_before": before,
            "backend_bytes_after": after,
            "used_memory_before": memory_before,
            "used_memory_after": memory_after,
        }
        self._story.line(
            f"now it lists {units.size(after)} ({units.percent(live_after / after)} in use); "
            f"used_memory {units.size(memory_before)} before, {units.size(memory_after)} after"
        )
        await self._show_sample()

    async def migrate(self) -> None:
        """Bring some pages back from disk to the room that compaction made."""
        budget = self._cluster.plan.capacity_bytes[REDIS_B] // MIGRATED_SHARE >> 20 << 20
        budget = max(budget, 1 << 20)
        spec = coordinator_pb2.JobSpec(
            kind="MOVE_KIND_MIGRATE",
            tier=OBJECTS,
            destination=REDIS_B,
            byte_budget=budget,
        )
        amount = units.size(budget).replace(" ", "").replace(".0", "")
        self._story.line(f"vswap migrate --from {OBJECTS} --to {REDIS_B} --bytes {amount}")
        job = await self._job(spec)
        self.result.migration = {
            "from": OBJECTS,
            "to": REDIS_B,
            "pages_moved": job.pages_moved,
            "bytes_moved": job.bytes_moved,
        }
        self._story.line(
            f"{units.count(job.pages_moved)} pages moved ({units.size(job.bytes_moved)})"
        )
        await self._show_sample()

    async def read_back(self) -> None:
        """Load every page by the slot number it was first stored under."""
        meter = await self._story.during(
            self._run.read_back(),
            self._look(lambda: f"{units.count(self._run.now.pages_loaded)} pages checked"),
        )
        self.result.tiers_at_end = await self._tiers()
        self._story.line(
            f"{units.count(meter.pages_loaded)} pages loaded by the numbers they were stored "
            f"under: {meter.wrong_pages} wrong, {meter.lost_pages} lost"
        )
        await self._check_sample()
        sample = self._sample
        self.result.sample = {
            "pages": len(sample.noted),
            "loaded": sample.loaded,
            "wrong_pages": sample.wrong,
        }
        self.result.total = self._run.total

    # -------------------------------------------------------------- inside

    async def _job(self, spec: coordinator_pb2.JobSpec) -> Job:
        """Start a job and show it to its end."""
        operator = self._cluster.operator
        job = await asyncio.to_thread(operator.start_job, spec)
        newest = [job]

        async def work() -> Job:
            moved_at_s = time.monotonic()
            while watch.state_of(newest[0]) not in watch.ENDED:
                await asyncio.sleep(_POLL_S)
                for other in await asyncio.to_thread(operator.jobs, ended=True):
                    if other.id == job.id:
                        if other.bytes_moved != newest[0].bytes_moved:
                            moved_at_s = time.monotonic()
                        newest[0] = other
                if time.monotonic() - moved_at_s > _STALLED_S:
                    raise InternalError(
                        f"no progress for {_STALLED_S:.0f} s: {watch.progress_line(newest[0])}"
                    )
            return newest[0]

        ended = await self._story.during(work(), self._look(lambda: watch.progress_line(newest[0])))
        if watch.state_of(ended) != "done":
            raise InternalError(f"{watch.title(ended)} {watch.state_of(ended)}: {ended.reason}")
        return ended

    async def _show_sample(self) -> None:
        """Where the sample's pages lie. Loading them each time would only pull them into RAM."""
        places: Counter[str] = await asyncio.to_thread(self._sample.places)
        lie = ", ".join(f"{units.count(count)} in {name}" for name, count in places.most_common())
        self._story.line(
            f"a client keeps a list of {units.count(len(self._sample.noted))} slot numbers; "
            f"the pages are now: {lie}"
        )

    async def _check_sample(self) -> None:
        """Load every page of the sample by its number."""
        await self._show_sample()
        wrong = await asyncio.to_thread(self._sample.check)
        self._story.line(
            f"it loads all {units.count(len(self._sample.noted))} by the numbers on its list: "
            + ("every page as noted" if not wrong else f"{wrong} WRONG"),
            style="" if not wrong else "bold red",
        )

    async def _utilisation(self) -> tuple[int, int]:
        """Bytes that the compacted server lists, and those of them that are in use."""
        _, listed = await asyncio.to_thread(self._cluster.redis_keys, REDIS_B)
        tiers = await self._tiers()
        return listed, tiers[REDIS_B]["live_bytes"]

    async def _tiers(self) -> Tiers:
        return report.tier_shares(await self._cluster.nodes(), PAGE_BYTES)

    def _look(self, line: Callable[[], str]) -> Callable[[], Awaitable[tuple[str, Tiers]]]:
        async def look() -> tuple[str, Tiers]:
            return line(), await self._tiers()

        return look
