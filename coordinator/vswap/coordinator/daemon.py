"""The coordinator daemon: one asyncio process around one runner."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc
import structlog
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from vswap.coordinator.backends import Backends
from vswap.coordinator.config import CoordinatorConfig, load_config, state_directory
from vswap.coordinator.events import Now
from vswap.coordinator.runner import Runner
from vswap.coordinator.service import NodeLinkService, OperatorService, add_tier
from vswap.coordinator.store import FILE, Store
from vswap.tiers.backend import Backend
from vswap.tiers.factory import make_backend
from vswap.tiers.spec import TierSpec
from vswap.v1 import coordinator_pb2, coordinator_pb2_grpc
from vswap.wire.errors import TierUnavailable, VswapError
from vswap.wire.listen import StateDirectory, bind, check_listen
from vswap.wire.rpc import MAX_CALLS, SERVER_OPTIONS

__all__ = ["Coordinator", "CoordinatorConfig", "load_config", "run"]

_GRACE_S = 2.0
_TIER_AGAIN_S = 2.0

_log = structlog.get_logger("vswap.coordinator")


def run(config: CoordinatorConfig) -> int:
    """Runs until SIGTERM or SIGINT; 0 after a clean stop. Raises VswapError if it cannot start."""
    check_listen(config.listen, insecure=config.insecure)
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(
            getattr(logging, config.log_level.upper())
        ),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    path = Path(config.state_dir) if config.state_dir else state_directory(os.environ)
    directory = StateDirectory(path, backup=FILE)
    directory.lock()
    try:
        return uvloop.run(_serve(config, directory))
    finally:
        directory.unlock()


async def _serve(config: CoordinatorConfig, directory: StateDirectory) -> int:
    stop = _stop_signal()
    coordinator = Coordinator(config, directory.path / FILE)
    try:
        address = await coordinator.start()
        directory.write_address(address)
        _log.info(
            "listening",
            address=address,
            cluster=coordinator.runner.state.cluster,
            state=str(directory.path),
        )
        await stop.wait()
        _log.info("stopping")
        return 0
    finally:
        await coordinator.close()


class Coordinator:
    """A coordinator in this process. Clock, ids and backends can be handed in."""

    def __init__(
        self,
        config: CoordinatorConfig,
        database: Path,
        *,
        clock: Callable[[], Now] = lambda: Now(time.monotonic(), time.time()),
        new_id: Callable[[], str] = lambda: secrets.token_hex(3),
        backend_factory: Callable[[TierSpec], Backend] = make_backend,
    ) -> None:
        self._config = config
        self._store = Store.open(database, str(uuid.uuid4()))
        self.runner = Runner(
            self._store,
            Backends(backend_factory),
            clock=clock,
            new_id=new_id,
            lease_s=config.lease_s,
            policy=config.policy,
        )
        self._server: grpc.aio.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> str:
        """Registers the configured tiers and serves; returns the address it listens on.

        A configured tier whose server is away is registered as soon as it answers; one whose server
        is unfit raises BackendRefused. Raises BadConfig where the address is taken.
        """
        away = await self._add_tiers(self._config.tiers)
        address = await self._listen()
        self._tasks.append(asyncio.create_task(self.runner.run()))
        if away:
            self._tasks.append(asyncio.create_task(self._keep_adding(away)))
        return address

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.runner.close()
        if self._server is not None:
            await self._server.stop(_GRACE_S)

    async def _add_tiers(self, specs: Sequence[TierSpec]) -> list[TierSpec]:
        """Registers those not known yet; returns those whose server does not answer."""
        new = [spec for spec in specs if spec.name not in self.runner.state.tiers]
        results = await asyncio.gather(
            *(add_tier(self.runner, spec) for spec in new), return_exceptions=True
        )
        away = []
        for spec, result in zip(new, results, strict=True):
            if isinstance(result, TierUnavailable):
                _log.warning("a tier's server is away", tier=spec.name, reason=result.message)
                away.append(spec)
            elif isinstance(result, BaseException):
                raise result
        return away

    async def _keep_adding(self, away: list[TierSpec]) -> None:
        while away:
            await asyncio.sleep(_TIER_AGAIN_S)
            try:
                away = await self._add_tiers(away)
            except VswapError as error:
                _log.error("a configured tier cannot be added", reason=error.message)
                return

    async def _listen(self) -> str:
        server = self._server = grpc.aio.server(
            options=SERVER_OPTIONS, maximum_concurrent_rpcs=MAX_CALLS
        )
        coordinator_pb2_grpc.add_NodeLinkServicer_to_server(NodeLinkService(self.runner), server)
        coordinator_pb2_grpc.add_OperatorServicer_to_server(OperatorService(self.runner), server)
        services = coordinator_pb2.DESCRIPTOR.services_by_name.values()
        names = [service.full_name for service in services]
        health = health_aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        for name in ("", *names):
            await health.set(name, health_pb2.HealthCheckResponse.SERVING)
        reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], server)
        address = bind(server, self._config.listen)
        await server.start()
        return address


def _stop_signal() -> asyncio.Event:
    """Set by the first SIGTERM or SIGINT; the second one quits at once."""
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(1)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    return stop
