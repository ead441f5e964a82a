"""Nodes that die at a crash point: forked off a server that has imported everything, so that a
start takes a tenth of a second. Processes of their own all the same.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from chaos import points
from processes import Daemon

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["__main__", "chaos.preload"])


def _start_server() -> None:
    """The server does not inherit where we import from."""
    before = os.environ.copy()
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


class Process:
    """As much of a Popen as :class:`Daemon` asks for."""

    def __init__(self, process: ForkServerProcess) -> None:
        self._process = process
        process.start()
        self.pid = process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("node", timeout or 0)
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def send_signal(self, number: int) -> None:
        assert self.pid is not None
        os.kill(self.pid, number)


class DoomedNode(Daemon):
    """A node that can be told where to die."""

    def launch(self, fate: str = "") -> DoomedNode:
        """``fate``: the crash point at which it dies while it starts."""
        _start_server()
        (self.state / "address").unlink(missing_ok=True)
        flags = ["--state", str(self.state), *self._flags]
        process = _context.Process(target=_run, args=(self.log, self._told, flags, fate))
        self.process = Process(process)  # type: ignore[assignment]
        return self

    @property
    def _told(self) -> Path:
        return self.log.with_suffix(".fate")

    def arm(self, name: str, passes: int) -> None:
        """From now on it may pass the point so many times; then it dies there."""
        assert self.process is not None
        self._told.write_text(f"{name} {passes}")
        self.process.send_signal(signal.SIGUSR1)


def _run(log: Path, told: Path, flags: list[str], fate: str) -> None:
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)

    def on_signal(*_: object) -> None:
        name, passes = told.read_text().split()
        points.arm(name, int(passes))

    signal.signal(signal.SIGUSR1, on_signal)
    points.arm(fate, 0)
    sys.argv = ["vswap", "run", "node", *flags]
    from chaos.preload import main

    main()
