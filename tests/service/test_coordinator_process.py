"""The coordinator as a process of its own: kills, restarts, stops, and starts that must fail."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from links import LinkNode

from vswap.client import Operator
from vswap.coordinator.store import FILE
from vswap.v1 import common_pb2, coordinator_pb2
from vswap.wire.errors import Unreachable

MIB = 2**20
COMMAND = [sys.executable, "-m", "vswap.cli.main", "run", "coordinator"]


class Process:
    """A coordinator over one state directory; may be killed and started again."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.state = directory / "state"
        self.process: subprocess.Popen[str] | None = None
        self.address = ""

    def start(self, listen: str = "127.0.0.1:0") -> None:
        arguments = ["--listen", listen, "--state", str(self.state), "--lease", "1"]
        file = self.state / "address"
        file.unlink(missing_ok=True)
        self.process = subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, text=True)
        until = time.monotonic() + 20
        while not file.exists():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < until
            time.sleep(0.02)
        self.address = file.read_text().strip()

    def end(self, number: signal.Signals) -> tuple[int, str]:
        """Returns the exit code and what was written to stderr."""
        assert self.process is not None
        self.process.send_signal(number)
        _, stderr = self.process.communicate(timeout=20)
        code, self.process = self.process.returncode, None
        return code, stderr

    def fails(self, *arguments: str) -> tuple[int, str]:
        """Exit code and the one line of a start that must not succeed."""
        done = subprocess.run(
            [*COMMAND, "--state", str(self.state), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        assert "Traceback" not in done.stderr
        lines = done.stderr.strip().splitlines()
        assert len(lines) == 1, lines
        return done.returncode, lines[0]

    def operator(self) -> Operator:
        return Operator(self.address)


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    process = Process(tmp_path)
    yield process
    if process.process is not None:
        process.end(signal.SIGKILL)


def add(process: Process, name: str, rank: int) -> None:
    with process.operator() as operator:
        operator.add_tier(
            common_pb2.TierSpec(
                name=name,
                url=f"file://{process.directory}/{name}",
                capacity_bytes=1000 * MIB,
                rank=rank,
            )
        )


async def test_a_drain_survives_kill_9_of_the_coordinator(process: Process) -> None:
    process.start()
    add(process, "a", 10)
    add(process, "b", 20)
    one, two = LinkNode(process.address, "n1"), LinkNode(process.address, "n2")
    await one.connect()
    await two.connect()
    await one.store("a", 300 * MIB)
    await two.store("a", 200 * MIB)
    with process.operator() as operator:
        spec = coordinator_pb2.JobSpec(kind="MOVE_KIND_DRAIN", tier="a")
        job_id = await asyncio.to_thread(lambda: operator.start_job(spec).id)
        await one.until(lambda: job_id in one.directives)
        await two.until(lambda: job_id in two.directives)
        one.move(job_id, 100 * MIB, "b")
        two.move(job_id, 200 * MIB, "b")
        while operator.cluster().tiers[0].usage.live_bytes != 200 * MIB:
            await asyncio.sleep(0.02)
    cluster, generation = one.cluster, one.generation

    process.end(signal.SIGKILL)
    await one.closed()
    await two.closed()
    # Meanwhile the nodes go on with what they were told.
    one.stored["a"] -= 50 * MIB
    one.stored["b"] = one.stored.get("b", 0) + 50 * MIB
    one.moved[job_id] += 50 * MIB
    process.start()
    with process.operator() as operator:
        [job] = await asyncio.to_thread(operator.jobs)
        assert job.id == job_id
        one.address = two.address = process.address
        one.directives.clear()
        await one.connect()
        await one.until(lambda: job_id in one.directives)
        assert (one.cluster, one.generation) == (cluster, generation)
        assert one.tiers["a"].state == common_pb2.TIER_STATE_DRAINING
        # The other node's words were on disk, or it is named until it is back.
        job = next(iter(operator.watch_job(job_id)))
        assert job.state in (
            coordinator_pb2.JOB_STATE_RUNNING,
            coordinator_pb2.JOB_STATE_BLOCKED,
        )
        one.move(job_id, 150 * MIB, "b")
        await two.connect()
        two.report()
        shown = await asyncio.wait_for(
            asyncio.to_thread(lambda: list(operator.watch_job(job_id))), 20
        )
        assert shown[-1].state == coordinator_pb2.JOB_STATE_DONE
        assert shown[-1].bytes_moved == 500 * MIB
        tier = operator.cluster().tiers[0]
        assert tier.tier.state == common_pb2.TIER_STATE_DRAINED
    await one.disconnect()
    await two.disconnect()


async def test_grants_survive_kill_9(process: Process) -> None:
    process.start()
    add(process, "a", 10)
    one = LinkNode(process.address, "n1")
    await one.connect()
    await one.store("a", 700 * MIB)
    process.end(signal.SIGKILL)
    await one.closed()
    process.start()
    two = LinkNode(process.address, "n2")
    await two.connect()
    two.say(grant_request=coordinator_pb2.GrantRequest(tier="a", total_bytes=900 * MIB))
    await two.until(lambda: "a" in two.grants)
    assert two.grants["a"] == 300 * MIB
    await two.disconnect()


async def test_a_frozen_coordinator_fences_nobody(process: Process) -> None:
    process.start()
    add(process, "a", 10)
    async with LinkNode(process.address) as node:
        await node.store("a", 10 * MIB)
        assert process.process is not None
        process.process.send_signal(signal.SIGSTOP)
        for _ in range(10):
            await asyncio.sleep(0.25)
            node.report()
        process.process.send_signal(signal.SIGCONT)
        await asyncio.sleep(0.5)
        node.report()
        await node.store("a", 20 * MIB)
        with process.operator() as operator:
            [info] = operator.cluster().nodes
        assert info.state == "connected"
        assert node.error is None


def test_sigterm_ends_it_well_and_state_stays(process: Process) -> None:
    process.start()
    add(process, "a", 10)
    with process.operator() as operator:
        before = operator.cluster()
    code, stderr = process.end(signal.SIGTERM)
    assert code == 0
    assert "listening" in stderr
    assert not (process.state / "address").exists()
    assert (process.state.stat().st_mode & 0o777) == 0o700
    process.start(f"unix:{process.directory}/c.sock")
    with process.operator() as operator:
        after = operator.cluster()
    assert (after.cluster_uuid, after.generation) == (before.cluster_uuid, before.generation)
    assert [tier.tier.spec.name for tier in after.tiers] == ["a"]
    assert process.end(signal.SIGINT)[0] == 0


def test_a_stop_does_not_wait_for_connected_nodes(process: Process) -> None:
    process.start()

    async def stop_it() -> float:
        async with LinkNode(process.address) as node:
            begin = time.monotonic()
            code, _ = await asyncio.to_thread(process.end, signal.SIGTERM)
            assert code == 0
            await node.closed()
            return time.monotonic() - begin

    assert asyncio.run(stop_it()) < 5


def test_starts_that_must_fail_say_why_in_one_line(process: Process) -> None:
    process.start()
    assert process.process is not None
    code, line = process.fails("--listen", "127.0.0.1:0")
    assert code == 3
    assert f"pid {process.process.pid}" in line
    taken, address = process.address, process.address
    process.state = process.directory / "other"
    code, line = process.fails("--listen", taken)
    assert code == 2
    assert address in line
    code, line = process.fails("--listen", "0.0.0.0:0")
    assert code == 2
    assert "--insecure" in line
    code, line = process.fails("--listen", "nonsense")
    assert code == 2
    process.state.mkdir(exist_ok=True)
    (process.state / FILE).write_bytes(b"\0" * 5000)
    code, line = process.fails("--listen", "127.0.0.1:0")
    assert code == 3
    assert "move its directory away" in line
    config = process.directory / "c.toml"
    config.write_text("[balance]\nenabld = true\n")
    code, line = process.fails("--config", str(config))
    assert code == 2
    assert "balance.enabld: unknown key" in line


def test_a_copy_of_the_one_file_is_a_backup(process: Process) -> None:
    """Made while it runs, and taken up elsewhere; never in the place of a newer one unasked."""
    process.start()
    add(process, "a", 10)
    copy = (process.state / FILE).read_bytes()
    add(process, "b", 20)
    process.end(signal.SIGKILL)
    (process.state / FILE).write_bytes(copy)
    code, line = process.fails("--listen", "127.0.0.1:0")
    assert code == 3
    assert "older than what was written last" in line
    assert str(process.state / "begun") in line
    (process.state / FILE).unlink()
    code, line = process.fails("--listen", "127.0.0.1:0")
    assert code == 3
    assert "missing" in line
    process.state = process.directory / "elsewhere"
    process.state.mkdir()
    (process.state / FILE).write_bytes(copy)
    process.start()
    with process.operator() as operator:
        assert [info.tier.spec.name for info in operator.cluster().tiers] == ["a"]


def test_nobody_answers_after_a_kill(process: Process) -> None:
    process.start()
    process.end(signal.SIGKILL)
    with process.operator() as operator, pytest.raises(Unreachable):
        operator.cluster()
    with contextlib.suppress(FileNotFoundError):
        os.unlink(process.state / "address")
