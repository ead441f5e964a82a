"""Nodes: who is a member, who is connected, what they say."""

from __future__ import annotations

from uuid import UUID

from vswap.coordinator import grants, progress, sweeps
from vswap.coordinator.events import ForgetNode, NodeConnected, NodeDisconnected, NodeSaid
from vswap.coordinator.state import Session, Shard
from vswap.coordinator.turn import Turn, configuration
from vswap.v1 import coordinator_pb2
from vswap.wire.errors import (
    AlreadyExists,
    InvalidRequest,
    Refused,
    StaleIncarnation,
    UnknownNode,
)


def connect(turn: Turn, event: NodeConnected) -> None:
    """A stream begins. Nothing changed if it raises."""
    state, hello = turn.state, event.hello
    uuid = hello.shard_uuid
    shard = _admit(turn, hello)
    old = state.sessions.get(uuid)
    if old is not None:
        turn.hang_up(uuid, old, StaleIncarnation(f"a newer stream of {hello.node} took over"))
    shard.name, shard.address, shard.version = hello.node, hello.address, hello.version
    shard.incarnation, shard.generation = hello.incarnation, hello.generation
    state.shards[uuid] = shard
    turn.save("shard", uuid)
    if hello.generation > state.generation:
        # Our file was restored from an older copy: what we say next must count as newer.
        state.generation = hello.generation
        turn.new_generation()
    state.sessions[uuid] = Session(
        stream=event.stream,
        open=True,
        last_seen_s=turn.now_s,
        settled_generation=hello.generation,
        usage={usage.tier: usage for usage in hello.tiers},
    )
    welcome = coordinator_pb2.Welcome(cluster_uuid=state.cluster, lease_s=state.lease_s)
    turn.send(uuid, coordinator_pb2.CoordinatorMessage(welcome=welcome))
    turn.send(uuid, configuration(state))
    grants.at_hello(turn, uuid, hello.grants)
    progress.at_hello(turn, uuid)


def disconnect(turn: Turn, event: NodeDisconnected) -> None:
    """A stream ended. That means absent, and nothing more."""
    session = turn.state.sessions.get(event.shard)
    if session is not None and session.stream == event.stream:
        session.open = False


def said(turn: Turn, event: NodeSaid) -> None:
    """A message came in."""
    session = turn.state.sessions.get(event.shard)
    if session is None or not session.open or session.stream != event.stream:
        return
    session.last_seen_s, session.fresh = turn.now_s, True
    message = event.message
    match message.WhichOneof("message"):
        case "report":
            _report(turn, event.shard, session, message.report)
        case "generation_ack":
            _acknowledge(turn, event.shard, message.generation_ack.generation)
        case "grant_request":
            wanted = message.grant_request
            grants.request(turn, event.shard, wanted.tier, wanted.total_bytes)
        case "goodbye":
            # Queued before the stream ends, sent after the tombstone is on disk.
            farewell = coordinator_pb2.CoordinatorMessage(farewell=coordinator_pb2.Farewell())
            turn.send(event.shard, farewell)
            bury(turn, event.shard)
        case other:
            raise InvalidRequest(f"a node must not say {other or 'nothing'} here")


def check_leases(turn: Turn) -> None:
    """Marks those absent that have been silent for a lease."""
    for session in turn.state.sessions.values():
        if turn.now_s - session.last_seen_s > turn.state.lease_s:
            session.fresh = False


def forget(turn: Turn, event: ForgetNode) -> None:
    """The operator's tombstone, for a member or for a shard that only a listing has shown."""
    state = turn.state
    matches = [s for s in state.members() if event.node in (s.name, s.uuid)]
    if matches:
        shard = matches[0]
        if state.connected(shard.uuid):
            raise Refused(
                f"node {shard.name} is connected; stop it first (only a node that never comes "
                "back may be forgotten)",
                node=shard.name,
            )
        bury(turn, shard.uuid)
        return
    prefix = f"vswap/{state.cluster}/{event.node}/"
    seen = any(found.prefix == prefix for tier in state.strangers.values() for found in tier)
    if not seen or not _is_uuid(event.node):
        known = ", ".join(sorted(shard.name for shard in state.members())) or "none"
        raise UnknownNode(f"no node named {event.node!r} (there are: {known})", node=event.node)
    state.shards[event.node] = Shard(uuid=event.node, name=event.node)
    bury(turn, event.node)


