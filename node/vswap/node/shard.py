"""A shard: tables, segments, tiers and movers of a node, put together.

What is authoritative lies in the state directory (shared memory): ``shard`` (header and segment
rows), ``space-N.table``, ``spaces.json``, ``tiers.json`` (which tag stands for which tier, and the
cluster's last configuration), and one arena per RAM tier. All else is derived at start.
"""

from __future__ import annotations

import asyncio
import mmap
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import structlog

from vswap.node import report
from vswap.node.check import Checker
from vswap.node.choose import Choosers
from vswap.node.codecs import Codecs
from vswap.node.contents import ContentsReader
from vswap.node.differences import Checked
from vswap.node.directives import Directives
from vswap.node.evacuator import Evacuator
from vswap.node.faults import split
from vswap.node.former import delete_former
from vswap.node.grants import Grants
from vswap.node.handles import UNBEGUN, Handles, begun, boot_id, erase
from vswap.node.ledger import Ledger
from vswap.node.log import RamLog, SegmentLog
from vswap.node.pager import Pager
from vswap.node.promote import Promoter
from vswap.node.reader import Reader
from vswap.node.reaper import Reaper
from vswap.node.reclaim import Reclaim
from vswap.node.recover import recount, recover
from vswap.node.scrub import Scrubbed, Scrubber
from vswap.node.seams import Seams
from vswap.node.spaces import Spaces, load_json, replace_json
from vswap.node.sweep import Sweeper
from vswap.node.tier import Tier, TierState
from vswap.node.tiers import Tiers
from vswap.node.upkeep import Upkeep
from vswap.tiers.ram import RamBackend, block_size
from vswap.tiers.spec import TierSpec
from vswap.tiers.unmade import Unmade
from vswap.tiers.wrappers.guarded import Guarded
from vswap.tiers.wrappers.metered import Metered
from vswap.wire.errors import (
    AlreadyExists,
    BackendRefused,
    BadConfig,
    Refused,
    StateInvalid,
    VswapError,
)

TIERS_FILE = "tiers.json"
TIERS_VERSION = 1
_REOPEN_S = 1.0
_TICK_S = 0.5
_COOL_S = 60.0
"""So long free blocks of RAM keep their memory. It goes sooner where shared memory runs out."""
_COOL_BLOCKS = 8
_SWEEP_S = 600.0
_CHECK_S = 10.0
"""So often servers are asked whether somebody changed them."""
_PRESSURE = (0.80, 0.95)

logger = structlog.get_logger("vswap.node.shard")


