"""The two gRPC services of the coordinator over one :class:`~vswap.coordinator.runner.Runner`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from typing import Any

import structlog
from pydantic import ValidationError

from vswap.coordinator import assess, registry, views
from vswap.coordinator.events import (
    ActivateTier,
    AddTier,
    CancelJob,
    ForgetNode,
    RemoveTier,
    SetTier,
    StartJob,
)
from vswap.coordinator.runner import Link, Runner
from vswap.coordinator.state import MoveKind
from vswap.tiers.spec import TierSpec
from vswap.v1 import common_pb2, coordinator_pb2, coordinator_pb2_grpc
from vswap.wire.aio import served, served_stream
from vswap.wire.errors import BadConfig, InvalidRequest, VswapError

_OWN_LIMIT_SHARE = 0.95
"""Of a server's own limit, where the operator names none: its bookkeeping needs room as well."""
_SWEEP_S = 20.0

_log = structlog.get_logger("vswap.coordinator")


class NodeLinkService(coordinator_pb2_grpc.NodeLinkServicer):
    """The nodes' streams."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    @served_stream
    async def Connect(  # noqa: N802
        self, request_iterator: Any, context: Any
    ) -> AsyncGenerator[coordinator_pb2.CoordinatorMessage, None]:
        requests = aiter(request_iterator)
        first = await anext(requests, None)
        if first is None or first.WhichOneof("message") != "hello":
            raise InvalidRequest("the first message of a node is its hello")
        link = self._runner.connect(first.hello)
        reader = asyncio.create_task(self._read(requests, link))
        try:
            while (message := await link.get()) is not None:
                yield message
        finally:
            self._runner.disconnect(link)
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader

    async def _read(self, requests: AsyncIterator[Any], link: Link) -> None:
        """Until the node ends its side or says something it must not."""
        try:
            async for message in requests:
                self._runner.receive(link, message)
        except VswapError as error:
            link.close(error)
        else:
            link.close(None)


class OperatorService(coordinator_pb2_grpc.OperatorServicer):
    """What operators ask for. Each call is one event of the plan."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    @served
    async def GetCluster(  # noqa: N802
        self, request: coordinator_pb2.GetClusterRequest, context: Any
    ) -> coordinator_pb2.ClusterStatus:
        return views.cluster(self._runner.state, self._runner.clock())

    @served
    async def AddTier(  # noqa: N802
        self, request: coordinator_pb2.AddTierRequest, context: Any
    ) -> common_pb2.Tier:
        try:
            spec = TierSpec.from_proto(request.spec)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(str(part) for part in first["loc"])
            where = f"{key}: " if key else ""
            raise BadConfig(f"tier {request.spec.name}: {where}{first['msg']}", key=key) from error
        await add_tier(self._runner, spec)
        return self._tier(spec.name)

    @served
    async def SetTier(  # noqa: N802
        self, request: coordinator_pb2.SetTierRequest, context: Any
    ) -> common_pb2.Tier:
        fields = {
            name: getattr(request, name)
            for name in ("capacity_bytes", "rank", "high", "low")
            if request.HasField(name)
        }
        event = SetTier(request.name, **fields)
        if request.HasField("replace"):
            event = replace(event, replace=(request.replace, request.replace_by))
            event = replace(event, force=request.force)
            await replace_server(self._runner, event)
        else:
            self._runner.apply(event)
        return self._tier(request.name)

    @served
    async def RemoveTier(  # noqa: N802
        self, request: coordinator_pb2.RemoveTierRequest, context: Any
    ) -> coordinator_pb2.RemoveTierReply:
        self._runner.apply(RemoveTier(request.name))
        await self._runner.backends.drop(request.name)
        return coordinator_pb2.RemoveTierReply()

    @served
    async def ActivateTier(  # noqa: N802
        self, request: coordinator_pb2.ActivateTierRequest, context: Any
    ) -> common_pb2.Tier:
        self._runner.apply(ActivateTier(request.name))
        return self._tier(request.name)

    @served
    async def ForgetNode(  # noqa: N802
        self, request: coordinator_pb2.ForgetNodeRequest, context: Any
    ) -> coordinator_pb2.ForgetNodeReply:
        state = self._runner.state
        named = [shard.uuid for shard in state.members() if shard.name == request.node]
        uuid = named[0] if named else request.node
        self._runner.apply(ForgetNode(request.node))
        segments, size = await self._runner.swept(uuid, _SWEEP_S)
        pending = sorted(tier for shard, tier in self._runner.state.sweeps if shard == uuid)
        return coordinator_pb2.ForgetNodeReply(
            segments_deleted=segments, bytes_deleted=size, pending_tiers=pending
        )

    @served
    async def StartJob(  # noqa: N802
        self, request: coordinator_pb2.StartJobRequest, context: Any
    ) -> coordinator_pb2.Job:
        spec = request.spec
        try:
            kind = MoveKind(coordinator_pb2.MoveKind.Name(spec.kind))
        except ValueError:
            raise InvalidRequest(
                "a job is a drain, a migration, a compaction or a repair"
            ) from None
        event = StartJob(
            id=f"{kind.word}-{self._runner.new_id()}",
            kind=kind,
            tier=spec.tier,
            destination=spec.destination,
            byte_budget=spec.byte_budget,
            older_than_s=spec.older_than_s,
            target_utilisation=spec.target_utilisation,
            rate_bytes_s=spec.rate_bytes_s,
            lost=spec.lost,
        )
        if request.dry_run:
            planned = assess.plan(self._runner.state, event)
            planned.created_at = self._runner.clock().wall_s
            return views.job(self._runner.state, planned, self._runner.clock())
        self._runner.apply(event)
        return self._job(event.id)

    @served
    async def ListJobs(  # noqa: N802
        self, request: coordinator_pb2.ListJobsRequest, context: Any
    ) -> coordinator_pb2.ListJobsReply:
        jobs = self._runner.state.jobs.values()
        shown = [job.id for job in jobs if request.all or not job.state.ended]
        return coordinator_pb2.ListJobsReply(jobs=[self._job(job_id) for job_id in shown])

    @served_stream
    async def WatchJob(  # noqa: N802
        self, request: coordinator_pb2.WatchJobRequest, context: Any
    ) -> AsyncGenerator[coordinator_pb2.Job, None]:
        while True:
            ended = self._runner.state.job(request.id).state.ended
            yield self._job(request.id)
            if ended:
                return
            await self._runner.changed(1.0)

    @served
    async def CancelJob(  # noqa: N802
        self, request: coordinator_pb2.CancelJobRequest, context: Any
    ) -> coordinator_pb2.Job:
        self._runner.apply(CancelJob(request.id))
        return self._job(request.id)

    def _job(self, job_id: str) -> coordinator_pb2.Job:
        state = self._runner.state
        return views.job(state, state.job(job_id), self._runner.clock())

    def _tier(self, name: str) -> common_pb2.Tier:
        return views.tier_message(self._runner.state.tier(name))


