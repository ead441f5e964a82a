"""Where the demo runs: its directories, and whether this machine has room for it.

Two directories, both private: one below the temporary directory (configuration, logs, objects) and
one in shared memory (the nodes' pages). Every process of a demo inherits a lock on the first, so a
demo of which anything is still alive can be told from the remains of one that was killed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

import psutil

from vswap.cli import units
from vswap.cli.demo.plan import Plan
from vswap.wire.errors import Refused

PREFIX = "vswap-demo-"
SHM = Path("/dev/shm")

_SPARE_BYTES = 64 << 20


def check_room(plan: Plan) -> None:
    """Refused, naming what is short, unless memory, shared memory and disk suffice."""
    temporary = Path(tempfile.gettempdir())
    rooms = [
        ("memory", plan.ram_bytes, psutil.virtual_memory().available, "close something"),
        (
            f"shared memory ({SHM})",
            plan.shm_bytes,
            shutil.disk_usage(SHM).free if SHM.is_dir() else 0,
            "in Docker use --shm-size=1g",
        ),
        (f"disk ({temporary})", plan.disk_bytes, shutil.disk_usage(temporary).free, "set TMPDIR"),
    ]
    for what, need, free, remedy in rooms:
        if free < need + _SPARE_BYTES:
            raise Refused(
                f"the demo needs {units.size(need + _SPARE_BYTES)} of {what}, "
                f"{units.size(free)} are free: {remedy}, or ask for fewer --pages",
                need=need,
                free=free,
            )


def clear_remains() -> list[Path]:
    """Remove what demos of this user that were killed left behind; returns what was removed."""
    removed = []
    for directory in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        lock = directory / "lock"
        if directory.is_symlink() or directory.stat().st_uid != os.getuid() or not lock.exists():
            continue
        with lock.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            _remove(directory)
            removed.append(directory)
    return removed


class Stage:
    """The directories of one demo. ``lock_fd`` is to be inherited by all its processes."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix=PREFIX))
        self.state = SHM / self.directory.name
        self.lock_fd = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self.lock_fd, fcntl.LOCK_EX)
        self.state.mkdir(mode=0o700)
        for name in ("objects", "logs", "redis-a", "redis-b"):
            (self.directory / name).mkdir()

    def keep_logs(self) -> Path:
        """Copy the daemons' logs to where `remove` leaves them alone; returns where."""
        target = Path(tempfile.mkdtemp(prefix="vswap-logs-"))
        shutil.copytree(self.directory / "logs", target, dirs_exist_ok=True)
        return target

    def remove(self) -> None:
        """Remove everything. Idempotent."""
        _remove(self.directory)

    def close(self) -> None:
        """Leave everything to the processes that go on."""
        os.close(self.lock_fd)


def _remove(directory: Path) -> None:
    shutil.rmtree(SHM / directory.name, ignore_errors=True)
    shutil.rmtree(directory, ignore_errors=True)
