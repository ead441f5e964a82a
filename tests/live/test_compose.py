"""The compose cluster on a real engine: up, load, a drain under load, down.

`make ci` runs it (deploy/ci.sh sees to the engine). The project has a name of its own, so that a
cluster that somebody runs here with `make up` is left alone.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.live, pytest.mark.timeout(420)]

ROOT = Path(__file__).parents[2]
PROJECT = "vswap-live"
# Nothing of a `make` around this is passed on: one below another prints where it enters.
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")},
    "COMPOSE_PROJECT_NAME": PROJECT,
    "VSWAP_PORT": "0",
}
DAEMONS = ("coordinator", "node-a", "node-b")
PAGES = 131_072


def run(*command: str, **variables: str) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**ENVIRONMENT, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def compose(*arguments: str) -> str:
    return run("deploy/compose.sh", *arguments)


def vswap(*arguments: str) -> Any:
    """JSON of a `vswap` command that is run where an operator would: next to the coordinator."""
    return json.loads(compose("exec", "-T", "coordinator", "vswap", *arguments, "--json"))


def keys(server: str) -> int:
    """What the Redis server itself says it holds."""
    return int(compose("exec", "-T", server, "redis-cli", "dbsize"))


def tier_pages() -> dict[str, int]:
    return {info["tier"]["spec"]["name"]: info["usage"]["pages"] for info in vswap("tier", "list")}


def left_behind() -> list[str]:
    label = f"label=com.docker.compose.project={PROJECT}"
    return [
        line
        for what in (("ps", "-a"), ("volume", "ls"), ("network", "ls"))
        for line in run("docker", *what, "-q", "--filter", label).split()
    ]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster by `make up`; `make down` must leave nothing of it."""
    try:
        run("make", "up")
        yield
    except BaseException:
        print(compose("logs", "--no-color", "--tail", "100"))
        raise
    finally:
        run("make", "down")
        assert left_behind() == []


def test_everything_is_there_and_nobody_is_root(cluster: None) -> None:
    status = vswap("status")["cluster"]
    assert {node["name"]: node["state"] for node in status["nodes"]} == {
        "node-a": "connected",
        "node-b": "connected",
    }
    assert {info["tier"]["spec"]["name"] for info in status["tiers"]} == {
        "redis-a",
        "redis-b",
        "objects",
    }
    for daemon in DAEMONS:
        assert compose("exec", "-T", daemon, "id", "-u").strip() == "7070"


def test_load_profile_proves_every_page_in_every_tier(cluster: None) -> None:
    result = json.loads(run("make", "load", VSWAP_LOAD_PAGES=str(PAGES), VSWAP_LOAD_SECONDS="10"))
    assert result["wrong_pages"] == 0
    assert result["failed_ops"] == 0
    assert result["pages_loaded"] > PAGES
    used = {name for name, tier in result["tiers"].items() if tier["pages"] > 0}
    assert used >= {"ram", "zram", "redis-a", "redis-b", "objects", "fill"}


def test_a_redis_server_is_drained_under_load(cluster: None, tmp_path: Path) -> None:
    told = tmp_path / "load.err"
    with told.open("w") as stderr:
        load = subprocess.Popen(
            ["make", "load"],
            cwd=ROOT,
            env={**ENVIRONMENT, "VSWAP_LOAD_PAGES": str(PAGES), "VSWAP_LOAD_SECONDS": "60"},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    try:
        _wait_until_populated(load, told)
        before = keys("redis-a")
        job = vswap("drain", "redis-a")
        after = keys("redis-a")
        during = load.poll() is None and "read back:" not in told.read_text()
        output, _ = load.communicate(timeout=240)
    finally:
        load.kill()
    assert load.returncode == 0, told.read_text()
    took_s = job["ended_at"] - job["created_at"]
    assert during, f"the load was over before the drain, which took {took_s:.0f} s"
    assert before > 0
    assert after == 0
    assert job["state"] == "done"
    assert job["pages_moved"] > 0
    result = json.loads(output)
    assert (result["wrong_pages"], result["failed_ops"]) == (0, 0)
    assert tier_pages()["redis-a"] == 0
    assert keys("redis-a") == 0, "somebody wrote to a drained tier"


def test_a_drained_tier_can_be_used_again(cluster: None) -> None:
    compose("exec", "-T", "coordinator", "vswap", "activate", "redis-a")
    result = json.loads(run("make", "load", VSWAP_LOAD_PAGES=str(PAGES), VSWAP_LOAD_SECONDS="5"))
    assert (result["wrong_pages"], result["failed_ops"]) == (0, 0)
    assert keys("redis-a") > 0


def test_daemons_leave_cleanly(cluster: None) -> None:
    compose("stop", "--timeout", "30", *DAEMONS)
    for daemon in DAEMONS:
        container = compose("ps", "-a", "-q", daemon).strip() or compose("ps", "-q", daemon).strip()
        code = run("docker", "inspect", "--format", "{{.State.ExitCode}}", container).strip()
        assert code == "0", compose("logs", "--no-color", "--tail", "20", daemon)


def _wait_until_populated(load: subprocess.Popen[str], told: Path) -> None:
    """Returns once every page was stored and the load goes on reading and writing."""
    until_s = time.monotonic() + 120
    while load.poll() is None and time.monotonic() < until_s:
        if re.search(r"^populate: .* pages in ", told.read_text(), re.MULTILINE):
            return
        time.sleep(0.2)
    raise AssertionError(f"the load does not get going: {told.read_text()}")
