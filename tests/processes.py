"""Daemons as separate processes, for service tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType


class Daemon:
    """``vswap run KIND ...`` in a process of its own; ``address`` once it listens."""

    def __init__(self, kind: str, state: Path, *flags: str, environ: dict[str, str] | None = None):
        self.kind = kind
        self.state = state
        self._flags = flags
        self.environ = {**os.environ, **(environ or {})}
        self.log = state.with_suffix(".log")
        self.process: subprocess.Popen[bytes] | None = None

    def launch(self) -> Daemon:
        """Starts without waiting."""
        command = [sys.executable, "-m", "vswap.cli.main", "run", self.kind,
                   "--state", str(self.state), *self._flags]  # fmt: skip
        if "--listen" not in self._flags:
            command += ["--listen", "127.0.0.1:0"]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self.environ
            )
        return self

    def start(self) -> Daemon:
        self.launch()
        deadline = time.monotonic() + 30
        while not (self.state / "address").exists() or not self.address:
            assert self.process is not None
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.02)
        return self

    @property
    def address(self) -> str:
        return (self.state / "address").read_text().strip()

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait(self, timeout_s: float = 30) -> int:
        assert self.process is not None
        return self.process.wait(timeout_s)

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        (self.state / "address").unlink(missing_ok=True)

    def __enter__(self) -> Daemon:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def private_mib(daemon: Daemon) -> int:
    """Memory of its own: shared memory is the tier's, and has its own limit."""
    assert daemon.process is not None
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) // 1024
