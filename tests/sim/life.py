"""What goes on in a cluster: clients at work, an operator at his commands, and misfortune."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from sim.history import History, Wrong, pages, version_of
from sim.loop import Process
from sim.machines import SPACE, Machine, Node
from sim.world import World

from vswap.node.scrub import Scrubbed
from vswap.node.shard import Shard
from vswap.node.spaces import Space
from vswap.tiers.record import U64
from vswap.v1 import coordinator_pb2 as pb
from vswap.wire.errors import (
    OutcomeUnknown,
    OutOfTiers,
    PageCorrupt,
    PageLost,
    SlotNotFound,
    SpaceFull,
    StaleIncarnation,
    TierUnavailable,
    UnknownNode,
    Unreachable,
    VswapError,
)

_NOTHING = (OutOfTiers, SpaceFull, TierUnavailable, Unreachable)
"""Errors of a write that say that nothing happened."""
ATTEMPTS = 4


class Client:
    """Stores, loads and frees slots of one node's space, alone with others on the same slots."""

    space = SPACE

    def __init__(self, world: World, node: Node, seed: int) -> None:
        self._world = world
        self.node = node
        self._rng = random.Random(seed)
        self._history: History = world.histories[node.name]
        self._until = 0.0
        self._same: list[int] = []
        self.task: asyncio.Task[None] | None = None
        self.last: VswapError | None = None
        """Why the last load came to nothing."""

    async def run(self) -> None:
        while self._world.loop.time() < self._until:
            await self._act()
            await asyncio.sleep(self._rng.expovariate(8))

    def begin(self, until_s: float) -> None:
        self._until = until_s
        self.task = self._world.loop.start(self._world.people, self.run())

    def _slots(self) -> list[int]:
        rng, most = self._rng, self._world.scenario.slots
        if self._same and rng.random() < 0.4:
            # What is stored again in the same order makes segments that look alike.
            return self._same
        count = min(rng.choice((1, 2, 8, 8, 32, 100)), most)
        first = rng.randrange(most)
        if rng.random() < 0.3:
            self._same = sorted(rng.sample(range(most), count))
        else:
            self._same = [(first + i) % most for i in range(count)]
        return self._same

    async def _act(self) -> None:
        act = self._rng.choices(
            (self.store, self.load, self.free, self.load_exclusive), (10, 8, 2, 2)
        )[0]
        await act(self._slots())

    # ---------------------------------------------------------------- calls

    async def _call(
        self, work: Callable[[Shard], Awaitable[Any]], settled: Callable[[], None]
    ) -> Any:
        shard, process = self.node.ready, self.node.up
        if shard is None or process is None:
            settled()
            raise Unreachable("the node is down")
        return await self._world.net.call(
            process, lambda: work(shard), timeout_s=self._rng.choice((1.0, 4.0, 12.0)),
            on_settled=settled,
        )  # fmt: skip

    async def _again(self, attempt: Callable[[], Awaitable[bool]]) -> None:
        """Until it worked, or patience ends."""
        for i in range(ATTEMPTS):
            if await attempt():
                return
            await asyncio.sleep(0.1 * 2**i * self._rng.random())

    async def store(self, slots: list[int]) -> None:
        where = np.array(slots, np.uint64)

        async def attempt() -> bool:
            write = self._history.begin_store(slots)
            content = pages(slots, write.version)

            async def work(shard: Shard) -> None:
                self._history.admit(write)
                await shard.pager.store(shard.spaces.get(SPACE), where, content)

            try:
                await self._call(work, lambda: self._history.settle(write))
            except _NOTHING:
                self._history.refuse(write)
                return False
            except OutcomeUnknown:
                return False
            self._history.acknowledge(write)
            return True

        await self._again(attempt)

    async def free(self, slots: list[int]) -> None:
        where = np.array(slots, np.uint64)

        async def attempt() -> bool:
            write = self._history.begin_free(slots)
            try:
                await self._call(
                    lambda shard: shard.pager.free(shard.spaces.get(SPACE), where),
                    lambda: self._history.settle(write),
                )
            except _NOTHING:
                self._history.refuse(write)
                return False
            except OutcomeUnknown:
                return False
            self._history.acknowledge(write)
            return True

        await self._again(attempt)

    async def clear(self) -> None:
        """Frees everything."""
        await self.free([*range(self._world.scenario.slots)])

    def _saw(self, slots: list[int], got: Any, begun: int) -> None:
        for slot, content in zip(slots, got, strict=True):
            self._history.saw(slot, version_of(slot, content), begun)

    async def _loaded(
        self, shard: Shard, where: U64, load: Callable[[Space, U64], Awaitable[Any]]
    ) -> Any:
        """Over there: a page that counts as lost must be gone in that moment. One that counts as
        damaged, and is gone, is lost too: of what is left some is torn."""
        space = shard.spaces.get(self.space)
        before = space.table.get(where)
        try:
            return await load(space, where)
        except (PageLost, PageCorrupt) as error:
            bad = np.isin(where, np.array(error.fields["slots"], np.uint64))
            try:
                now = space.table.get(where[bad])
                self._world.judge_lost(shard, where[bad], before[bad], now)
            except Wrong:
                if isinstance(error, PageLost):
                    raise
                raise error from None  # Some transfers were bad; the next may be good.
            raise PageLost(error.message, **error.fields) from error

    def _missed(self, error: PageLost, begun: int) -> list[int]:
        slots: list[int] = error.fields["slots"]
        for slot in slots:
            self._history.missed(slot, begun)
        return slots

    async def load(self, slots: list[int], *, insist: bool = False) -> bool:
        """Whether it came to an answer. Those that hold no page are left out."""
        left = slots
        for i in range(40 if insist else ATTEMPTS):
            begun = self._history.now()
            where = np.array(left, np.uint64)
            try:
                got = await self._call(
                    lambda shard, where=where: self._loaded(  # type: ignore[misc]
                        shard, where, shard.pager.load
                    ),
                    lambda: None,
                )
            except SlotNotFound as error:
                missing = error.fields["slots"]
                for slot in missing:
                    self._history.saw(slot, 0, begun)
                left = [slot for slot in left if slot not in missing]
                if not left:
                    return True
            except PageLost as error:
                gone = self._missed(error, begun)
                left = [slot for slot in left if slot not in gone]
                if not left:
                    return True
            except (*_NOTHING, OutcomeUnknown, PageCorrupt) as error:
                self.last = error
                await asyncio.sleep(0.1 * 2 ** min(i, 4) * self._rng.random())
            else:
                self._saw(left, got, begun)
                return True
        return False

    async def load_exclusive(self, slots: list[int]) -> None:
        begun = self._history.now()
        where = np.array(slots, np.uint64)
        try:
            got, token = await self._call(
                lambda shard: self._loaded(shard, where, shard.pager.load_exclusive),
                lambda: None,
            )
        except PageLost as error:
            self._missed(error, begun)
            return
        except VswapError:
            return
        self._saw(slots, got, begun)
        loaded = self._history.now()
        await asyncio.sleep(self._rng.choice((0, 0.01, 1.0)))
        if self._rng.random() < 0.2:
            return

        async def confirm() -> bool:
            # It spares what was stored since, so it is not sure to free any one slot.
            left = self._history.untouched(slots, loaded)
            write = self._history.begin_free(left, whole=False)
            try:
                await self._call(
                    lambda shard: shard.pager.confirm(shard.spaces.get(SPACE), token),
                    lambda: self._history.settle(write),
                )
            except StaleIncarnation:
                self._history.refuse(write)
            except _NOTHING:
                self._history.refuse(write)
                return False
            except OutcomeUnknown:
                return False
            else:
                self._history.acknowledge(write)
            return True

        await self._again(confirm)


