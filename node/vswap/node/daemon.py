"""The node daemon: one asyncio process around one shard."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import resource
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import grpc
import structlog
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from vswap.node.admin import AdminService
from vswap.node.config import NodeConfig, load_config
from vswap.node.control import Control
from vswap.node.departure import Departure
from vswap.node.faults import Faults
from vswap.node.frontends.grpc_pages import PagesService
from vswap.node.frontends.nbd.server import NbdServer
from vswap.node.frugal import trim_memory
from vswap.node.harden import harden
from vswap.node.seams import Seams
from vswap.node.shard import Shard
from vswap.tiers.region import Region
from vswap.v1 import node_pb2, node_pb2_grpc
from vswap.wire.listen import (
    MAX_SOCKET_PATH_BYTES,
    StateDirectory,
    bind,
    check_listen,
    runtime_directory,
)
from vswap.wire.rpc import MAX_CALLS, SERVER_OPTIONS

__all__ = ["NodeConfig", "load_config", "run"]

_GRACE_S = 10.0
_JOIN_S = 5.0
_SWITCH_INTERVAL_S = 5e-5
"""The default of 5 ms lets a busy codec thread hold up the event loop for 1.5 ms on average."""

logger = structlog.get_logger("vswap.node")


def run(config: NodeConfig) -> int:
    """Runs until SIGTERM, SIGINT or `vswap node leave`; 0 after a clean end.

    Raises VswapError if it cannot start.
    """
    for where in (config.listen, *(config.nbd or ())):
        check_listen(where, insecure=config.insecure)
    _configure_logging(config.log_level)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    # Many a shell's soft limit of 1024 is less than what clients and tiers may need.
    most_files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    if config.swap_safe:
        for what, why in harden().items():
            logger.warning("not as safe to swap on as it could be", missing=what, why=why)
    path = Path(config.state_dir) if config.state_dir else None
    directory = StateDirectory(path or runtime_directory(config.name, dict(os.environ)))
    directory.lock()
    try:
        return uvloop.run(_serve(config, directory))
    finally:
        directory.unlock()


async def _serve(config: NodeConfig, directory: StateDirectory) -> int:
    stop = _stop_signal()
    seams = Seams(threads=config.threads, make_region=partial(Region, resident=config.swap_safe))
    if config.allow_faults or config.faults:
        seams.faults = Faults(config.faults)
    shard = await Shard.open(
        directory.path, config.tiers, fresh=config.fresh, seams=seams,
        exclusive_timeout_s=config.exclusive_timeout_s,
    )  # fmt: skip
    departure = Departure(shard, done=stop.set)
    server = Server(shard, config, departure)
    control: asyncio.Task[None] | None = None
    # What the kernel swaps on keeps the memory that it has.
    trimming = None if config.swap_safe else asyncio.create_task(trim_memory())
    try:
        for space in config.spaces:
            shard.spaces.create(
                space.name, space.page_bytes, space.max_slots, space.limits, exist_ok=True
            )
        if config.scrub_bytes_s:
            shard.start_scrub(config.scrub_bytes_s, config.scrub_interval_s)
        address = await server.start()
        # Not before all spaces are there: one that is missing then counts as deleted.
        await server.start_nbd(_nbd_addresses(config, directory), insecure=config.insecure)
        if config.coordinator:
            link = departure.control = Control(
                shard, name=config.name, address=config.advertise or address,
                coordinator=config.coordinator, rng=random.Random(),
            )  # fmt: skip
            link.on_state = server.tell_coordinator_state
            control = asyncio.create_task(link.run())
            await _first_attempt(link, stop, newcomer=shard.cluster is None)
        directory.write_address(address)
        logger.info("listening", address=address, node=config.name, state=str(directory.path))
        await stop.wait()
        logger.info("leaving: finishing what is under way")
        return 0
    finally:
        if trimming is not None:
            trimming.cancel()
        await server.stop()
        await departure.close()
        if control is not None:
            control.cancel()
            await asyncio.gather(control, return_exceptions=True)
        await shard.close()
        if departure.left:
            shard.erase()


def _nbd_addresses(config: NodeConfig, directory: StateDirectory) -> tuple[str, ...]:
    if config.nbd is not None:
        return config.nbd
    path = directory.path.absolute() / "nbd.sock"
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        logger.warning("no block devices: the path of the socket is too long", path=str(path))
        return ()
    return (f"unix:{path}",)


async def _first_attempt(link: Control, stop: asyncio.Event, *, newcomer: bool) -> None:
    """Waits until the coordinator was found, or found to be away.

    A newcomer that is refused (its name is taken) ends. A member serves its pages all the same.
    """
    waits = [asyncio.create_task(event.wait()) for event in (link.attempted, stop)]
    await asyncio.wait(waits, timeout=_JOIN_S, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    if link.refused is not None and newcomer:
        raise link.refused


class Server:
    """The node's gRPC services on its address."""

    def __init__(self, shard: Shard, config: NodeConfig, departure: Departure) -> None:
        self._listen = config.listen
        self._admin = AdminService(shard, config.name, departure.leave)
        self._nbd = NbdServer(shard, inflight_bytes=config.inflight_bytes)
        self._health = health_aio.HealthServicer()
        self._server = grpc.aio.server(options=SERVER_OPTIONS, maximum_concurrent_rpcs=MAX_CALLS)
        PagesService(shard, inflight_bytes=config.inflight_bytes).add_to(self._server)
        node_pb2_grpc.add_NodeAdminServicer_to_server(self._admin, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        services = node_pb2.DESCRIPTOR.services_by_name.values()
        self._names = [service.full_name for service in services]
        reflection.enable_server_reflection([*self._names, reflection.SERVICE_NAME], self._server)

    async def start(self) -> str:
        """Serves; returns the address with the port it got. Raises BadConfig."""
        address = bind(self._server, self._listen)
        for name in ("", *self._names):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        await self._server.start()
        return address

    async def start_nbd(self, addresses: Sequence[str], *, insecure: bool) -> None:
        """Serves block devices too. Raises BadConfig."""
        self._admin.nbd = await self._nbd.start(addresses, insecure=insecure)

    async def stop(self) -> None:
        """Takes no more calls, and lets those under way end, for a while."""
        await self._health.enter_graceful_shutdown()
        await asyncio.gather(self._server.stop(_GRACE_S), self._nbd.stop(_GRACE_S))

    def tell_coordinator_state(self, state: str) -> None:
        self._admin.coordinator_state = state


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


def _configure_logging(level: str) -> None:
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
