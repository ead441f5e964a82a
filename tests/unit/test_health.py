"""The health check of containers: exit codes, in both of its forms."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

FORMS = (["-m", "vswap.cli.health"], ["-m", "vswap.cli.main", "health"])


@pytest.fixture
def server() -> Iterator[tuple[str, health.HealthServicer]]:
    servicer = health.HealthServicer()
    with ThreadPoolExecutor(2) as threads:
        daemon = grpc.server(threads)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, daemon)
        port = daemon.add_insecure_port("127.0.0.1:0")
        daemon.start()
        yield f"127.0.0.1:{port}", servicer
        daemon.stop(0).wait()


def check(form: list[str], *arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, *form, *arguments], capture_output=True, text=True, check=False, timeout=30
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("form", FORMS)
def test_codes(form: list[str], server: tuple[str, health.HealthServicer]) -> None:
    address, servicer = server
    assert check(form, address) == (0, "")
    servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    code, said = check(form, address)
    assert (code, said) == (4, f"vswap: {address} does not serve\n")


@pytest.mark.parametrize("form", FORMS)
def test_nobody_there_is_unreachable(form: list[str]) -> None:
    code, said = check(form, "127.0.0.1:1")
    assert code == 4
    assert said.startswith("vswap: cannot reach 127.0.0.1:1")
    assert said.count("\n") == 1


@pytest.mark.parametrize("form", FORMS)
def test_an_address_is_needed(form: list[str]) -> None:
    assert check(form)[0] == 2