class Shard:
    """Use :meth:`open`. Event loop only."""

    def __init__(self, directory: Path, seams: Seams, *, exclusive_timeout_s: float) -> None:
        self._directory = directory
        self._seams = seams
        self._exclusive_timeout_s = exclusive_timeout_s
        self._region = seams.make_region(directory)
        self._tags: dict[str, int] = {}
        """Tier name to tag, as in ``tiers.json``; a tag is freed only when its tier is empty."""
        self._configured: list[tuple[TierSpec, TierState]] = []
        self.generation = 0
        self._outlived = False
        """The cluster knows a newer life of this shard, as it last said; on file with the tiers."""
        self._background: set[asyncio.Task[None]] = set()
        self._tending: dict[Tier, asyncio.Task[Any]] = {}
        """Who opens or sweeps a tier, beside the others: one that does not answer holds up none."""
        self._meters: dict[str, Metered] = {}
        self._pressure_level = 0
        self.events: Counter[str] = Counter()
        self.frontends: list[Counter[str]] = []
        """What frontends count, to be told with the rest."""

    # ---------------------------------------------------------------- life

    @classmethod
    async def open(
        cls,
        state_dir: Path,
        tiers: Iterable[TierSpec],
        *,
        fresh: bool = False,
        exclusive_timeout_s: float = 60.0,
        seams: Seams | None = None,
    ) -> Shard:
        """Opens the shard in ``state_dir`` (which the caller has locked), or starts a new one.

        ``tiers`` are the node's own. ``fresh`` forgets what is there. State of an earlier boot is
        gone with the host's memory: the shard begins anew. Tiers that it had before are opened in
        the background. Raises StateInvalid where the state is damaged or of another version, and
        what the backend of a new tier says.
        """
        self = cls(state_dir, seams or Seams(), exclusive_timeout_s=exclusive_timeout_s)
        await self._open(list(tiers), fresh=fresh)
        return self

    async def _open(self, specs: list[TierSpec], *, fresh: bool) -> None:
        new = fresh or not begun(self._region)
        if not new:
            self.handles = Handles(self._region, fresh=None)
            if self.handles.boot != boot_id():
                logger.warning("the host was rebooted: its pages are gone, starting anew")
                new = True
                self.handles.close()
        if new:
            erase(self._region)
            self.handles = Handles(self._region, fresh=(self._seams.new_uuid(), boot_id()))
        self.spaces = Spaces(self._region, self.handles.shard, fresh=new)
        self.tiers = Tiers()
        self.ledger = Ledger(self.handles, self.spaces)
        self._assemble()
        if not new:
            self._load_tiers()
            recount(self.ledger)
        self._save_tiers()
        unknown = [spec.name for spec in specs if spec.name not in self._tags]
        for spec in specs:
            self._add_tier(spec, TierState.ACTIVE, local=True)
        for spec, state in self._configured:
            self._add_tier(spec, state, local=False)
        if not new:
            recover(self.handles, self.ledger, self.spaces, self.tiers, self.reaper)
        if not self._outlived:
            # It must not become the newest by a restart, nor the newest one's equal.
            self.handles.begin_life()
        if new:
            self._region.remove(UNBEGUN)
        await self._open_first(unknown)
        self.reaper.start()
        for tier in self.tiers:
            if not tier.opened:
                self._tend(tier, self._open_backend)
        for work in (self.promoter.run, self._housekeeping):
            self._spawn(work)
        self._clear_former()

    def _clear_former(self) -> None:
        former = delete_former(
            self._region, self.tiers, own=self.handles.shard, late_s=self._seams.late_s
        )
        task = asyncio.create_task(former)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _open_first(self, unknown: list[str]) -> None:
        """Opens RAM, and own tiers that this node never had: a wrong URL is told at once. Pages
        elsewhere are no reason to wait for a server that may not answer."""
        first = [tier for tier in self.tiers if tier.ram is not None or tier.name in unknown]
        problems = await asyncio.gather(*(self._tend(tier, self._open_backend) for tier in first))
        for tier, problem in zip(first, problems, strict=True):
            if problem is not None:
                for name in unknown:
                    del self._tags[name]
                self._save_tiers()
                raise type(problem)(f"tier {tier.name}: {problem}", **problem.fields)

    def erase(self) -> None:
        """Removes the state of this life, once it is closed and has left its tiers empty."""
        erase(self._region, left=True)
        self._region.remove(UNBEGUN)

    def _assemble(self) -> None:
        seams, handles, ledger, tiers = self._seams, self.handles, self.ledger, self.tiers
        codecs = Codecs(seams.worker_threads(), seams.threads)
        reader = Reader(handles, tiers)
        self.reaper = Reaper(handles, self._tier_of, clock=seams.clock, late_s=seams.late_s)
        self.reaper.is_head = lambda handle: tiers.is_head(int(handles.rows["tag"][handle]), handle)
        ledger.on_dead = self.reaper.consider
        self.contents = ContentsReader(handles, ledger, reader)
        self.evacuator = Evacuator(handles, ledger, tiers, codecs, self.contents, self.reaper)
        choosers = Choosers(self.spaces, self.evacuator)
        self._grants = Grants(lambda tag: self.evacuator.promised[tag])
        self.reclaim = Reclaim(
            handles,
            tiers,
            self.evacuator,
            choosers,
            self._grants,
            clock=seams.clock,
            make_pacer=seams.make_pacer,
            live_bytes=lambda tag: int(ledger.bytes_by_tag[tag]),
        )
        self._sweeper = Sweeper(handles)
        self.upkeep = Upkeep(handles, clock=seams.clock, rng=seams.rng)
        self.directives = Directives(
            handles, ledger, tiers, self.evacuator, choosers, self._grants, self._sweeper,
            self.upkeep, self.reaper,
            clock=seams.clock, make_pacer=seams.make_pacer,
        )  # fmt: skip
        self._checker = Checker(handles, ledger, tiers, self.reaper)
        self.scrubber = Scrubber(
            handles, ledger, tiers, self.contents, self.reaper, clock=seams.clock
        )
        self.promoter = Promoter(handles, ledger, tiers, codecs, reader, self.reaper)
        self.pager = Pager(
            handles, ledger, tiers, codecs, reader, self.reaper, clock=seams.clock,
            make_room=self.reclaim.make_room, grants=self._grants,
            exclusive_timeout_s=self._exclusive_timeout_s,
        )  # fmt: skip
        self.pager.on_hot = self.promoter.offer

    def _tier_of(self, handle: int) -> Tier:
        return self.tiers.by_tag(int(self.handles.rows["tag"][handle]))

    def _spawn(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        task = asyncio.create_task(_for_ever(work))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def start_scrub(self, rate_bytes_s: int, interval_s: float) -> None:
        """Verifies everything stored at this rate, a pass every ``interval_s``."""
        pacer = self._seams.make_pacer(rate_bytes_s)
        self._spawn(lambda: self.scrubber.run(pacer, interval_s))

    async def scrub(self, rate_bytes_s: int, seen: Scrubbed, only: str = "") -> Scrubbed:
        """See :meth:`Scrubber.scrub`."""
        return await self.scrubber.scrub(self._seams.make_pacer(rate_bytes_s), seen, only)

    async def close(self) -> None:
        """Stops the movers and closes everything. The pages stay, for the next life."""
        self.reclaim.closed = True
        await self.directives.close()
        await self.upkeep.close()
        await self.reaper.close()
        await self.reclaim.close()
        tasks = [*self._background, *self._tending.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(tier.backend.close() for tier in self.tiers))
        self.spaces.close()
        self.handles.close()

    # ---------------------------------------------------------------- identity

    @property
    def uuid(self) -> UUID:
        return self.handles.shard

    @property
    def cluster(self) -> UUID | None:
        uuid = self.handles.cluster
        return uuid if uuid.int else None

    @property
    def incarnation(self) -> int:
        return self.handles.incarnation

    async def join(self, cluster: UUID) -> None:
        """Becomes part of a cluster, for life. Refused for a shard of another cluster."""
        if self.cluster is None:
            self.handles.cluster = cluster
        elif self.cluster != cluster:
            raise Refused(
                f"this node belongs to cluster {self.cluster}, not to {cluster}; "
                "give the coordinator its state back, or start the node with --fresh and lose its "
                "pages",
                cluster=str(self.cluster),
            )

    def disown(self, *, outlived: bool = False) -> None:
        """The cluster has forgotten this shard, for ever: what it wrote on the cluster's tiers is
        being deleted, so nothing is written there any more, in later lives either. What is in its
        own tiers stays.

        ``outlived``: or it knows a newer life of it. What is there may be that one's, so nothing is
        deleted either, in later lives as well, until the cluster takes this one for the newest.
        """
        for tier in self.tiers:
            if not tier.local:
                tier.state, tier.fenced = TierState.DRAINED, outlived
        before = self._configured, self._outlived
        self._configured = [(spec, TierState.DRAINED) for spec, _ in self._configured]
        self._outlived = outlived
        if before != (self._configured, self._outlived):
            try:
                self._save_tiers()
            except VswapError as error:
                # Shared memory is full. The coordinator will say it again.
                self._configured, self._outlived = before
                logger.warning("cannot note that the cluster refused this node", error=str(error))

    # ---------------------------------------------------------------- tiers

    async def configure(self, generation: int, tiers: list[tuple[TierSpec, TierState]]) -> None:
        """Takes the cluster's configuration; returns once it can be acknowledged.

        That is: every write to a tier that takes no more pages has resolved. Stale generations
        are ignored.
        """
        if generation < self.generation:
            return
        for spec, _ in tiers:
            old = self.tiers.find(spec.name)
            if old is not None and old.local:
                raise AlreadyExists(
                    f"tier {spec.name!r} of the cluster has the name of one of this node's own",
                    name=spec.name,
                )
        self.generation, self._outlived = generation, False
        for tier in self.tiers:
            tier.fenced = False
        wanted = {spec.name: (spec, state) for spec, state in tiers}
        for tier in [tier for tier in self.tiers if not tier.local]:
            if tier.name in wanted and not _replaced(tier, wanted[tier.name][0]):
                continue
            # What still lies in a removed tier stays readable, also over a restart.
            tier.state = TierState.DRAINED
            if tier.segments or tier.writing:
                tiers = [*tiers, (tier.spec, tier.state)]
                continue
            self.tiers.remove(tier)
            del self._tags[tier.name]
            self._meters.pop(tier.name, None)
            self.upkeep.forget(tier)
            if tier in self._tending:
                self._tending[tier].cancel()
            if not tier.tried.done():
                # It may never have got as far.
                tier.tried.set_result(None)
            if self._seams.faults is not None:
                self._seams.faults.forget(tier.name)
            await tier.backend.close()
        added = []
        for spec, state in tiers:
            old = self.tiers.find(spec.name)
            if old is None:
                added.append(self._add_tier(spec, state, local=False))
            else:
                await self._replace_servers(old, spec)
                old.spec, old.state = spec, state
        self.tiers.sort()
        self._configured = tiers
        self._save_tiers()
        await asyncio.gather(*(self._tend(tier, self._open_backend) for tier in added))
        for tier in self.tiers:
            while tier.state is not TierState.ACTIVE and tier.writing:
                await asyncio.sleep(0.005)

    async def _replace_servers(self, tier: Tier, spec: TierSpec) -> None:
        """Takes up servers that are now in the place of others; their audit finds them empty."""
        backend = tier.redundant
        if backend is None or len(tier.spec.servers) != len(spec.servers):
            return
        for place, member in enumerate(spec.members()):
            if member.url == tier.spec.servers[place]:
                continue
            try:
                other = self._seams.make_backend(member)
            except BadConfig as error:
                other = Unmade(spec.name, str(error))
            if self._seams.faults is not None:
                other = self._seams.faults.wrap_server(spec.name, place, other)
            old = backend.members[place].backend
            backend.replace(place, member.safe_url, other)
            self.upkeep.replaced(backend, place)
            await old.close()

    def _add_tier(self, spec: TierSpec, state: TierState, *, local: bool) -> Tier:
        tag = self._tags.get(spec.name)
        if tag is None:
            tag = self.tiers.free_tag(set(self._tags.values()))
            self._tags[spec.name] = tag
            self.handles.granted[tag] = 0
            self._save_tiers()
        try:
            backend = self._make_backend(spec, tag)
        except BadConfig as error:
            # The operator of this node sees its own tiers refused. One of the cluster's must not
            # keep the node from the rest of a configuration.
            if local:
                raise
            backend = Unmade(spec.name, str(error))
        tier = Tier(
            spec, tag, backend, self.handles, local=local,
            clock=self._seams.clock, rng=self._seams.rng,
        )  # fmt: skip
        tier.state = state
        tier.fenced = self._outlived and not local
        tier.on_pressure = self.reclaim.poke
        log: RamLog | SegmentLog
        if tier.ram is not None:
            log = RamLog(tier, tier.ram, self.handles, self.reaper)
        else:
            log = SegmentLog(tier, self.handles, self.reaper)
        self.tiers.add(tier, log)
        return tier

    def _make_backend(self, spec: TierSpec, tag: int) -> Any:
        if spec.scheme != "ram":
            seams = self._seams
            backend = seams.make_backend(spec)
            if seams.faults is not None:
                backend = seams.faults.wrap(spec.name, backend)
            if not spec.urls:
                # Several servers are each left alone by themselves.
                backend = Guarded(backend, seams.clock, seams.rng)
            metered = self._meters[spec.name] = Metered(backend)
            return metered
        arena = self._make_arena(spec, tag, spec.capacity_bytes)
        self._region.on_full.append(arena.shrink)
        return arena

    def _make_arena(self, spec: TierSpec, tag: int, capacity: int) -> RamBackend:
        name = f"tier-{tag}.arena"
        rows = self.handles.rows[np.flatnonzero(self.handles.live_records)]
        blocks = rows["block"][rows["tag"] == tag]
        if not blocks.size:
            # Of whatever capacity it was: a first start that failed may have left one.
            return RamBackend(self._region.create(name, capacity), capacity)
        if not self._region.exists(name):
            raise StateInvalid(
                f"{name}, with the pages of tier {spec.name}, is missing; --fresh starts empty"
            )
        old = self._region.size(name)
        if old - mmap.PAGESIZE >= capacity or block_size(old) != block_size(capacity):
            # Rows name their blocks by number, which would now mean other bytes.
            raise StateInvalid(
                f"tier {spec.name} has pages in an arena of {old} bytes, which cannot become one "
                f"of {capacity}: set capacity_bytes back, or start with --fresh and lose the pages",
                tier=spec.name,
            )
        if (int(blocks.max()) + 1) * block_size(old) > old:
            raise StateInvalid(f"{name} is shorter than what lies in it; --fresh starts empty")
        return RamBackend(self._region.open(name, capacity, grow=True), capacity)

    async def _open_backend(self, tier: Tier) -> VswapError | None:
        known = tier.error
        try:
            if isinstance(tier.backend, Unmade):
                tier.backend = self._make_backend(tier.spec, tier.tag)
            await tier.backend.open()
        except VswapError as error:
            tier.failed(error)
            if tier.error != known:
                logger.warning("tier cannot be opened", tier=tier.name, error=tier.error)
            return error
        tier.opened = True
        tier.succeeded()
        self.upkeep.adopt(tier)
        return None

    def _save_tiers(self) -> None:
        """Before a tag is used it is on file: an entry must never outlive its meaning."""
        state = {
            "version": TIERS_VERSION,
            "tags": self._tags,
            "generation": self.generation,
            "outlived": self._outlived,
            "tiers": [
                {"spec": spec.model_dump(), "state": int(state)} for spec, state in self._configured
            ],
        }
        replace_json(self._directory / TIERS_FILE, state)

    def _load_tiers(self) -> None:
        path = self._directory / TIERS_FILE
        state: dict[str, Any] = load_json(path, TIERS_VERSION)
        try:
            self._tags = {str(name): int(tag) for name, tag in state["tags"].items()}
            self.generation = int(state["generation"])
            self._outlived = bool(state.get("outlived"))
            self._configured = [
                (TierSpec(**item["spec"]), TierState(item["state"])) for item in state["tiers"]
            ]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise StateInvalid(f"{path} is damaged: {error}", path=str(path)) from error

    @property
    def faults(self) -> dict[str, str] | None:
        """Fault plans in force, by tier; None where there can be none."""
        return None if self._seams.faults is None else dict(self._seams.faults.plans)

    def set_fault(self, name: str, plan: str) -> str:
        """Makes a tier, or ``tier/2``, a server of it, misbehave, or no longer ("off"); returns the
        plan before, "" for none.

        Raises Refused, UnknownTier, BadConfig.
        """
        if self._seams.faults is None:
            raise Refused("this node was not started with --allow-faults")
        tier_name, server = split(name)
        tier = self.tiers.get(tier_name)
        if tier.ram is not None:
            raise Refused(f"tier {name} is RAM, which cannot be made to misbehave", tier=name)
        servers = len(tier.redundant.members) if tier.redundant is not None else 0
        if server > servers:
            raise Refused(f"{name}: tier {tier_name} has {servers or 'no'} servers to choose from")
        return self._seams.faults.set(name, plan)

    # ---------------------------------------------------------------- grants

    def set_grant(self, tier: str, total_bytes: int) -> None:
        """The coordinator's word on how many bytes the node may hold in a cluster tier."""
        found = self.tiers.find(tier)
        if found is not None and not found.local:
            self._grants.set(found, total_bytes)

    def grants(self) -> dict[str, int]:
        return {tier.name: tier.limit_bytes for tier in self.tiers if not tier.local}

    def connect_grants(self, wanted: Callable[[str, int], None] | None) -> None:
        """Hands in what sends a grant request; None while the coordinator is away."""
        self._grants.connect(wanted)

    # ---------------------------------------------------------------- spaces

    async def delete_space(self, name: str) -> int:
        """Frees all pages of a space and forgets it; returns how many there were."""
        space = self.spaces.get(name)
        self.spaces.hide(space)
        freed = await self.pager.clear(space)
        self.spaces.remove(space)
        return freed

    # ---------------------------------------------------------------- background

    async def _housekeeping(self) -> None:
        """Reopens tiers that were unreachable, watches the pressure, checks and sweeps tiers now
        and then."""
        clock = self._seams.clock
        check_at = clock() + _CHECK_S
        cool_at = clock() + _COOL_S
        sweep_at = clock() + _SWEEP_S * self._seams.rng.uniform(0.5, 1.0)
        while True:
            await asyncio.sleep(_TICK_S)
            self.reclaim.poke()
            for tier in self.tiers:
                if not tier.opened and not tier.sick_for_s:
                    self._tend(tier, self._open_backend)
                self._regrow(tier)
                self.upkeep.watch(tier)
                due = tier.sweep_due or (tier.suspect and not tier.redundant)
                if tier.opened and due and not tier.sick_for_s:
                    self._tend(tier, self._sweep_quietly)
                if tier.local:
                    self.reclaim.mend(tier, self.upkeep.repairable(tier))
                self._grants.ahead(tier)
                self._grants.give_back(tier)
            self._watch_pressure()
            if clock() >= cool_at:
                cool_at = clock() + _COOL_S
                for tier in self.tiers:
                    while tier.ram is not None and tier.ram.cool(_COOL_BLOCKS):
                        await asyncio.sleep(0)
            if clock() >= check_at:
                check_at = clock() + _CHECK_S
                for tier in self.tiers:
                    if tier.opened:
                        self._tend(tier, self._check_fit)
            if clock() >= sweep_at:
                sweep_at = clock() + _SWEEP_S
                for tier in self.tiers:
                    tier.sweep_due = True
                    if tier.opened:
                        self.upkeep.suspect(tier)

    def _tend(
        self, tier: Tier, work: Callable[[Tier], Coroutine[Any, Any, Any]]
    ) -> asyncio.Task[Any]:
        """Starts work on a tier, unless some is under way; the task of what is."""
        task = self._tending.get(tier)
        if task is None:
            task = self._tending[tier] = asyncio.create_task(work(tier))
            task.add_done_callback(partial(self._tended, tier))
        return task

    def _tended(self, tier: Tier, task: asyncio.Task[Any]) -> None:
        del self._tending[tier]
        if not tier.tried.done():
            tier.tried.set_result(None)
        if not task.cancelled() and task.exception() is not None:
            logger.error("tending a tier failed unexpectedly", exc_info=task.exception())

    def _regrow(self, tier: Tier) -> None:
        """Gives a RAM tier its capacity back that found shared memory full some time ago."""
        if tier.ram is None or tier.limit_bytes >= tier.spec.capacity_bytes:
            return
        if self._region.free_bytes() > 4 * tier.ram.block_bytes + tier.reserve_bytes:
            tier.limit_bytes, tier.error = tier.spec.capacity_bytes, ""
            tier.room_changed.set()

    async def sweep(self, tier: Tier) -> None:
        """Deletes what the shard left on a tier without knowing. Raises what the backend says."""
        swept = await self._sweeper.sweep(tier)
        if swept:
            logger.info("swept segments that nothing knew", tier=tier.name, segments=swept)

    async def _sweep_quietly(self, tier: Tier) -> None:
        tier.suspect = tier.sweep_due = False
        try:
            await self.sweep(tier)
        except VswapError as error:
            tier.failed(error)
            logger.warning("sweep failed", tier=tier.name, error=str(error))

    async def _check_fit(self, tier: Tier) -> None:
        """What a server holds that somebody made unfit stays readable; nothing is added to it."""
        unfit = ""
        try:
            await tier.backend.check()
        except BackendRefused as error:
            unfit = error.message
        except VswapError:
            # Whoever needs it notices.
            return
        if unfit == tier.unfit:
            return
        tier.unfit = unfit
        tier.succeeded()
        said = "tier takes no more pages" if unfit else "tier is fit again"
        logger.warning(said, tier=tier.name, error=unfit)
        # What it lost by that, a listing tells.
        tier.suspect = True
        self.upkeep.suspect(tier)

    def _watch_pressure(self) -> None:
        free, total = self.usable()
        used = 1.0 - free / total if total else 0.0
        level = sum(used >= bound for bound in _PRESSURE)
        for passed in range(self._pressure_level, level):
            name = f"usable_{round(_PRESSURE[passed] * 100)}"
            self.events[name] += 1
            for space in self.spaces:
                space.events[name] += 1
            logger.warning("backing fills up", used=round(used, 3), free_bytes=free)
        self._pressure_level = level

    async def check(self, seen: Checked, *, deep: bool = False) -> Checked:
        """See :meth:`Checker.check`."""
        return await self._checker.check(seen, deep=deep)

    # ---------------------------------------------------------------- telling

    def usage(self) -> list[report.TierUsage]:
        return [
            report.tier_usage(tier, self.ledger, self.reaper, self.upkeep) for tier in self.tiers
        ]

    def ages(self) -> list[report.AgeBucket]:
        return report.ages(self.tiers, self.handles, self._seams.clock())

    def usable(self) -> tuple[int, int]:
        return report.usable(self.tiers, self.ledger)

    @property
    def pages(self) -> int:
        return int(self.ledger.pages_by_tag.sum())

    @property
    def fill_pages(self) -> int:
        return int(self.ledger.pages_by_tag[1])

    @property
    def places(self) -> list[str]:
        """Names by tag, for :meth:`Pager.locate`."""
        names = [""] * 16
        names[0], names[1], names[15] = "free", "fill", "poisoned"
        for tier in self.tiers:
            names[tier.tag] = tier.name
        return names

    def counters(self) -> dict[str, int]:
        parts = (
            self.pager.counters, self.evacuator.counters, self.reclaim.counters,
            self.promoter.counters, self.scrubber.progress(), self.events,
        )  # fmt: skip
        total: Counter[str] = Counter()
        for part in parts:
            total.update(part)
        for name, metered in self._meters.items():
            total.update(metered.meter.flat(name))
        if self._seams.faults is not None:
            total.update(self._seams.faults.counters())
        for counters in self.frontends:
            total.update(counters)
        total["swept_segments"] = self._sweeper.swept
        total["pinned_segments"] = int(np.count_nonzero(self.handles.pins))
        return dict(total)

    def table_bytes(self) -> int:
        """Shared memory that the swap tables take."""
        return sum(space.table.allocated_bytes for space in self.spaces)


def _replaced(tier: Tier, spec: TierSpec) -> bool:
    """Whether the spec is another tier under the name of an empty one: removed and added again
    while this node did not look."""
    same = tier.spec.model_copy(
        update=spec.model_dump(include={"capacity_bytes", "rank", "high", "low"})
    )
    return same != spec and not tier.segments and not tier.writing


async def _for_ever(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Runs a background loop; a defect in it is logged and does not end it."""
    while True:
        try:
            await work()
        except Exception:
            logger.exception("a background task failed; it starts again", task=work.__qualname__)
            await asyncio.sleep(_TICK_S)
