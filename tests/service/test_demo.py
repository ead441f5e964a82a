"""The demo, as a newcomer runs it: without a terminal, interrupted, and with nonsense."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from vswap.cli import exits
from vswap.cli.demo import plan as plans
from vswap.cli.demo.stage import PREFIX, SHM, clear_remains
from vswap.client import Operator

DEMO = [sys.executable, "-m", "vswap.cli.main", "demo", "--pages", str(plans.LEAST_PAGES)]


@pytest.fixture
def own_tmp(tmp_path: Path) -> dict[str, str]:
    """An environment whose temporary directory is the test's own."""
    return {**os.environ, "TMPDIR": str(tmp_path)}


def remains(tmp_path: Path) -> list[str]:
    """Directories and processes of demos below this temporary directory."""
    directories = [str(path) for path in tmp_path.glob(f"{PREFIX}*")]
    return directories + [str(process) for process in _processes(tmp_path)]


def test_a_small_demo_shows_what_it_claims(tmp_path: Path, own_tmp: dict[str, str]) -> None:
    """With --keep, so that what goes on running can be reached and stopped as it says."""
    file = tmp_path / "out.json"
    try:
        done = subprocess.run(
            [*DEMO, "--seconds", "2", "--keep", "--json", str(file)],
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
            env=own_tmp,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        address = done.stdout.partition("VSWAP_COORDINATOR=")[2].split()[0]
        with Operator(address) as cluster:
            assert [node.state for node in cluster.cluster().nodes] == ["connected"] * 2
    finally:
        for stop in tmp_path.glob(f"{PREFIX}*/stop.sh"):
            subprocess.run(["sh", str(stop)], check=False, timeout=30)
    psutil.wait_procs(_processes(tmp_path), timeout=10)
    assert remains(tmp_path) == []
    assert done.stderr == ""
    assert "NO " not in done.stdout
    result: dict[str, Any] = json.loads(file.read_text())
    assert result["wrong_pages"] == result["lost_pages"] == result["failed_ops"] == 0
    assert result["logical_bytes"] == plans.LEAST_PAGES * plans.PAGE_BYTES
    assert set(result["backends_used"]) == {"ram", "zram", "redis-a", "redis-b", "objects", "fill"}
    drain = result["drain"]
    assert set(drain) == {
        "tier", "pages_moved", "bytes_moved", "seconds", "ops_meanwhile", "keys_before",
        "keys_left",
    }  # fmt: skip
    assert drain["keys_before"] > 0
    assert drain["keys_left"] == 0
    assert drain["pages_moved"] > 1000
    assert drain["ops_meanwhile"] > 1000
    compaction = result["compaction"]
    assert compaction["utilisation_before"] < 0.6
    assert compaction["utilisation_after"] >= 0.85
    assert compaction["backend_bytes_after"] < compaction["backend_bytes_before"]
    for key in ("latency_us", "latency_us_during_drain"):
        assert result[key]["load"]["p99"] > 0
    assert result["sample"]["wrong_pages"] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_demo_leaves_nothing(
    tmp_path: Path, own_tmp: dict[str, str], number: signal.Signals
) -> None:
    process = subprocess.Popen(
        DEMO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=own_tmp
    )
    assert process.stdout is not None
    said = ""
    while "Fill" not in said:
        line = process.stdout.readline()
        assert line, said
        said += line
    (stage,) = tmp_path.glob(f"{PREFIX}*")
    state = SHM / stage.name
    assert state.is_dir()
    process.send_signal(number)
    rest, _ = process.communicate(timeout=30)
    assert "Traceback" not in rest
    if number == signal.SIGKILL:
        # Its children die with it; its files are taken away by the next demo.
        gone, alive = psutil.wait_procs(_processes(tmp_path), timeout=15)
        assert not alive, gone
        previous = tempfile.tempdir
        tempfile.tempdir = str(tmp_path)
        try:
            until_s = time.monotonic() + 15
            # A process that is ending has no command line any more, and its files still open.
            while not (removed := clear_remains()):
                assert time.monotonic() < until_s
                time.sleep(0.05)
            assert len(removed) == 1
        finally:
            tempfile.tempdir = previous
    else:
        assert process.returncode == exits.INTERRUPTED, rest
    assert remains(tmp_path) == []
    assert not state.exists()


def _processes(tmp_path: Path) -> list[psutil.Process]:
    """Processes of demos: a Redis server renames itself, but it works in its directory."""
    return [
        process
        for process in psutil.process_iter(["cmdline", "cwd"])
        if any(
            str(tmp_path) in word
            for word in [*(process.info["cmdline"] or []), process.info["cwd"] or ""]
        )
    ]


def test_too_few_pages_are_wrong_usage(own_tmp: dict[str, str]) -> None:
    done = subprocess.run(
        [*DEMO[:-1], "10"], capture_output=True, text=True, timeout=60, check=False, env=own_tmp
    )
    assert done.returncode == exits.USAGE
    assert "Traceback" not in done.stderr
