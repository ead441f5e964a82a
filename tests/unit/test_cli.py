"""The command's small parts: units, exit codes, JSON, and errors as one line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from client_support import DictNode, dict_node, run_vswap

from vswap.cli import exits, jobs, output, tiers, units, watch
from vswap.cli.demo import plan as plans
from vswap.v1 import common_pb2, coordinator_pb2, node_pb2
from vswap.wire import errors


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4096", 4096),
        ("0", 0),
        ("1k", 1024),
        ("1KiB", 1024),
        ("1KB", 1000),
        ("256MiB", 256 << 20),
        ("256M", 256 << 20),
        ("1.5G", 3 << 29),
        ("2GB", 2 * 10**9),
        ("3 TiB", 3 << 40),
        ("7b", 7),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert units.parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "x", "1X", "-1", "1 2", "1KiBs", "GiB", "1ib"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        units.parse_size(text)


@pytest.mark.parametrize(
    ("text", "expected"), [("90", 90), ("90s", 90), ("10m", 600), ("1.5h", 5400), ("1d", 86400)]
)
def test_durations(text: str, expected: float) -> None:
    assert units.parse_duration(text) == expected


@pytest.mark.parametrize("text", ["", "1w", "m", "-3s"])
def test_bad_durations(text: str) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        units.parse_duration(text)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (200 << 20, "200 MiB"),
        ((1 << 30) - 1, "1.0 GiB"),
        (5 << 60, "5120 PiB"),
    ],
)
def test_sizes_are_readable(count: int, expected: str) -> None:
    assert units.size(count) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (-1, "?"),
        (0.42, "0.4 s"),
        (42, "42 s"),
        (187, "3m 07s"),
        (7500, "2h 05m"),
        (2e5, "2d 07h"),
    ],
)
def test_durations_are_readable(seconds: float, expected: str) -> None:
    assert units.duration(seconds) == expected


def test_every_error_has_an_exit_code() -> None:
    assert set(exits.CODES) == set(errors.GRPC_STATUS)
    assert set(exits.CODES.values()) <= set(exits.MEANINGS)
    assert exits.exit_code(RuntimeError()) == exits.INTERNAL


def test_json_has_every_key_whatever_the_values() -> None:
    empty = output.plain(coordinator_pb2.Job())
    assert empty["state"] == "unspecified"
    assert empty["spec"]["kind"] == "unspecified"
    assert empty["nodes"] == []
    full = output.plain(
        coordinator_pb2.Job(
            id="j",
            state="JOB_STATE_DONE",
            bytes_moved=1 << 60,
            spec=coordinator_pb2.JobSpec(kind="MOVE_KIND_DRAIN"),
            nodes=[coordinator_pb2.JobNode(node="n")],
            room_bytes={"b": 2, "a": 1},
        )
    )
    assert full["state"] == "done"
    assert full["spec"]["kind"] == "drain"
    assert full["bytes_moved"] == 1 << 60
    assert list(full["room_bytes"]) == ["a", "b"]
    assert set(full) == set(empty)
    json.dumps(full)


# ------------------------------------------------------------------ the command itself


@pytest.fixture
def node() -> Iterator[DictNode]:
    with dict_node() as node:
        yield node


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("vswap: ")
    return lines[0]


def test_nobody_there_is_one_line_and_code_4() -> None:
    done = run_vswap("status", "--coordinator", "127.0.0.1:1")
    assert done.returncode == exits.UNREACHABLE
    assert "127.0.0.1:1" in one_line(done)


def test_wrong_usage_is_code_2() -> None:
    for arguments in (["drain"], ["status", "--nope"], ["compact", "x", "--rate", "fast"]):
        done = run_vswap(*arguments)
        assert done.returncode == exits.USAGE
        assert "Traceback" not in done.stderr


def test_wrong_addresses_and_configurations_are_code_2(tmp_path: Path) -> None:
    done = run_vswap("status", "--coordinator", "nonsense")
    assert (done.returncode, "nonsense" in one_line(done)) == (exits.USAGE, True)
    done = run_vswap("run", "node", "--config", str(tmp_path / "none.toml"))
    assert (done.returncode, "none.toml" in one_line(done)) == (exits.USAGE, True)


def test_a_password_on_the_command_line_is_refused_and_not_repeated() -> None:
    done = run_vswap("tier", "add", "x", "redis://user:hunter2@localhost")
    assert done.returncode == exits.USAGE
    assert "hunter2" not in one_line(done)


def test_node_commands_without_a_coordinator(node: DictNode) -> None:
    at = ["--node-address", node.address]
    shown = json.loads(run_vswap("node", "show", *at, "--json").stdout)
    assert shown["tiers"][0]["tier"] == "ram"
    assert shown["tiers"][0]["state"] == "active"
    assert "ram" in run_vswap("status", *at).stdout
    assert json.loads(run_vswap("space", "list", *at, "--json").stdout)[0]["name"] == "default"
    done = run_vswap("space", "set", "default", "--quota", "1G", "--tier-max", "ram=5MiB", *at)
    assert "quota 1.0 GiB" in done.stdout
    assert "at most 5.0 MiB in ram" in done.stdout
    set_space = next(r for r in node.requests if isinstance(r, node_pb2.SetSpaceRequest))
    assert set_space.limits.tier_max_bytes["ram"] == 5 << 20
    done = run_vswap("space", "create", "default", *at)
    assert (done.returncode, "there is one" in one_line(done)) == (exits.REFUSED, True)
    done = run_vswap("space", "set", "none", "--quota", "1", *at)
    assert (done.returncode, "there: default" in one_line(done)) == (exits.USAGE, True)


def test_loadgen_reports_and_its_code_tells_of_wrong_pages(node: DictNode, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    arguments = [
        "loadgen", "--node-address", node.address, "--pages", "500", "--ops", "2000",
        "--content", "random", "--json", str(file),
    ]  # fmt: skip
    done = run_vswap(*arguments)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert result["wrong_pages"] == result["failed_ops"] == 0
    assert result["pages_stored"] >= 500
    assert result["logical_bytes"] == 500 * 4096
    assert set(result["latency_us"]["store"]) == {"p50", "p90", "p99", "p999", "max"}
    assert "fill" in result["tiers"]

    def damage(request: object) -> None:
        if isinstance(request, node_pb2.LoadRequest):
            node.pages[next(iter(node.pages))] = bytes(4096)

    node.before = damage
    done = run_vswap(*arguments)
    assert done.returncode == exits.INTEGRITY
    assert "wrong page" in done.stderr
    node.before = lambda request: None


def test_a_closed_pipe_is_quiet(node: DictNode) -> None:
    command = f"{sys.executable} -m vswap.cli.main node show --node-address {node.address} | true"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""


# ------------------------------------------------------------------ the demo's plan


def test_the_plan_needs_every_tier() -> None:
    import numpy as np

    base = np.random.default_rng(0).integers(0, 64, (1024, 4096), dtype=np.uint8)
    plan = plans.make(2, plans.PAGES, base)
    stored = plans.PAGES * (1 - plans.FILL)
    ram = 2 * plan.capacity_bytes[plans.RAM] / 4096
    rest = 2 * plan.capacity_bytes[plans.ZRAM] + plan.capacity_bytes[plans.REDIS_A]
    rest += plan.capacity_bytes[plans.REDIS_B]
    assert plan.logical_bytes >= 1 << 30
    assert stored - ram - rest / plan.record_bytes > 0.1 * plans.PAGES
    assert plan.capacity_bytes[plans.OBJECTS] > stored * plan.record_bytes
    with pytest.raises(errors.InvalidRequest):
        plans.make(2, 100, base)


def test_tier_state_names_are_short() -> None:
    assert output.enum_name(common_pb2.Tier(state="TIER_STATE_DRAINED"), "state") == "drained"


def test_a_shared_tier_that_nodes_cannot_use_is_remarked_upon() -> None:
    def info(name: str, error: str) -> coordinator_pb2.TierInfo:
        tier = common_pb2.Tier(spec=common_pb2.TierSpec(name=name))
        usage = common_pb2.TierUsage(tier=name, available=not error, error=error)
        return coordinator_pb2.TierInfo(tier=tier, usage=usage)

    status = coordinator_pb2.ClusterStatus(tiers=[info("a", ""), info("b", "n1: no password")])
    assert [*tiers.unavailable(status)] == ["b is not available at n1: no password"]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_detaches_whatever_becomes_of_it(
    kind: type[BaseException], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the midst of taking a lock it becomes a RuntimeError."""

    def interrupted(cluster: Any, job_id: str) -> Any:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise kind("cannot release un-acquired lock") from None

    monkeypatch.setattr(watch, "watch", interrupted)
    before = signal.getsignal(signal.SIGINT)
    cluster: Any = None
    with pytest.raises(typer.Exit) as ended:
        jobs._follow(cluster, "drain-1", as_json=False)
    assert ended.value.exit_code == exits.INTERRUPTED
    assert "vswap job cancel drain-1" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