def bury(turn: Turn, uuid: str) -> None:
    """Sets the tombstone: the shard's segments on every tier may be deleted by us from here on."""
    state = turn.state
    shard = state.shards[uuid]
    shard.forgotten = True
    turn.save("shard", uuid)
    session = state.sessions.pop(uuid, None)
    if session is not None:
        turn.hang_up(uuid, session, None)
    for job in state.running():
        if job.nodes.pop(uuid, None) is not None:
            turn.save_job(job)
    for name in state.tiers:
        turn.set_hold(uuid, name, 0, state.hold(uuid, name).held)
        sweeps.add(turn, uuid, name)


# ------------------------------------------------------------------ inside


def _admit(turn: Turn, hello: coordinator_pb2.Hello) -> Shard:
    state = turn.state
    if not hello.node or not _is_uuid(hello.shard_uuid):
        raise InvalidRequest("a hello needs the node's name and its shard's uuid")
    if hello.cluster_uuid and hello.cluster_uuid != state.cluster:
        raise Refused(
            f"node {hello.node} belongs to cluster {hello.cluster_uuid}, this is {state.cluster}",
            cluster=state.cluster,
        )
    shard = state.shards.get(hello.shard_uuid)
    if shard is not None and shard.forgotten:
        raise Refused(
            f"node {hello.node} was forgotten and its pages on shared tiers were deleted; "
            "start it with --fresh to join anew",
            node=hello.node,
            forgotten=True,
        )
    for other in state.members():
        if other.name == hello.node and other.uuid != hello.shard_uuid:
            absent = not state.connected(other.uuid)
            way_out = (
                f"is absent; if it never comes back: vswap node forget {other.name}"
                if absent
                else "is connected; choose another name"
            )
            raise AlreadyExists(
                f"the node named {other.name} (shard {other.uuid}) {way_out}", name=other.name
            )
    for usage in hello.tiers:
        if usage.local and usage.tier in state.tiers:
            raise AlreadyExists(
                f"node {hello.node} has a tier of its own named {usage.tier!r}, and so has the "
                "cluster; rename one",
                name=usage.tier,
            )
    if shard is None:
        return Shard(uuid=hello.shard_uuid, name=hello.node)
    live = state.connected(hello.shard_uuid) and hello.incarnation <= shard.incarnation
    if live or hello.incarnation < shard.incarnation:
        raise StaleIncarnation(
            f"node {hello.node} is known in incarnation {shard.incarnation}, "
            f"this is {hello.incarnation}",
            node=hello.node,
            incarnation=shard.incarnation,
        )
    return shard


def _report(turn: Turn, uuid: str, session: Session, report: coordinator_pb2.Report) -> None:
    session.usage = {usage.tier: usage for usage in report.tiers}
    session.ages = list(report.ages)
    session.pages, session.fill_pages = report.pages, report.fill_pages
    session.settled_generation = turn.state.shards[uuid].generation
    grants.at_report(turn, uuid, report.grants)
    progress.at_report(turn, uuid, report.directives)


def _acknowledge(turn: Turn, uuid: str, generation: int) -> None:
    if generation > turn.state.generation:
        raise InvalidRequest(f"configuration {generation} was never sent")
    shard = turn.state.shards[uuid]
    if generation > shard.generation:
        shard.generation = generation
        turn.save("shard", uuid)


def _is_uuid(text: str) -> bool:
    try:
        return str(UUID(text)) == text
    except ValueError:
        return False
