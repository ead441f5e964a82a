"""The NodeAdmin service: spaces and status of this node."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import asdict

from pydantic import ValidationError

from vswap.node import messages
from vswap.node.differences import Checked
from vswap.node.entry import FILL, POISON
from vswap.node.scrub import Scrubbed
from vswap.node.shard import Shard
from vswap.node.spaces import DEFAULT_MAX_SLOTS, MIN_PAGE_BYTES, Limits, Space
from vswap.v1 import node_pb2, node_pb2_grpc
from vswap.wire.aio import Context, served, served_stream
from vswap.wire.errors import BadConfig, InvalidRequest, UnknownTier
from vswap.wire.rpc import MAX_BATCH_BYTES
from vswap.wire.version import VERSION

_TELL_S = 0.5
_SCRUB_TELL_S = 0.5


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

    @served_stream
    async def Scrub(  # noqa: N802
        self, request: node_pb2.ScrubRequest, context: Context
    ) -> AsyncGenerator[node_pb2.ScrubProgress, None]:
        seen = Scrubbed()
        task = asyncio.create_task(self._shard.scrub(request.rate_bytes_s, seen, request.tier))
        try:
            while not task.done():
                await asyncio.wait([task], timeout=_SCRUB_TELL_S)
                if not task.done():
                    yield node_pb2.ScrubProgress(**asdict(seen))
            await task
            yield node_pb2.ScrubProgress(**asdict(seen), done=True)
        finally:
            task.cancel()

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
            version=VERSION,
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
            faults_allowed=shard.faults is not None,
            faults=shard.faults or {},
        )

    @served
    async def SetFault(  # noqa: N802
        self, request: node_pb2.SetFaultRequest, context: Context
    ) -> node_pb2.SetFaultReply:
        try:
            before = self._shard.set_fault(request.tier, request.plan)
        except BadConfig as error:
            raise InvalidRequest(error.message, **error.fields) from error
        return node_pb2.SetFaultReply(before=before)

    @served_stream
    async def Check(  # noqa: N802
        self, request: node_pb2.CheckRequest, context: Context
    ) -> AsyncGenerator[node_pb2.CheckProgress, None]:
        seen = Checked()
        task = asyncio.create_task(self._shard.check(seen, deep=request.deep))
        try:
            while not task.done():
                await asyncio.wait([task], timeout=_TELL_S)
                if not task.done():
                    yield messages.checked(seen, done=False)
            await task
            yield messages.checked(seen, done=True)
        finally:
            task.cancel()

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
            unreadable_pages=int(space.pages_by_tag[POISON]),
            tier_pages={t.name: int(space.pages_by_tag[t.tag]) for t in tiers},
            tier_bytes={t.name: int(space.bytes_by_tag[t.tag]) for t in tiers},
            events=dict(space.events),
        )