class Misfortune:
    """Kills, pauses, partitions, outages and bad weather, as often as the scenario says."""

    def __init__(self, world: World, seed: int) -> None:
        self._world = world
        self._rng = random.Random(seed)

    async def run(self) -> None:
        world, rng = self._world, self._rng
        next_storm = 0.0
        while True:
            await asyncio.sleep(rng.uniform(0.05, 0.6))
            if world.loop.time() >= next_storm:
                next_storm = world.loop.time() + rng.uniform(1, 6)
                world.storm()
            rate = world.scenario.crashes
            if rng.random() < rate:
                rng.choice((self._crash, self._crash, self._pause, self._cut, self._outage))()
            if rng.random() < 0.05:
                world.coordinator.wall_s += rng.choice((-1, 1)) * rng.expovariate(1e-4)

    async def lose(self) -> None:
        """What happens once in a run, if at all."""
        world = self._world
        await asyncio.sleep(self._rng.uniform(1, world.scenario.busy_s))
        if world.scenario.forgetful and world.servers:
            server = self._rng.choice(list(world.servers.values()))
            server.forget()
        if world.scenario.retires and len(world.nodes) > 1:
            node = world.nodes[-1]
            node.kill()
            node.retired = True

    def _later(self, after_s: float, what: Callable[..., object], *args: Any) -> None:
        self._world.net.later(self._world.people, after_s, what, *args)

    def _crash(self) -> None:
        machine = self._rng.choice(self._world.machines)
        if machine.up is None or machine.up.fuse is not None:
            return
        if self._rng.random() < 0.3:
            machine.kill()
        else:
            self._kill_soon(machine)

    def _kill_soon(self, machine: Machine) -> None:
        publishing = self._rng.random() < 0.6
        lines = int(self._rng.expovariate(1 / 60 if publishing else 1 / 300))
        machine.kill_soon(lines, publishing=publishing)

    async def keep_starting(self) -> None:
        """What an init system does."""
        down: dict[str, float] = {}
        while True:
            await asyncio.sleep(0.1)
            now = self._world.loop.time()
            for machine in self._world.machines:
                if machine.up is not None:
                    continue
                at = down.setdefault(machine.name, now + self._rng.choice((0, 0.5, 5)))
                if now >= at:
                    del down[machine.name]
                    machine.start()
                    if self._rng.random() < 0.2:
                        self._kill_soon(machine)

    def _pause(self) -> None:
        process = self._rng.choice(self._world.machines).up
        if process is not None and not process.paused:
            process.paused = True
            self._later(self._rng.choice((0.05, 1, 8)), self._go_on, process)

    def _go_on(self, process: Process) -> None:
        if process.alive and process.paused:
            self._world.loop.resume(process)

    def _cut(self) -> None:
        world, rng = self._world, self._rng
        node = rng.choice(world.nodes).name
        other = rng.choice(["coordinator", "people", *world.servers])
        if rng.random() < 0.2:
            node, other = "coordinator", rng.choice(list(world.servers))
        world.net.cut(node, other)
        self._later(rng.choice((0.2, 3, 20)), world.net.mend, node, other)

    def _outage(self) -> None:
        server = self._rng.choice(list(self._world.servers.values()))
        server.up = False

        def again() -> None:
            server.up = True

        self._later(self._rng.choice((0.2, 3, 10)), again)


