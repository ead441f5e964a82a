"""What must be true: at every moment, and once all is quiet."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial

import numpy as np
from sim.disk import PAGES, DiskClient
from sim.history import History, Wrong
from sim.life import Client
from sim.machines import Node
from sim.storage import LATEST_S
from sim.world import World, until

from vswap.coordinator.room import cluster_room
from vswap.coordinator.state import Job, JobState, MoveKind, State, TierState
from vswap.node import entry
from vswap.node.handles import SEALED
from vswap.node.shard import Shard
from vswap.node.tier import Tier
from vswap.tiers.backend import prefix

_QUIET_S = 120.0
_JOBS_S = 120.0
_LEAVE_S = 120.0


def check_now(world: World) -> None:
    """Between any two turns."""
    for machine in world.members:
        if machine.failed:
            raise Wrong(machine.failed)
        if machine.ready is not None:
            _books(machine.name, machine.ready)
    if world.coordinator.failed:
        raise Wrong(world.coordinator.failed)
    for server in world.servers.values():
        if server.misused:
            raise Wrong(server.misused[0])
    _grants(world)
    if world.loop.unexpected:
        raise Wrong(world.loop.unexpected[0])


def _books(name: str, shard: Shard) -> None:
    """The accounts against a recount of the table."""
    counted = np.zeros(len(shard.handles.live_records), np.int64)
    for space in shard.spaces:
        words = space.table.get(np.arange(space.max_slots, dtype=np.uint64))
        tags = entry.tags(words)
        pages = np.bincount(tags, minlength=16)
        if not np.array_equal(pages[1:], space.pages_by_tag[1:]):
            raise Wrong(f"{name}: pages by tier are {space.pages_by_tag}, counted {pages}")
        in_tier = (tags >= entry.FIRST_TIER) & (tags <= entry.LAST_TIER)
        counted += np.bincount(entry.handles(words[in_tier]), minlength=len(counted))
    if not np.array_equal(counted, shard.handles.live_records):
        raise Wrong(f"{name}: live records of segments are not what the table says")
    if (shard.handles.pins < 0).any():
        raise Wrong(f"{name}: a segment was unpinned twice")
    for tier in shard.tiers:
        stored = int(shard.handles.rows["stored"][list(tier.segments)].sum())
        if stored != tier.stored_bytes:
            raise Wrong(f"{name}: tier {tier.name} charges {tier.stored_bytes}, stores {stored}")


def _grants(world: World) -> None:
    """What nodes believe they may hold in a tier of the cluster never exceeds it."""
    held: Counter[str] = Counter()
    for node in world.members:
        if node.ready is not None:
            held.update(node.ready.grants())
    for name, total in held.items():
        if total > world.specs[name].capacity_bytes:
            raise Wrong(f"tier {name}: {total} bytes granted of {world.specs[name].capacity_bytes}")


async def check_at_rest(
    world: World, leaving: asyncio.Task[None] | None, bury: Callable[[], Awaitable[None]]
) -> None:
    """After everything was mended: nothing lost, nothing left over, nobody stuck. ``leaving`` is
    done when a node has left that is to leave, ``bury`` forgets those that died for good."""
    world.calm()
    if leaving is not None and not await until(leaving.done, _LEAVE_S):
        raise Wrong("a node cannot leave")
    if not await until(lambda: _all_up(world), 60.0):
        raise Wrong("not everybody came back: " + "; ".join(_down(world)))
    await asyncio.sleep(LATEST_S + 3.0)  # What was late has come.
    if len(world.members) < len(world.nodes):
        await bury()
        await _swept(world)
    await _jobs_end(world)
    if not await until(lambda: all(_settled(n.ready) for n in world.members), _QUIET_S):
        raise Wrong("; ".join(f"{n.name}: {_unsettled(n.ready)}" for n in world.members))
    for node in world.members:
        await _all_pages(world, Client(world, node, 0))
        await _whole_disk(world, DiskClient(world, node, 0))
    for node in world.members:
        assert node.up is not None
        await world.net.call(node.up, partial(_sweep, node), timeout_s=60.0)
    if not await until(lambda: all(_settled(n.ready) for n in world.members), _QUIET_S):
        raise Wrong("; ".join(f"{n.name}: {_unsettled(n.ready)}" for n in world.members))
    check_now(world)
    await asyncio.sleep(3.0)  # Servers that came back empty unseen have been asked who they are.
    _lacks_are_known(world)
    _nothing_left_over(world)


async def _sweep(node: Node) -> None:
    assert node.shard is not None
    for tier in node.shard.tiers:
        await node.shard.sweep(tier)


def _all_up(world: World) -> bool:
    for machine in world.machines:
        if machine.up is None:
            machine.start()
    return not _down(world)


def _down(world: World) -> list[str]:
    found = [node.name for node in world.members if node.ready is None or not node.connected]
    if world.coordinator.operator is None:
        found.append("coordinator")
    return found


async def _swept(world: World) -> None:
    """The hourly look at the backends finds what landed after the tombstone was set."""
    runner = world.coordinator.runner
    assert runner is not None
    for name in runner.state.listed_s:
        runner.state.listed_s[name] -= 1e6
    await asyncio.sleep(3.0)
    if not await until(lambda: not runner.state.sweeps, 60.0):
        raise Wrong(f"never swept: {runner.state.sweeps}")


async def _jobs_end(world: World) -> None:
    """Every job comes to its end, unless it can be shown that it cannot."""
    runner = world.coordinator.runner
    assert runner is not None
    if await until(lambda: not runner.state.running(), _JOBS_S):
        return
    for job in runner.state.running():
        if not _cannot_end(world, runner.state, job):
            raise Wrong(f"{job.title} does not end: {job.state.word} {job.reason!r}")


def _cannot_end(world: World, state: State, job: Job) -> bool:
    """Pages of its tier fit nowhere else, or are gone with the servers that forgot them."""
    for node in world.members:
        shard = node.ready
        tier = shard.tiers.find(job.tier) if shard is not None else None
        if shard is None or tier is None:
            continue
        if any(sum(world.parts(tier, h)) < tier.backend.stripes for h in tier.segments):
            return True
        if job.kind is MoveKind.DRAIN and _room_beside(world, state, shard, tier) < int(
            shard.ledger.bytes_by_tag[tier.tag]
        ):
            return True
    return False


def _room_beside(world: World, state: State, shard: Shard, source: Tier) -> int:
    """Bytes that other tiers would take of this one's."""
    room = 0
    for tier in shard.tiers:
        if tier is source or not tier.writable or not world.limits.allows(tier.name):
            continue
        own = tier.room() if tier.local else cluster_room(state, tier.name)
        # A mover does not ask for less than a segment.
        room += own if own >= tier.backend.segment_bytes else 0
    return room


