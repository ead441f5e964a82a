"""The state as operators see it: the messages of ``coordinator.proto``."""

from __future__ import annotations

from vswap.coordinator import progress, room
from vswap.coordinator.events import Now
from vswap.coordinator.state import Flight, Job, JobState, State, Tier
from vswap.tiers.spec import redacted
from vswap.v1 import common_pb2, coordinator_pb2
from vswap.wire.version import VERSION

_SUMS = (
    "pages",
    "logical_bytes",
    "live_bytes",
    "stored_bytes",
    "segments",
    "limit_bytes",
    "quarantined",
    "deleting",
    "degraded_segments",
    "degraded_bytes",
    "repairable_bytes",
    "lost_pages",
)


def cluster(state: State, now: Now) -> coordinator_pb2.ClusterStatus:
    reserved = room.reservations(state)
    tiers = []
    for tier in state.ranked():
        name = tier.spec.name
        info = coordinator_pb2.TierInfo(
            tier=tier_message(tier),
            granted_bytes=state.held_bytes(name),
            reserved_bytes=sum(taken for (_, where), taken in reserved.items() if where == name),
            usage=usage(state, tier),
        )
        tiers.append(info)
    members = sorted(state.members(), key=lambda shard: shard.name)
    return coordinator_pb2.ClusterStatus(
        cluster_uuid=state.cluster,
        version=VERSION,
        generation=state.generation,
        lease_s=state.lease_s,
        nodes=[node(state, shard.uuid, now) for shard in members],
        tiers=tiers,
        strangers=[
            coordinator_pb2.Stranger(
                tier=name, prefix=found.prefix, segments=found.segments, bytes=found.bytes
            )
            for name, all_found in sorted(state.strangers.items())
            for found in all_found
        ],
    )


def tier_message(tier: Tier) -> common_pb2.Tier:
    """Without secrets."""
    return common_pb2.Tier(spec=tier.spec.to_proto(redact=True), state=tier.state)


def usage(state: State, tier: Tier) -> common_pb2.TierUsage:
    """A cluster tier summed over its nodes, as they last said; ``error`` names who lacks it."""
    name = tier.spec.name
    total = common_pb2.TierUsage(
        tier=name, state=tier.state, rank=tier.spec.rank, available=True, local=False
    )
    errors = []
    servers = [common_pb2.TierServer(url=redacted(url), up=True) for url in tier.spec.urls]
    for shard in state.members():
        said = state.usage(shard.uuid, name)
        if said is None or said.local:
            continue
        for field in _SUMS:
            setattr(total, field, getattr(total, field) + getattr(said, field))
        if state.connected(shard.uuid) and not said.available:
            total.available = False
            errors.append(f"{shard.name}: {said.error or 'not opened yet'}")
        for server, seen in zip(servers, said.servers, strict=False):
            server.only_here += seen.only_here
            if state.connected(shard.uuid) and not seen.up:
                server.up = False
                server.error += f"{'; ' if server.error else ''}{shard.name}: {seen.error}"
    total.error = "; ".join(sorted(errors))
    total.servers.extend(servers)
    return total


def node(state: State, uuid: str, now: Now) -> coordinator_pb2.NodeInfo:
    shard = state.shards[uuid]
    session = state.sessions.get(uuid)
    info = coordinator_pb2.NodeInfo(
        name=shard.name,
        shard_uuid=uuid,
        address=shard.address,
        state="connected" if state.connected(uuid) else "absent",
        last_seen_s_ago=-1.0 if session is None else now.mono_s - session.last_seen_s,
        incarnation=shard.incarnation,
        generation=shard.generation,
        version=shard.version,
    )
    if session is not None:
        info.pages, info.fill_pages = session.pages, session.fill_pages
        info.tiers.extend(sorted(session.usage.values(), key=lambda said: (said.rank, said.tier)))
    return info


def job(state: State, record: Job, now: Now) -> coordinator_pb2.Job:
    total = progress.moved(record)
    flight = state.flights.get(record.id, Flight())
    pages_left, bytes_left = (
        (0, 0) if record.state is JobState.DONE else progress.left(state, record)
    )
    rate = 0.0 if record.state.ended else progress.rate(flight, now.mono_s)
    nodes = [
        coordinator_pb2.JobNode(
            node=state.name(uuid),
            state=part.state if part.state == "done" or state.connected(uuid) else "absent",
            reason=part.reason,
            pages_moved=part.moved.pages,
            bytes_moved=part.moved.bytes,
            bytes_left=part.bytes_left,
            pages_left=part.pages_left,
        )
        for uuid, part in sorted(record.nodes.items(), key=lambda item: state.name(item[0]))
    ]
    return coordinator_pb2.Job(
        id=record.id,
        spec=coordinator_pb2.JobSpec(
            kind=record.kind,
            tier=record.tier,
            destination=record.destination,
            byte_budget=record.byte_budget,
            older_than_s=record.older_than_s,
            target_utilisation=record.target_utilisation,
            rate_bytes_s=record.rate_bytes_s,
            lost=record.lost,
        ),
        state=record.state,
        reason=record.reason,
        pages_moved=total.pages,
        bytes_moved=total.bytes,
        logical_bytes_moved=total.logical_bytes,
        pages_lost=total.lost,
        bytes_total=record.bytes_total,
        bytes_left=bytes_left,
        pages_left=pages_left,
        rate_bytes_s=rate,
        eta_s=bytes_left / rate if rate > 0 else -1.0,
        created_at=record.created_at,
        ended_at=record.ended_at,
        nodes=nodes,
        automatic=record.automatic,
        room_bytes=record.room_bytes,
    )
