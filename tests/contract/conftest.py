"""The backends of the contract suite, each with a real server behind it.

To bring a new backend under the contract, add it to ``MAKERS``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import random
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import trustme

from vswap.cli.embedded import EmbeddedRedis, free_port
from vswap.tiers.backend import Backend
from vswap.tiers.factory import make_backend
from vswap.tiers.ram import RamBackend
from vswap.tiers.region import Region
from vswap.tiers.spec import TierSpec
from vswap.tiers.wrappers.faulty import FaultPlan, Faulty
from vswap.tiers.wrappers.guarded import Guarded
from vswap.tiers.wrappers.metered import Metered

MIB = 2**20


@pytest.fixture(scope="session")
def redis_server() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(maxmemory_bytes=256 * MIB) as server:
        yield server


@pytest.fixture(scope="session")
def redis_servers() -> Iterator[list[EmbeddedRedis]]:
    """As many as the widest redundancy here needs."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(EmbeddedRedis(maxmemory_bytes=64 * MIB)) for _ in range(6)]


@dataclass
class Tls:
    port: int
    ca_file: Path


@pytest.fixture(scope="session")
def tls_redis(
    redis_server: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Tls]:
    """TLS in front of the Redis server, the way stunnel does it: wheels come without TLS."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    ca_file = tmp_path_factory.mktemp("tls") / "ca.pem"
    authority.cert_pem.write_to_path(str(ca_file))
    ready: queue.Queue[tuple[int, asyncio.AbstractEventLoop, asyncio.Event]] = queue.Queue()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind, ahead = await asyncio.open_unix_connection(redis_server.unix_path)
        await asyncio.gather(pump(reader, ahead), pump(behind, writer))

    async def run() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
        stop = asyncio.Event()
        ready.put((server.sockets[0].getsockname()[1], asyncio.get_running_loop(), stop))
        await stop.wait()
        server.close()

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    port, loop, stop = ready.get(timeout=10)
    yield Tls(port, ca_file)
    loop.call_soon_threadsafe(stop.set)
    thread.join()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The endpoint of a moto server in a process of its own."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None, "the S3 server does not start"
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


_bucket_count = 0


def make_bucket(endpoint: str) -> str:
    global _bucket_count
    _bucket_count += 1
    name = f"bucket-{_bucket_count}"
    urlopen(Request(f"{endpoint}/{name}", method="PUT"), timeout=10).close()
    return f"s3://{name}?endpoint={endpoint}&region=us-east-1&allow_http=true"


MAKERS = (
    "ram", "redis", "redis+unix", "rediss", "file", "memory", "s3", "metered", "faulty",
    "mirror", "rs", "rs of files",
    "guarded",
)  # fmt: skip
REDUNDANCY = {"mirror": ("mirror:2", 2), "rs": ("rs:4+2", 6)}


@pytest.fixture
def spec_for(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], TierSpec]:
    def make(kind: str) -> TierSpec:
        if kind == "s3":
            monkeypatch.setitem(os.environ, "AWS_ACCESS_KEY_ID", "test")
            monkeypatch.setitem(os.environ, "AWS_SECRET_ACCESS_KEY", "test")
            url = make_bucket(request.getfixturevalue("s3_server"))
        elif kind == "rediss":
            tls = request.getfixturevalue("tls_redis")
            url = f"rediss://127.0.0.1:{tls.port}?ssl_ca_certs={tls.ca_file}"
        elif kind.startswith("redis"):
            server = request.getfixturevalue("redis_server")
            url = server.url if kind == "redis" else server.unix_url
        elif kind == "file":
            url = f"file://{tmp_path}/objects"
        else:
            url = "memory:///"
        return TierSpec(name="t", url=url, capacity_bytes=64 * MIB, timeout_s=10)

    return make


def redundant(kind: str, servers: list[EmbeddedRedis], tmp_path: Path) -> TierSpec:
    """Over Redis servers, or over directories where there are none."""
    redundancy, count = REDUNDANCY[kind.split()[0]]
    urls = [server.url for server in servers[:count]] or [
        f"file://{tmp_path}/server-{i}" for i in range(count)
    ]
    return TierSpec(
        name="t", urls=tuple(urls), redundancy=redundancy, capacity_bytes=64 * MIB, timeout_s=10
    )


@pytest.fixture(params=MAKERS)
async def backend(
    request: pytest.FixtureRequest, spec_for: Callable[[str], TierSpec], tmp_path: Path
) -> AsyncIterator[Backend]:
    kind: str = request.param
    made: Backend
    if kind == "ram":
        made = RamBackend(Region(tmp_path).create("arena", 4096 * MIB), 4096 * MIB)
    elif kind == "metered":
        made = Metered(make_backend(spec_for("file")))
    elif kind == "faulty":
        made = Faulty(make_backend(spec_for("file")), FaultPlan(seed=1, delay=0.2, delay_ms=1))
    elif kind.split()[0] in REDUNDANCY:
        files = kind.endswith("files")
        servers = [] if files else request.getfixturevalue("redis_servers")
        made = make_backend(redundant(kind, servers, tmp_path))
    elif kind == "guarded":
        made = Guarded(make_backend(spec_for("file")), time.monotonic, random.Random(1))
    else:
        made = make_backend(spec_for(kind))
    await made.open()
    yield made
    await made.close()
