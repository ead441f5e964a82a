"""A scripted node over a real gRPC stream, for tests of the coordinator's services."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any
from uuid import uuid4

import grpc

from vswap.v1 import common_pb2, coordinator_pb2, coordinator_pb2_grpc
from vswap.wire.errors import VswapError
from vswap.wire.rpc import from_rpc_error


class LinkNode:
    """Keeps what a node keeps of the control plane, acknowledges configurations, moves when told.

    ``async with`` connects and disconnects; ``connect`` and ``disconnect`` may be called again.
    """

    def __init__(self, address: str, name: str = "n1", shard: str = "") -> None:
        self.address = address
        self.name = name
        self.shard = shard or str(uuid4())
        self.incarnation = 1
        self.generation = 0
        self.cluster = ""
        self.tiers: dict[str, common_pb2.Tier] = {}
        self.grants: dict[str, int] = {}
        self.stored: dict[str, int] = {}
        self.directives: dict[str, coordinator_pb2.Directive] = {}
        self.moved: dict[str, int] = {}
        self.done: set[str] = set()
        self.error: VswapError | None = None
        self._out: asyncio.Queue[coordinator_pb2.NodeMessage] = asyncio.Queue()
        self._reader: asyncio.Task[None] | None = None
        self._welcomed = asyncio.Event()
        self._changed = asyncio.Event()

    async def __aenter__(self) -> LinkNode:
        await self.connect()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.disconnect()

    async def connect(self) -> None:
        """Raises what the coordinator refuses with."""
        self._out, self._welcomed, self.error = asyncio.Queue(), asyncio.Event(), None
        hello = coordinator_pb2.Hello(
            node=self.name,
            shard_uuid=self.shard,
            incarnation=self.incarnation,
            cluster_uuid=self.cluster,
            generation=self.generation,
            grants=self._grants(),
            tiers=self._usage(),
        )
        self.say(hello=hello)
        self._reader = asyncio.create_task(self._read())
        await asyncio.wait(
            {asyncio.create_task(self._welcomed.wait()), self._reader},
            return_when=asyncio.FIRST_COMPLETED,
            timeout=10,
        )
        if self.error is not None:
            raise self.error
        assert self._welcomed.is_set(), "neither welcomed nor refused"

    async def disconnect(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
            self._reader = None

    async def closed(self) -> None:
        """Waits until the coordinator ends the stream."""
        assert self._reader is not None
        await asyncio.wait({self._reader}, timeout=10)
        assert self._reader.done()

    def say(self, **message: Any) -> None:
        self._out.put_nowait(coordinator_pb2.NodeMessage(**message))

    @property
    def waiting(self) -> int:
        """Messages that the stream has not taken yet."""
        return self._out.qsize()

    def report(self) -> None:
        progress = [
            coordinator_pb2.DirectiveProgress(
                job_id=job_id,
                state="done" if job_id in self.done else "running",
                bytes_moved=self.moved.get(job_id, 0),
                bytes_left=self.stored.get(directive.tier, 0),
            )
            for job_id, directive in self.directives.items()
        ]
        self.say(
            report=coordinator_pb2.Report(
                tiers=self._usage(), grants=self._grants(), directives=progress
            )
        )

    async def store(self, tier: str, stored: int) -> None:
        """Has a grant for that many bytes, stores and reports them."""
        self.say(grant_request=coordinator_pb2.GrantRequest(tier=tier, total_bytes=stored))
        await self.until(lambda: self.grants.get(tier, 0) >= stored)
        self.stored[tier] = stored
        self.report()

    def move(self, job_id: str, moved: int, to: str) -> None:
        tier = self.directives[job_id].tier
        self.stored[tier] -= moved
        self.stored[to] = self.stored.get(to, 0) + moved
        self.moved[job_id] = self.moved.get(job_id, 0) + moved
        if not self.stored[tier]:
            self.done.add(job_id)
        self.report()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits until what came in makes it true."""
        async with asyncio.timeout(10):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def _read(self) -> None:
        async with grpc.aio.insecure_channel(self.address) as channel:
            generated: Any = coordinator_pb2_grpc
            call = generated.NodeLinkStub(channel).Connect(self._messages())
            try:
                async for message in call:
                    self._receive(message)
                    self._changed.set()
            except grpc.aio.AioRpcError as error:
                self.error = from_rpc_error(error, self.address)

    async def _messages(self) -> AsyncIterator[coordinator_pb2.NodeMessage]:
        out = self._out
        while True:
            yield await out.get()

    def _receive(self, message: coordinator_pb2.CoordinatorMessage) -> None:
        match message.WhichOneof("message"):
            case "welcome":
                self.cluster = message.welcome.cluster_uuid
                self._welcomed.set()
            case "configuration":
                self.generation = message.configuration.generation
                self.tiers = {tier.spec.name: tier for tier in message.configuration.tiers}
                self.say(generation_ack=coordinator_pb2.GenerationAck(generation=self.generation))
                self.report()
            case "grant":
                self.grants[message.grant.tier] = message.grant.total_bytes
                self.report()
            case "directive":
                self.directives[message.directive.job_id] = message.directive
            case "stop_directive":
                self.directives.pop(message.stop_directive.job_id, None)

    def _grants(self) -> list[coordinator_pb2.Grant]:
        return [coordinator_pb2.Grant(tier=t, total_bytes=b) for t, b in self.grants.items()]

    def _usage(self) -> list[common_pb2.TierUsage]:
        return [
            common_pb2.TierUsage(
                tier=tier,
                live_bytes=stored,
                stored_bytes=stored,
                logical_bytes=3 * stored,
                pages=stored // 1000,
                limit_bytes=self.grants.get(tier, 0),
                state=common_pb2.TIER_STATE_ACTIVE,
                available=True,
            )
            for tier, stored in self.stored.items()
        ]
