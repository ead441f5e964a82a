"""The node's side of the control plane: one stream to the coordinator, for as long as both live.

The data plane never waits for it. While the coordinator is away the node keeps its grants, its
configuration and its pages, and tries again for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version
from uuid import UUID

import grpc
import structlog

from vswap.node.admin import usage_message
from vswap.node.directives import Directive, MoveKind, Progress
from vswap.node.shard import Shard
from vswap.node.tier import TierState
from vswap.tiers.spec import TierSpec
from vswap.v1 import coordinator_pb2 as pb
from vswap.v1 import coordinator_pb2_grpc
from vswap.wire.errors import AlreadyExists, Refused, StaleIncarnation, VswapError
from vswap.wire.rpc import CHANNEL_OPTIONS, from_rpc_error

_BACKOFF_FIRST_S = 0.1
_BACKOFF_MOST_S = 5.0
_REFUSED_S = 5.0
_BUSY_REPORT_S = 0.25

logger = structlog.get_logger("vswap.node.control")


class Control:
    """Run :meth:`run` as a task. Event loop only."""

    def __init__(
        self,
        shard: Shard,
        *,
        name: str,
        address: str,
        coordinator: str,
        rng: random.Random,
        make_channel: Callable[[str], grpc.aio.Channel] | None = None,
    ) -> None:
        self._shard = shard
        self._name = name
        self._address = address
        self._coordinator = coordinator
        self._rng = rng
        self._make_channel = make_channel or _channel
        self._outgoing: asyncio.Queue[pb.NodeMessage] = asyncio.Queue()
        self._report_now = asyncio.Event()
        self._lease_s = 10.0
        self._configuring: asyncio.Task[None] | None = None
        self.on_state: Callable[[str], None] = lambda state: None
        """Told "connected" or "absent"."""
        self.joined = asyncio.Event()
        self.refused: VswapError | None = None
        """Why the coordinator does not want this node; None once it has joined."""

    async def run(self) -> None:
        """Connects, and connects again, for ever."""
        backoff = _BACKOFF_FIRST_S
        self.on_state("absent")
        while True:
            try:
                await self._connection()
                error: VswapError | None = None
            except VswapError as problem:
                error = problem
            if self.joined.is_set():
                backoff = _BACKOFF_FIRST_S
            self._left()
            if isinstance(error, Refused | AlreadyExists | StaleIncarnation):
                self.refused = error
                self.joined.set()
                logger.error("the coordinator refuses this node", reason=error.message)
                await asyncio.sleep(_REFUSED_S)
                continue
            logger.info("coordinator away", reason=error.message if error else "stream ended")
            await asyncio.sleep(backoff * self._rng.uniform(0.5, 1.0))
            backoff = min(backoff * 2, _BACKOFF_MOST_S)

    def _left(self) -> None:
        self.on_state("absent")
        self._shard.connect_grants(None)
        self._shard.directives.changed = lambda: None

    async def _connection(self) -> None:
        self._outgoing = asyncio.Queue()
        self._outgoing.put_nowait(pb.NodeMessage(hello=self._hello()))
        async with self._make_channel(self._coordinator) as channel:
            stub = coordinator_pb2_grpc.NodeLinkStub(channel)
            call = stub.Connect(self._messages())
            reports: asyncio.Task[None] | None = None
            try:
                async for message in call:
                    if message.HasField("welcome"):
                        await self._welcome(message.welcome)
                        reports = asyncio.create_task(self._reports())
                    else:
                        self._receive(message)
            except grpc.RpcError as error:
                raise from_rpc_error(error, self._coordinator) from error
            finally:
                for task in (reports, self._configuring):
                    if task is not None:
                        task.cancel()
                        with contextlib.suppress(asyncio.CancelledError):
                            await task
                self._configuring = None
                call.cancel()

    async def _messages(self) -> AsyncIterator[pb.NodeMessage]:
        while True:
            yield await self._outgoing.get()

    # ---------------------------------------------------------------- incoming

    async def _welcome(self, welcome: pb.Welcome) -> None:
        await self._shard.join(UUID(welcome.cluster_uuid))
        self._lease_s = welcome.lease_s
        self._shard.connect_grants(self._want)
        self._shard.directives.changed = self._report_now.set
        self.refused = None
        self.joined.set()
        self.on_state("connected")
        logger.info("joined", cluster=welcome.cluster_uuid, coordinator=self._coordinator)

    def _receive(self, message: pb.CoordinatorMessage) -> None:
        match message.WhichOneof("message"):
            case "configuration":
                previous = self._configuring
                self._configuring = asyncio.create_task(
                    self._configure(message.configuration, previous)
                )
            case "grant":
                self._shard.set_grant(message.grant.tier, message.grant.total_bytes)
            case "directive":
                self._shard.directives.start(_directive(message.directive))
                self._report_now.set()
            case "stop_directive":
                self._shard.directives.stop(message.stop_directive.job_id)

    async def _configure(
        self, configuration: pb.Configuration, previous: asyncio.Task[None] | None
    ) -> None:
        if previous is not None:
            await asyncio.wait([previous])
        tiers = [
            (TierSpec.from_proto(tier.spec), TierState(tier.state)) for tier in configuration.tiers
        ]
        try:
            await self._shard.configure(configuration.generation, tiers)
        except VswapError as error:
            logger.error("configuration refused", reason=error.message)
            return
        ack = pb.GenerationAck(generation=configuration.generation)
        self._outgoing.put_nowait(pb.NodeMessage(generation_ack=ack))
        self._report_now.set()

    # ---------------------------------------------------------------- outgoing

    def _want(self, tier: str, total_bytes: int) -> None:
        request = pb.GrantRequest(tier=tier, total_bytes=total_bytes)
        self._outgoing.put_nowait(pb.NodeMessage(grant_request=request))

    async def _reports(self) -> None:
        """A report at a third of the lease, more often while directives run."""
        while True:
            self._report_now.clear()
            self._outgoing.put_nowait(pb.NodeMessage(report=self._report()))
            busy = any(p.state != "done" for p in self._shard.directives.progress())
            period = min(self._lease_s / 3, _BUSY_REPORT_S if busy else self._lease_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(period):
                    await self._report_now.wait()

    def _hello(self) -> pb.Hello:
        shard = self._shard
        return pb.Hello(
            node=self._name,
            shard_uuid=str(shard.uuid),
            incarnation=shard.incarnation,
            address=self._address,
            version=version("vswap"),
            cluster_uuid=str(shard.cluster or ""),
            generation=shard.generation,
            grants=self._grants(),
            tiers=map(usage_message, shard.usage()),
        )

    def _grants(self) -> list[pb.Grant]:
        return [
            pb.Grant(tier=tier, total_bytes=total) for tier, total in self._shard.grants().items()
        ]

    def _report(self) -> pb.Report:
        shard = self._shard
        return pb.Report(
            tiers=map(usage_message, shard.usage()),
            grants=self._grants(),
            directives=map(_progress_message, shard.directives.progress()),
            pages=shard.pages,
            fill_pages=shard.fill_pages,
            ages=[
                pb.AgeBucket(tier=a.tier, older_than_s=a.older_than_s, live_bytes=a.live_bytes)
                for a in shard.ages()
            ],
        )


def _channel(address: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(
        address,
        options=[
            *CHANNEL_OPTIONS,
            ("grpc.keepalive_time_ms", 10_000),
            ("grpc.keepalive_timeout_ms", 5_000),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2_000),
        ],
    )


def _directive(message: pb.Directive) -> Directive:
    return Directive(
        job_id=message.job_id,
        kind=MoveKind(message.kind),
        tier=message.tier,
        destination=message.destination,
        byte_budget=message.byte_budget,
        older_than_s=message.older_than_s,
        target_utilisation=message.target_utilisation or 0.9,
        rate_bytes_s=message.rate_bytes_s,
    )


def _progress_message(progress: Progress) -> pb.DirectiveProgress:
    moved = progress.moved
    return pb.DirectiveProgress(
        job_id=progress.job_id,
        state=progress.state,
        reason=progress.reason,
        pages_moved=moved.pages,
        bytes_moved=moved.bytes,
        logical_bytes_moved=moved.logical_bytes,
        segments_freed=moved.segments,
        pages_left=progress.pages_left,
        bytes_left=progress.bytes_left,
    )
