"""Child processes that never outlive the demo, unless they are meant to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from vswap.wire.errors import InternalError

_STOP_S = 10.0

# Runs `vswap ARGUMENTS`; argv[1] is the parent with whose death it shall die, or 0.
_CHILD = """
import ctypes, os, signal, sys
parent = int(sys.argv.pop(1))
if parent:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(1)
from vswap.cli.main import main
main()
"""


class Daemon:
    """A `vswap` process in a session of its own, so that Ctrl-C reaches only the demo itself.

    Call from the main thread: the kernel ties a child's life to the thread that started it.
    """

    def __init__(
        self, name: str, arguments: Sequence[str], log: Path, lock_fd: int, *, outlives: bool
    ) -> None:
        self.name = name
        self.log = log
        parent = "0" if outlives else str(os.getpid())
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _CHILD, parent, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=[lock_fd],
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def check(self) -> None:
        """InternalError with the end of its log if the process is no more."""
        code = self._process.poll()
        if code is not None:
            tail = self.log.read_text(errors="replace").strip().splitlines()[-1:]
            said = f": {tail[0]}" if tail else ""
            raise InternalError(f"{self.name} ended with code {code}{said}", log=str(self.log))

    def address(self, file: Path, timeout_s: float = 30.0) -> str:
        """Where it listens, once it says so in its ``address`` file."""
        until_s = time.monotonic() + timeout_s
        while time.monotonic() < until_s:
            self.check()
            if file.exists() and (address := file.read_text().strip()):
                return address
            time.sleep(0.02)
        raise InternalError(f"{self.name} is not up after {timeout_s:.0f} s", log=str(self.log))

    def terminate(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def wait(self) -> None:
        """Wait for its end, which is not asked for politely for ever."""
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
