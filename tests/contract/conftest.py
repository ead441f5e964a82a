"""The backends of the contract suite, each with a real server behind it.

To bring a new backend under the contract, add it to ``MAKERS``.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from vswap.cli.embedded import EmbeddedRedis, free_port
from vswap.tiers.backend import Backend
from vswap.tiers.factory import make_backend
from vswap.tiers.ram import RamBackend
from vswap.tiers.region import Region
from vswap.tiers.spec import TierSpec
from vswap.tiers.wrappers.faulty import FaultPlan, Faulty
from vswap.tiers.wrappers.metered import Metered

MIB = 2**20


@pytest.fixture(scope="session")
def redis_server() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(maxmemory_bytes=256 * MIB) as server:
        yield server


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
    "ram", "redis", "redis+unix", "file", "memory", "s3", "metered", "faulty",
)  # fmt: skip


@pytest.fixture
def spec_for(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], TierSpec]:
    def make(kind: str) -> TierSpec:
        if kind == "s3":
            monkeypatch.setitem(os.environ, "AWS_ACCESS_KEY_ID", "test")
            monkeypatch.setitem(os.environ, "AWS_SECRET_ACCESS_KEY", "test")
            url = make_bucket(request.getfixturevalue("s3_server"))
        elif kind.startswith("redis"):
            server = request.getfixturevalue("redis_server")
            url = server.url if kind == "redis" else server.unix_url
        elif kind == "file":
            url = f"file://{tmp_path}/objects"
        else:
            url = "memory:///"
        return TierSpec(name="t", url=url, capacity_bytes=64 * MIB, timeout_s=10)

    return make


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
    else:
        made = make_backend(spec_for(kind))
    await made.open()
    yield made
    await made.close()
