"""A cluster drawn from a seed: how many nodes, which tiers, how bad the servers and the network."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from sim.history import History, Wrong
from sim.loop import Process, VirtualLoop
from sim.machines import MIB, Coordinator, Machine, Node
from sim.net import Net
from sim.storage import Faults, Server, SimBackend

from vswap.coordinator.balance import Policy
from vswap.node import entry
from vswap.node.shard import Shard
from vswap.node.spaces import Limits, Space
from vswap.node.tier import Tier
from vswap.tiers.backend import Backend
from vswap.tiers.factory import make_redundant
from vswap.tiers.record import U64
from vswap.tiers.spec import TierSpec

KIB = 1024
CLUSTER_TIERS = ("near", "far", "deep")
SEGMENT_BYTES = 48 * KIB


@dataclass(frozen=True, slots=True)
class Scenario:
    """What the seed says of a run. Everything that happens in it is drawn as it goes."""

    nodes: int
    cluster_tiers: int
    local_disk: bool
    ram_codec: str
    second_ram: bool
    memory: bool
    """Pages may lie in RAM; else they go straight to slower tiers."""
    slots: int
    clients: int
    disk_clients: int
    """Of each node's block device."""
    busy_s: float
    storms: float
    """How much of everything bad: 0 = none, 1 = a lot."""
    crashes: float
    """Kills, pauses and partitions a second."""
    forgetful: bool
    """A server loses what it had acknowledged, once."""
    retires: bool
    """A node dies for good, and is forgotten."""
    leaves: bool
    """A node is emptied, and leaves for good."""
    jobs: float
    """Operator's commands a second."""

    @classmethod
    def draw(cls, rng: random.Random) -> Scenario:
        return cls(
            nodes=rng.choice((1, 1, 2)),
            cluster_tiers=rng.choice((1, 2, 2, 3)),
            local_disk=rng.random() < 0.4,
            ram_codec=rng.choice(("none", "none", "zstd:1", "lz4")),
            second_ram=rng.random() < 0.25,
            memory=rng.random() < 0.7,
            slots=rng.choice((24, 24, 150, 350)),
            clients=rng.choice((1, 2, 3)),
            disk_clients=rng.choice((0, 1, 1, 2)),
            busy_s=rng.uniform(4, 10),
            storms=rng.choice((0, 0.3, 1, 1)),
            crashes=rng.choice((0, 0.15, 0.4)),
            forgetful=rng.random() < 0.25,
            retires=rng.random() < 0.2,
            leaves=rng.random() < 0.2,
            jobs=rng.choice((0, 0.2, 0.5)),
        )

    def __str__(self) -> str:
        return ", ".join(f"{f.name} {getattr(self, f.name)}" for f in fields(self))