def _settled(shard: Shard | None) -> bool:
    return not _unsettled(shard)


def _unsettled(shard: Shard | None) -> str:
    if shard is None:
        return "down"
    pinned = np.flatnonzero(shard.handles.pins)
    problems = {
        "deletions pending": shard.reaper.pending,
        "writing": sum(tier.writing for tier in shard.tiers),
        "segments pinned": len(pinned),
        "bytes promised": sum(shard.evacuator.promised.values()),
        "servers down": sum(t.redundant.down for t in shard.tiers if t.redundant),
        "tiers unopened": sum(not tier.opened for tier in shard.tiers),
    }
    return ", ".join(f"{count} {what}" for what, count in problems.items() if count)


async def _all_pages(world: World, client: Client) -> None:
    history = world.histories[client.node.name]
    slots = list(range(world.scenario.slots))
    for start in range(0, len(slots), 50):
        if not await client.load(slots[start : start + 50], insist=True):
            raise Wrong(
                f"{client.node.name}: slots from {start} on cannot be loaded: {client.last}"
            )
    _ended_well(history)


async def _whole_disk(world: World, client: DiskClient) -> None:
    for page in range(PAGES):
        if not await client.read(2 * page, 2, insist=True):
            raise Wrong(f"{client.node.name}: its disk cannot be read: {client.last}")
    _ended_well(world.disks[client.node.name])


def _ended_well(history: History) -> None:
    history.check_order()
    for slot, writes in history.writes.items():
        if any(w.ended > history.now() for w in writes):
            raise Wrong(f"{history.where}: slot {slot}: a call never came to its end")


def _lacks_are_known(world: World) -> None:
    """No segment counts as whole that is not."""
    for node in world.members:
        shard = node.ready
        assert shard is not None
        for tier in shard.tiers:
            for handle in tier.segments if tier.redundant is not None else ():
                lacking = int(shard.handles.rows["lacking"][handle])
                for place, there in enumerate(world.parts(tier, handle)):
                    if not there and not lacking >> place & 1:
                        name = tier.segment_name(handle).key
                        raise Wrong(
                            f"{node.name}: server {place} of {tier.name} lacks {name} unseen"
                        )


def _nothing_left_over(world: World) -> None:
    """Each backend lists exactly the segments that the shards know."""
    known: dict[str, set[str]] = {name: set() for name in world.servers}
    spare: set[str] = set()
    known_nodes = {node.name for node in world.members}
    for node in world.members:
        shard = node.ready
        assert shard is not None
        for tier in shard.tiers:
            if tier.ram is not None:
                blocks = tier.ram.blocks - tier.ram.free_blocks
                if blocks != len(tier.segments):
                    raise Wrong(f"{node.name}: {blocks} blocks for {len(tier.segments)} segments")
                continue
            states = shard.handles.states(np.array(list(tier.segments), np.int64))
            if (states != SEALED).any():
                raise Wrong(f"{node.name}: segments of {tier.name} in states {set(states)}")
            names = {tier.segment_name(handle).key for handle in tier.segments}
            for url in tier.spec.servers:
                known[world.server(url).process.name] |= names
            if tier.spec.redundant:
                # A server may lack what is still to be repaired.
                spare |= {world.server(url).process.name for url in tier.spec.servers}
    for name, server in world.servers.items():
        listed = {key for key in server.segments if key.startswith(prefix())}
        if server.foreign not in listed:
            raise Wrong(f"{name}: another cluster's segment was deleted")
        listed.remove(server.foreign)
        if world.scenario.forgetful or name in spare:
            known[name] &= listed
        if name.endswith("-disk") and name.removesuffix("-disk") not in known_nodes:
            continue
        if server in world.abandoned:
            continue
        if listed != known[name]:
            raise Wrong(
                f"{name} has {len(listed - known[name])} segments that nobody knows, "
                f"and lacks {len(known[name] - listed)}"
            )
    runner = world.coordinator.runner
    assert runner is not None
    for job in runner.state.jobs.values():
        if job.kind is MoveKind.DRAIN and job.state is JobState.DONE:
            record = runner.state.tiers.get(job.tier)
            if record is not None and record.state is TierState.DRAINED:
                left = {world.server(url).process.name for url in record.spec.servers}
                if any(known[name] for name in left):
                    raise Wrong(f"{job.tier} was drained, and has segments")