async def replace_server(runner: Runner, event: SetTier) -> None:
    """Opens the server that is to take another one's place, and registers it if that is fit."""
    spec = registry.check_replacement(runner.state, event)
    assert event.replace is not None
    [member] = [member for member in spec.members() if member.url == event.replace[1]]
    await runner.backends.examine(member)
    runner.apply(event)
    await runner.backends.drop(event.name)
    _log.info("server replaced", tier=event.name, by=member.safe_url)


async def add_tier(runner: Runner, spec: TierSpec) -> None:
    """Opens the tier's backend, and registers it if that is fit.

    Raises TierUnavailable, BackendRefused, BadConfig, AlreadyExists.
    """
    registry.check_new(runner.state, spec)
    limit = await runner.backends.examine(spec)
    if not spec.capacity_bytes and limit:
        spec = spec.model_copy(update={"capacity_bytes": int(limit * _OWN_LIMIT_SHARE)})
    if limit and spec.capacity_bytes > limit:
        _log.warning(
            "a tier's capacity is more than its server has",
            tier=spec.name,
            capacity_bytes=spec.capacity_bytes,
            limit_bytes=limit,
        )
    runner.apply(AddTier(spec))
    _log.info("tier added", tier=spec.name, url=spec.safe_url, capacity_bytes=spec.capacity_bytes)
