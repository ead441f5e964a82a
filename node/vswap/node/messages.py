"""What a shard says of itself, and is told to do, as messages of the wire."""

from __future__ import annotations

from dataclasses import asdict

from vswap.node.differences import Checked
from vswap.node.directives import Directive, MoveKind, Progress
from vswap.node.report import TierUsage
from vswap.node.shard import Shard
from vswap.v1 import common_pb2, node_pb2
from vswap.v1 import coordinator_pb2 as pb
from vswap.wire.version import VERSION


def hello(shard: Shard, name: str, address: str, generation: int) -> pb.Hello:
    """``generation`` is the last configuration that was acknowledged, not the last one applied."""
    return pb.Hello(
        node=name,
        shard_uuid=str(shard.uuid),
        incarnation=shard.incarnation,
        address=address,
        version=VERSION,
        cluster_uuid=str(shard.cluster or ""),
        generation=generation,
        grants=_grants(shard),
        tiers=map(usage, shard.usage()),
    )


def report(shard: Shard) -> pb.Report:
    return pb.Report(
        tiers=map(usage, shard.usage()),
        grants=_grants(shard),
        directives=map(_progress, shard.directives.progress()),
        pages=shard.pages,
        fill_pages=shard.fill_pages,
        ages=[
            pb.AgeBucket(tier=a.tier, older_than_s=a.older_than_s, live_bytes=a.live_bytes)
            for a in shard.ages()
        ],
    )


def usage(of: TierUsage) -> common_pb2.TierUsage:
    fields = asdict(of)
    fields["state"] = int(of.state)
    return common_pb2.TierUsage(**fields)


def checked(seen: Checked, *, done: bool) -> node_pb2.CheckProgress:
    """The differences go with the last message."""
    told = node_pb2.CheckProgress(
        slots=seen.slots, segments=seen.segments, listed=seen.listed, found=seen.found,
        skipped=seen.skipped, others=seen.others, done=done,
    )  # fmt: skip
    if done:
        told.differences.extend(node_pb2.Difference(**asdict(item)) for item in seen.differences)
    return told


def directive(message: pb.Directive) -> Directive:
    """Raises ValueError for a kind that this node does not know."""
    return Directive(
        job_id=message.job_id,
        kind=MoveKind(message.kind),
        tier=message.tier,
        destination=message.destination,
        byte_budget=message.byte_budget,
        older_than_s=message.older_than_s,
        target_utilisation=message.target_utilisation or 0.9,
        rate_bytes_s=message.rate_bytes_s,
        lost=message.lost,
    )


def _grants(shard: Shard) -> list[pb.Grant]:
    return [pb.Grant(tier=tier, total_bytes=total) for tier, total in shard.grants().items()]


def _progress(progress: Progress) -> pb.DirectiveProgress:
    moved = progress.moved
    return pb.DirectiveProgress(
        job_id=progress.job_id,
        state=progress.state,
        reason=progress.reason,
        pages_moved=moved.pages,
        bytes_moved=moved.bytes,
        logical_bytes_moved=moved.logical_bytes,
        segments_freed=moved.segments,
        pages_lost=progress.pages_lost,
        pages_left=progress.pages_left,
        bytes_left=progress.bytes_left,
    )