class World:
    """All there is. Made within the loop."""

    def __init__(self, loop: VirtualLoop, rng: random.Random, root: Path) -> None:
        self.loop = loop
        self.rng = rng
        self.scenario = Scenario.draw(rng)
        self.net = Net(loop, random.Random(rng.getrandbits(64)))
        self.people = Process.current()
        """Clients and operators: they do not die."""
        self.servers: dict[str, Server] = {}
        wanted = self.scenario
        specs = [self._cluster_tier(name) for name in CLUSTER_TIERS[: wanted.cluster_tiers]]
        self.specs = {spec.name: spec for spec in specs}
        self.coordinator = Coordinator(
            root, self.net, seed=rng.getrandbits(64), tiers=specs, make_backend=self._backend,
            policy=Policy(compact_min_garbage_bytes=256 * KIB),
        )  # fmt: skip
        self.nodes = [
            Node(
                f"n{i}", root, self.net, seed=rng.getrandbits(64), tiers=self._local_tiers(f"n{i}"),
                make_backend=self._backend, coordinator=self.coordinator,
                limits=self.limits,
            )
            for i in range(wanted.nodes)
        ]  # fmt: skip
        self.histories = {node.name: History(node.name) for node in self.nodes}
        self.disks = {node.name: History(f"the disk of {node.name}") for node in self.nodes}
        self.abandoned: set[Server] = set()
        """Servers that may keep what nobody will ever look for: they were given up, or replaced."""
        for node in self.nodes:
            node.on_open = self._watch

    @property
    def members(self) -> list[Node]:
        """Nodes that have not died for good."""
        return [node for node in self.nodes if not node.retired]

    @property
    def machines(self) -> list[Machine]:
        return [self.coordinator, *self.members]

    def _cluster_tier(self, name: str) -> TierSpec:
        rng = self.rng
        redundancy = rng.choice(("none", "none", "none", "mirror:2", "rs:2+1"))
        count = {"mirror:2": 2, "rs:2+1": 3}.get(redundancy, 0)
        return TierSpec(
            name=name, url="" if count else f"redis://{name}", redundancy=redundancy,
            urls=tuple(f"redis://{name}-{place}" for place in range(count)),
            rank=10 + CLUSTER_TIERS.index(name),
            codec=rng.choice(("zstd:1", "none", "lz4")),
            capacity_bytes=rng.choice((1, 2, 8)) * MIB * self.scenario.nodes,
            verify_writes=rng.random() < 0.4, timeout_s=rng.choice((0.5, 2.0)),
        )  # fmt: skip

    def _local_tiers(self, node: str) -> list[TierSpec]:
        wanted, rng = self.scenario, self.rng
        tiers = [
            TierSpec(
                name="ram", url="ram://", codec=wanted.ram_codec, rank=0,
                capacity_bytes=rng.choice((4, 6)) * MIB // 4,
            )
        ]  # fmt: skip
        if wanted.second_ram:
            tiers.append(
                TierSpec(name="zram", url="ram://", codec="zstd:1", rank=1, capacity_bytes=MIB)
            )
        if wanted.local_disk:
            tiers.append(
                TierSpec(
                    name="disk", url=f"file:///{node}", codec="zstd:1", rank=rng.choice((5, 50)),
                    capacity_bytes=rng.choice((1, 4)) * MIB, timeout_s=2.0,
                )
            )  # fmt: skip
        return tiers

    @property
    def limits(self) -> Limits:
        return Limits(tiers=() if self.scenario.memory else ("disk", *CLUSTER_TIERS))

    def _backend(self, spec: TierSpec) -> Backend:
        if spec.redundant:
            return make_redundant(spec, self._backend)
        return SimBackend(spec, self.server(spec.url), SEGMENT_BYTES)

    def server(self, url: str) -> Server:
        name = url.partition("://")[2].strip("/") + ("-disk" if url.startswith("file") else "")
        if name not in self.servers:
            self.servers[name] = Server(name, self.net, random.Random(self.rng.getrandbits(64)))
        return self.servers[name]

    def abandon(self, tier: str) -> None:
        """From now on servers of that tier may be given up with what lies on them."""
        prefixes = f"{tier}-", f"{tier} "
        self.abandoned |= {s for n, s in self.servers.items() if f"{n} ".startswith(prefixes)}

    # ---------------------------------------------------------------- what may be lost

    def parts(self, tier: Tier, handle: int) -> list[bool]:
        """Which servers of the tier have their part of a segment."""
        key = tier.segment_name(handle).key
        return [self.server(url).has(key) for url in tier.spec.servers]

    def gone(self, shard: Shard, word: int) -> bool:
        """Whether no server, up or down, can ever give the page of an entry again."""
        tag = word >> int(entry.TAG_SHIFT)
        if tag == entry.POISON:
            return True  # :meth:`_watch` saw how it came to that.
        if not entry.FIRST_TIER <= tag <= entry.LAST_TIER:
            return False
        tier = shard.tiers.by_tag(tag)
        [handle] = entry.handles(np.array([word], np.uint64)).tolist()
        return tier.ram is None and sum(self.parts(tier, handle)) < tier.backend.stripes

    def judge_lost(self, shard: Shard, slots: U64, *words: U64) -> None:
        """Raises Wrong unless each slot's page is gone, going by one of the entries it had."""
        for slot, *had in zip(slots.tolist(), *(w.tolist() for w in words), strict=True):
            if not any(self.gone(shard, word) for word in had):
                told = ", ".join(f"{word:#x}" for word in had)
                raise Wrong(f"slot {slot} counts as lost, and is there (entry {told})")

    def _watch(self, shard: Shard) -> None:
        """Pages are given up, or set aside as damaged, only where no good copy exists."""

        def changed(space: Space, slots: U64, old: U64, words: U64) -> None:
            bad = (entry.tags(words) == entry.POISON) & (entry.tags(old) != entry.POISON)
            try:
                self.judge_lost(shard, slots[bad], old[bad])
            except Wrong as wrong:
                self.loop.unexpected.append(f"given up: {wrong}")

        shard.ledger.watchers.append(changed)

    # ---------------------------------------------------------------- weather

    def storm(self) -> None:
        """Draws how bad each server and the network are from now on."""
        worst = self.scenario.storms
        for server in self.servers.values():
            server.faults = self._faults(worst if self.rng.random() < 0.6 else 0)
        self.net.weather.loss = 0.1 * worst * self.rng.random()
        self.net.weather.slow = 0.1 * worst * self.rng.random()

    def _faults(self, worst: float) -> Faults:
        most = {
            "error": 0.3, "lost": 0.2, "late": 0.1, "slow": 0.2, "flip": 0.1, "stale": 0.3,
            "torn": 0.15,
        }  # fmt: skip
        return Faults(**{
            fault: probability * worst * self.rng.random() if self.rng.random() < 0.5 else 0.0
            for fault, probability in most.items()
        })  # fmt: skip

    def calm(self) -> None:
        """Nothing bad happens from now on. What was late is still late."""
        for server in self.servers.values():
            server.faults, server.up = Faults(), True
        self.net.weather.loss = self.net.weather.slow = 0.0
        self.net.mend_all()
        for machine in self.machines:
            if machine.up is not None:
                if machine.up.fuse is not None:
                    machine.kill()
                elif machine.up.paused:
                    self.loop.resume(machine.up)
            if machine.up is None:
                machine.start()


async def until(condition: object, timeout_s: float, step_s: float = 0.05) -> bool:
    """Waits for a condition (a callable) in virtual time."""
    assert callable(condition)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while not condition():
        if loop.time() > deadline:
            return False
        await asyncio.sleep(step_s)
    return True
