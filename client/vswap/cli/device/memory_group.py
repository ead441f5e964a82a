"""Memory control groups, of version 1 or 2: what bounds a program's RAM."""

from __future__ import annotations

import os
import time
from pathlib import Path

from vswap.wire.errors import Refused

_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")
_NO_SWAP = {1: "memory.swappiness", 2: "memory.swap.max"}
"""Where 0 keeps a group's memory from being swapped out."""


class MemoryGroup:
    """A group with a limit on RAM, and none on swap."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.version = 1 if _V1 in path.parents else 2

    @classmethod
    def at(cls, name: str) -> MemoryGroup:
        """Where a group of that name is, or would be. Raises Refused without control groups."""
        if (_V1 / "memory.limit_in_bytes").exists():
            return cls(_V1 / name)
        controllers = _V2 / "cgroup.subtree_control"
        if not controllers.exists():
            raise Refused("this machine has no memory control groups")
        if "memory" not in controllers.read_text().split():
            try:
                controllers.write_text("+memory")
            except OSError as error:
                raise Refused(f"{controllers}: {error.strerror}: cannot limit memory") from error
        return cls(_V2 / name)

    def make(self, limit_bytes: int) -> None:
        try:
            self.path.mkdir(exist_ok=True)
            limit = "memory.limit_in_bytes" if self.version == 1 else "memory.max"
            (self.path / limit).write_text(str(limit_bytes))
        except OSError as error:
            raise Refused(f"{self.path}: {error.strerror}: cannot limit memory") from error

    def forbid_swap(self) -> None:
        """What is in it is never swapped out. (Version 1: as long as there is other memory.)"""
        file = self.path / _NO_SWAP[self.version]
        try:
            self.path.mkdir(exist_ok=True)
            file.write_text("0")
        except OSError as error:
            raise Refused(f"{file}: {error.strerror}: cannot keep it from being swapped") from error

    def enter(self, pid: int) -> None:
        (self.path / "cgroup.procs").write_text(str(pid))

    def remove(self) -> None:
        """Removes it; processes that are still in it go to the group above."""
        if not self.path.exists():
            return
        for _ in range(50):
            for pid in (self.path / "cgroup.procs").read_text().split():
                try:
                    (self.path.parent / "cgroup.procs").write_text(pid)
                except ProcessLookupError:
                    continue
            try:
                os.rmdir(self.path)
                return
            except OSError:
                time.sleep(0.05)
        raise Refused(f"{self.path} cannot be removed")


def may_be_swapped(pid: int) -> bool:
    """Whether no group of a process keeps it from being swapped out."""
    return groups_let_swap(Path(f"/proc/{pid}/cgroup"))


def groups_let_swap(told: Path) -> bool:
    """The same, of the groups that such a file tells."""
    for line in told.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            files = [_V1 / path.strip("/") / _NO_SWAP[1]]
        elif not controllers:
            # What a group may not, none below it may.
            steps = Path(path.strip("/"))
            files = [_V2 / step / _NO_SWAP[2] for step in (steps, *steps.parents)]
        else:
            continue
        if any(file.exists() and file.read_text().strip() == "0" for file in files):
            return False
    return True


def remove_dead(prefix: str) -> None:
    """Removes groups named ``prefix`` and a process number whose process is gone."""
    for path in MemoryGroup.at(prefix).path.parent.glob(f"{prefix}*"):
        number = path.name.removeprefix(prefix)
        if number.isdecimal() and not Path(f"/proc/{number}").exists():
            MemoryGroup(path).remove()