class Operator:
    """Drains, migrates, compacts, cancels, activates, adds, removes, replaces servers, scrubs."""

    def __init__(self, world: World, seed: int) -> None:
        self._world = world
        self._rng = random.Random(seed)
        self.commands = self.accepted = self._replaced = 0

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._rng.expovariate(max(self._world.scenario.jobs, 1e-3)))
            command = self._rng.choice(
                (self._drain, self._drain, self._migrate, self._compact, self._cancel,
                 self._activate, self._remove, self._add, self._give_up, self._replace, self._scrub)
            )  # fmt: skip
            self.commands += 1
            try:
                await command()
                self.accepted += 1
            except VswapError:
                continue

    async def dismiss(self, node: Node, clients: list[Client]) -> None:
        """Empties a node that nobody uses any more, and has it leave, however often it takes."""
        while not node.retired:
            await asyncio.sleep(1.0)
            for client in clients:
                await client.clear()
            departure, process = node.departure, node.up
            if departure is None or process is None:
                continue
            try:
                await self._world.net.call(process, departure.leave, timeout_s=30.0)
            except VswapError:
                continue

    async def bury(self) -> None:
        """Forgets the node that died for good, however often it takes."""
        while True:
            await asyncio.sleep(1.0)
            for node in self._world.nodes:
                if not node.retired:
                    continue
                try:
                    await self.ask("ForgetNode", pb.ForgetNodeRequest(node=node.name))
                except UnknownNode:
                    return
                except VswapError:
                    continue

    async def ask(self, method: str, request: Any) -> Any:
        """Calls the operator service, over the network."""
        coordinator = self._world.coordinator
        process, service = coordinator.up, coordinator.operator
        if process is None or service is None:
            raise Unreachable("the coordinator is down")
        call = getattr(type(service), method).__wrapped__
        return await self._world.net.call(
            process, lambda: call(service, request, None), timeout_s=5.0
        )

    def _tier(self) -> str:
        return self._rng.choice(list(self._world.specs))

    async def _start(self, **spec: Any) -> None:
        await self.ask("StartJob", pb.StartJobRequest(spec=pb.JobSpec(**spec)))

    async def _drain(self) -> None:
        rate = self._rng.choice((0, 0, 200_000))
        await self._start(kind=pb.MOVE_KIND_DRAIN, tier=self._tier(), rate_bytes_s=rate)

    async def _give_up(self) -> None:
        """Drains a tier although a server of it may be gone."""
        name = self._tier()
        self._world.abandon(name)
        await self._start(kind=pb.MOVE_KIND_DRAIN, tier=name, lost=True)

    async def _replace(self) -> None:
        name = self._tier()
        tiers = (await self.ask("GetCluster", pb.GetClusterRequest())).tiers
        urls = [url for tier in tiers if tier.tier.spec.name == name for url in tier.tier.spec.urls]
        if urls:
            self._world.abandon(name)
            self._replaced += 1
            request = pb.SetTierRequest(name=name)
            request.replace = self._rng.choice(urls)
            request.replace_by = f"redis://{name}-new-{self._replaced}"
            await self.ask("SetTier", request)

    async def _scrub(self) -> None:
        node = self._rng.choice(self._world.members)
        shard, process = node.ready, node.up
        if shard is None or process is None:
            return
        rate = self._rng.choice((0, 1_000_000))
        seen = await self._world.net.call(
            process, lambda: shard.scrub(rate, Scrubbed()), timeout_s=20.0
        )
        if seen.lost_pages and not any(s.life for s in self._world.servers.values()):
            raise Wrong(f"a scrub of {node.name} found {seen.lost_pages} pages lost")

    async def _migrate(self) -> None:
        await self._start(
            kind=pb.MOVE_KIND_MIGRATE, tier=self._tier(), destination=self._tier(),
            byte_budget=self._rng.choice((0, 300_000)),
        )  # fmt: skip

    async def _compact(self) -> None:
        await self._start(kind=pb.MOVE_KIND_COMPACT, tier=self._tier(), target_utilisation=0.95)

    async def _cancel(self) -> None:
        reply = await self.ask("ListJobs", pb.ListJobsRequest())
        if reply.jobs:
            await self.ask("CancelJob", pb.CancelJobRequest(id=self._rng.choice(reply.jobs).id))

    async def _activate(self) -> None:
        await self.ask("ActivateTier", pb.ActivateTierRequest(name=self._tier()))

    async def _remove(self) -> None:
        name = self._tier()
        await self.ask("RemoveTier", pb.RemoveTierRequest(name=name))
        self._world.coordinator.tiers.pop(name, None)

    async def _add(self) -> None:
        spec = self._world.specs[self._tier()]
        await self.ask("AddTier", pb.AddTierRequest(spec=spec.to_proto()))
        self._world.coordinator.tiers[spec.name] = spec
