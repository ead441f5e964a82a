"""The NodeAdmin service: spaces and status of this node."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from importlib.metadata import version

from pydantic import ValidationError

from vswap.node import messages
from vswap.node.entry import FILL
from vswap.node.shard import Shard
from vswap.node.spaces import DEFAULT_MAX_SLOTS, MIN_PAGE_BYTES, Limits, Space
from vswap.v1 import node_pb2, node_pb2_grpc
from vswap.wire.aio import Context, served
from vswap.wire.errors import InvalidRequest, UnknownTier
from vswap.wire.rpc import MAX_BATCH_BYTES


class AdminService(node_pb2_grpc.NodeAdminServicer):
    """``coordinator_state`` tells "alone", "connected" or "absent"; ``leave`` retires the node."""

    def __init__(self, shard: Shard, name: str, leave: Callable[[], Awaitable[None]]) -> None:
        self._shard = shard
        self._name = name
        self._leave = leave
        self.coordinator_state = "alone"
        self.nbd: list[str] = []
        """Where spaces are served as block devices."""

    @served
    async def CreateSpace(  # noqa: N802
        self, request: node_pb2.CreateSpaceRequest, context: Context
    ) -> node_pb2.Space:
        space = self._shard.spaces.create(
            request.name,
            request.page_bytes or MIN_PAGE_BYTES,
            request.max_slots or DEFAULT_MAX_SLOTS,
            self._limits(request.limits),
            exist_ok=request.exist_ok,
        )
        return self._describe(space)

    @served
    async def SetSpace(  # noqa: N802
        self, request: node_pb2.SetSpaceRequest, context: Context
    ) -> node_pb2.Space:
        limits = self._limits(request.limits)
        return self._describe(self._shard.spaces.change(request.name, limits, request.max_slots))

    @served
    async def DeleteSpace(  # noqa: N802
        self, request: node_pb2.DeleteSpaceRequest, context: Context
    ) -> node_pb2.DeleteSpaceReply:
        return node_pb2.DeleteSpaceReply(pages=await self._shard.delete_space(request.name))

    @served
    async def ListSpaces(  # noqa: N802
        self, request: node_pb2.ListSpacesRequest, context: Context
    ) -> node_pb2.ListSpacesReply:
        return node_pb2.ListSpacesReply(spaces=map(self._describe, self._shard.spaces))

    @served
    async def GetNode(  # noqa: N802
        self, request: node_pb2.GetNodeRequest, context: Context
    ) -> node_pb2.NodeStatus:
        shard = self._shard
        free, total = shard.usable()
        return node_pb2.NodeStatus(
            name=self._name,
            shard_uuid=str(shard.uuid),
            cluster_uuid=str(shard.cluster or ""),
            incarnation=shard.incarnation,
            version=version("vswap"),
            coordinator=self.coordinator_state,
            generation=shard.generation,
            tiers=map(messages.usage, shard.usage()),
            pages=shard.pages,
            fill_pages=shard.fill_pages,
            usable_free_bytes=free,
            usable_total_bytes=total,
            counters=shard.counters(),
            batch_max_pages_bytes=MAX_BATCH_BYTES,
            pid=os.getpid(),
            nbd=self.nbd,
            places=shard.places,
        )

    @served
    async def Leave(  # noqa: N802
        self, request: node_pb2.LeaveRequest, context: Context
    ) -> node_pb2.LeaveReply:
        await self._leave()
        return node_pb2.LeaveReply()

    def _limits(self, message: node_pb2.SpaceLimits) -> Limits:
        names = [*message.tiers, *message.tier_max_bytes]
        for name in names:
            if self._shard.tiers.find(name) is None:
                known = ", ".join(tier.name for tier in self._shard.tiers)
                raise UnknownTier(f"no tier named {name!r} (known: {known})", tier=name)
        try:
            return Limits(
                quota_bytes=message.quota_bytes,
                tiers=tuple(message.tiers),
                tier_max_bytes=dict(message.tier_max_bytes),
            )
        except ValidationError as error:
            raise InvalidRequest(str(error.errors()[0]["msg"])) from error

    def _describe(self, space: Space) -> node_pb2.Space:
        tiers = list(self._shard.tiers)
        return node_pb2.Space(
            name=space.name,
            page_bytes=space.page_bytes,
            max_slots=space.max_slots,
            limits=node_pb2.SpaceLimits(
                quota_bytes=space.limits.quota_bytes,
                tiers=space.limits.tiers,
                tier_max_bytes=space.limits.tier_max_bytes,
            ),
            pages=space.pages,
            fill_pages=int(space.pages_by_tag[FILL]),
            live_bytes=space.live_bytes,
            peak_bytes=space.peak_bytes,
            tier_pages={t.name: int(space.pages_by_tag[t.tag]) for t in tiers},
            tier_bytes={t.name: int(space.bytes_by_tag[t.tag]) for t in tiers},
            events=dict(space.events),
        )
