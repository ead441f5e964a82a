"""The node's side of the control plane: one stream to the coordinator, for as long as both live.

The data plane never waits for it. While the coordinator is away the node keeps its grants, its
configuration and its pages, and tries again for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import deque
from collections.abc import Callable
from typing import Any
from uuid import UUID

import grpc
import structlog

from vswap.node import messages
from vswap.node.shard import Shard
from vswap.node.tier import TierState
from vswap.tiers.spec import TierSpec
from vswap.v1 import coordinator_pb2 as pb
from vswap.v1 import coordinator_pb2_grpc
from vswap.wire.errors import (
    InternalError,
    InvalidRequest,
    Refused,
    StaleIncarnation,
    Unreachable,
    VswapError,
)
from vswap.wire.rpc import CHANNEL_OPTIONS, from_rpc_error

_BACKOFF_FIRST_S = 0.1
_BACKOFF_MOST_S = 5.0
_WELCOME_S = 10.0
_BUSY_REPORT_S = 0.25
_IDLE_REPORT_S = 0.5
"""Jobs are planned on what nodes last reported: what was stored a moment ago must count."""

logger = structlog.get_logger("vswap.node.control")


class Control:
    """Run :meth:`run` as a task. Event loop only; its clock is the loop's."""

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
        self.on_state: Callable[[str], None] = lambda state: None
        """Told "connected" or "absent"."""
        self.attempted = asyncio.Event()
        """Set once the coordinator has welcomed or refused this node, or was found to be away."""
        self.refused: VswapError | None = None
        """Why the coordinator does not want this node; None where it does, or is away."""
        self._lease_s = 10.0
        self._connected = False
        self._leaving = False
        self._gone = asyncio.Event()
        """Set once the coordinator has the tombstone of this node on disk."""
        self._queue: deque[pb.NodeMessage] = deque()
        """To be sent as soon as possible; reports are made when they are sent."""
        self._report_due = False
        self._wake = asyncio.Event()
        self._acknowledged = shard.generation
        """What the shard was opened with counts: no write of this life preceded it."""
        self._configuration: pb.Configuration | None = None
        """The newest one, until it has been taken up."""
        self._configuration_came = asyncio.Event()

    @property
    def connected(self) -> bool:
        return self._connected

    @property
    def buried(self) -> bool:
        """The coordinator has forgotten this node for good."""
        return self.refused is not None and _is_buried(self.refused)

    async def goodbye(self) -> None:
        """Tells the coordinator that this node has left for good, until it confirms that, unless it
        knows: a life that was killed since may have told it.

        The node holds nothing any more and must take nothing from here on.
        """
        self._leaving = True
        if self.buried:
            return
        if self._connected:
            self._say_goodbye()
        await self._gone.wait()

    async def run(self) -> None:
        """Connects, and connects again, until the node has left for good."""
        self.on_state("absent")
        configuring = asyncio.create_task(self._take_configurations())
        backoff_s = _BACKOFF_FIRST_S
        told = ""
        try:
            while True:
                error = await self._attempt()
                if self._connected:
                    backoff_s, told = _BACKOFF_FIRST_S, ""
                self._left()
                if self._leaving and _is_buried(error):
                    # The goodbye arrived; what got lost is its confirmation.
                    self._gone.set()
                if self._gone.is_set():
                    return
                self.refused = error if _is_refusal(error) else None
                self.attempted.set()
                outlived = self._is_outlived(error)
                if outlived or _is_buried(error):
                    self._configuration = None
                    self._shard.disown(outlived=outlived)
                # An outage is told once, not at every attempt.
                if self.refused is not None:
                    if error.message != told:
                        logger.error("the coordinator refuses this node", reason=error.message)
                    told, backoff_s = error.message, _BACKOFF_MOST_S
                elif told != "away":
                    logger.warning("coordinator away", reason=error.message)
                    told = "away"
                await asyncio.sleep(backoff_s * self._rng.uniform(0.5, 1.0))
                backoff_s = min(backoff_s * 2, _BACKOFF_MOST_S)
        finally:
            configuring.cancel()
            await asyncio.gather(configuring, return_exceptions=True)

    async def _attempt(self) -> VswapError:
        """One connection, from the hello to whatever ended it."""
        try:
            await self._stream()
        except VswapError as error:
            return error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return Unreachable(f"the stream to {self._coordinator} was cancelled")
        except Exception as error:
            logger.error("the control link failed unexpectedly", exc_info=error)
            return InternalError(f"{type(error).__name__}: {error}")
        return Unreachable(f"{self._coordinator} ended the stream")

    def _is_outlived(self, error: VswapError) -> bool:
        """The coordinator knows a newer life of this shard: our state, or its, is a copy. Not where
        it takes us for our own dead stream: that passes with the lease."""
        known = error.fields.get("incarnation", 0)
        return isinstance(error, StaleIncarnation) and known > self._shard.incarnation

    def _left(self) -> None:
        self._connected = False
        self._queue.clear()
        self._shard.connect_grants(None)
        self._shard.directives.changed = lambda: None
        self.on_state("absent")

    async def _stream(self) -> None:
        async with self._make_channel(self._coordinator) as channel:
            call = coordinator_pb2_grpc.NodeLinkStub(channel).Connect()
            sending = asyncio.create_task(self._send(call))
            try:
                async with asyncio.timeout(_WELCOME_S) as patience:
                    async for message in call:
                        if message.HasField("welcome"):
                            patience.reschedule(None)
                            await self._welcome(message.welcome)
                        else:
                            self._receive(message)
            except TimeoutError as error:
                raise Unreachable(f"{self._coordinator} does not answer") from error
            except grpc.RpcError as error:
                raise from_rpc_error(error, self._coordinator) from error
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
                call.cancel()

    # ---------------------------------------------------------------- incoming

    async def _welcome(self, welcome: pb.Welcome) -> None:
        await self._shard.join(UUID(welcome.cluster_uuid))
        self._lease_s = welcome.lease_s
        self._connected = True
        self._shard.connect_grants(self._want)
        self._shard.directives.changed = self._report
        if self._leaving:
            self._say_goodbye()
        self._report()
        self.refused = None
        self.attempted.set()
        self.on_state("connected")
        logger.info("joined", cluster=welcome.cluster_uuid, coordinator=self._coordinator)

    def _receive(self, message: pb.CoordinatorMessage) -> None:
        match message.WhichOneof("message"):
            case "configuration":
                self._configuration = message.configuration
                self._configuration_came.set()
            case "grant":
                self._shard.set_grant(message.grant.tier, message.grant.total_bytes)
            case "directive":
                try:
                    directive = messages.directive(message.directive)
                except ValueError as error:
                    # Of a newer coordinator, perhaps. The stream is worth more than this message.
                    logger.error("directive not understood", reason=str(error))
                    return
                self._shard.directives.start(directive)
                self._report()
            case "stop_directive":
                self._shard.directives.stop(message.stop_directive.job_id)
            case "farewell":
                self._gone.set()

    async def _take_configurations(self) -> None:
        """Takes up the newest configuration, one at a time, whether or not a stream is open.

        One that fails (a tier has the name of one of the node's own) is tried again until there is
        a newer one.
        """
        told = ""
        while True:
            await self._configuration_came.wait()
            self._configuration_came.clear()
            configuration = self._configuration
            if configuration is None:
                continue
            try:
                await self._configure(configuration)
            except Exception as error:
                if str(error) != told:
                    told = str(error)
                    expected = isinstance(error, VswapError | ValueError)
                    logger.error(
                        "configuration cannot be taken up", generation=configuration.generation,
                        reason=told, exc_info=None if expected else error,
                    )  # fmt: skip
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_BACKOFF_MOST_S):
                        await self._configuration_came.wait()
                self._configuration_came.set()
            else:
                told = ""
                if self._configuration is configuration:
                    self._configuration = None

    async def _configure(self, configuration: pb.Configuration) -> None:
        """Acknowledges what is in force: a hello and a report name a generation only after that."""
        generation = configuration.generation
        if generation < self._shard.generation:
            logger.warning(
                "configuration is older than ours", generation=generation,
                ours=self._shard.generation,
            )  # fmt: skip
            return
        tiers = [
            (TierSpec.from_proto(tier.spec), TierState(tier.state)) for tier in configuration.tiers
        ]
        await self._shard.configure(generation, tiers)
        self._acknowledged = generation
        if self._connected:
            ack = pb.GenerationAck(generation=generation)
            self._queue.append(pb.NodeMessage(generation_ack=ack))
            self._report()

    # ---------------------------------------------------------------- outgoing

    def _want(self, tier: str, total_bytes: int) -> None:
        request = pb.GrantRequest(tier=tier, total_bytes=total_bytes)
        self._queue.append(pb.NodeMessage(grant_request=request))
        self._wake.set()

    def _say_goodbye(self) -> None:
        self._queue.append(pb.NodeMessage(goodbye=pb.Goodbye()))
        self._wake.set()

    def _report(self) -> None:
        """A report, soon."""
        self._report_due = True
        self._wake.set()

    async def _send(self, call: Any) -> None:
        """Says hello; once welcomed, what is queued and reports. Ends the call if it cannot."""
        try:
            hello = messages.hello(self._shard, self._name, self._address, self._acknowledged)
            await call.write(pb.NodeMessage(hello=hello))
            await self._send_on(call)
        except (grpc.RpcError, asyncio.InvalidStateError):
            # The stream has ended; the side that reads knows why.
            return
        except Exception as error:
            logger.error("the control link failed unexpectedly", exc_info=error)
            call.cancel()

    async def _send_on(self, call: Any) -> None:
        """Reports are sent at a third of the lease, sooner while directives run or when asked."""
        loop = asyncio.get_running_loop()
        next_report = loop.time()
        while True:
            if self._queue:
                await call.write(self._queue.popleft())
            elif self._connected and (self._report_due or loop.time() >= next_report):
                self._report_due = False
                report = messages.report(self._shard)
                busy = any(p.state not in ("done", "failed") for p in report.directives)
                period_s = min(self._lease_s / 3, _BUSY_REPORT_S if busy else _IDLE_REPORT_S)
                next_report = loop.time() + period_s
                await call.write(pb.NodeMessage(report=report))
            else:
                self._wake.clear()
                try:
                    async with asyncio.timeout_at(next_report if self._connected else None):
                        await self._wake.wait()
                except TimeoutError:
                    continue


def _channel(address: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(
        address,
        options=[
            *CHANNEL_OPTIONS,
            # A proxy in the environment is for the web.
            ("grpc.enable_http_proxy", 0),
            # Without it, an attempt would wait out the backoff of the channel before it.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.keepalive_time_ms", 10_000),
            ("grpc.keepalive_timeout_ms", 5_000),
            # This one decides for pings, and is a minute by default.
            ("grpc.http2.ping_timeout_ms", 5_000),
        ],
    )


def _is_refusal(error: VswapError) -> bool:
    """The coordinator answered, and more of the same will get the same answer."""
    return isinstance(error, Refused | InvalidRequest | StaleIncarnation)


def _is_buried(error: VswapError) -> bool:
    """The coordinator holds a tombstone of this shard."""
    return isinstance(error, Refused) and bool(error.fields.get("forgotten"))
