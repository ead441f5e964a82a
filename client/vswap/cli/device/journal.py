"""What was done to attach a device: on file before it is done, so that it can be undone in order.

Also by another process, after a kill at any point: each step is found by what is true of the
machine, not by what we believe to have done.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from vswap.wire.errors import Refused, StateInvalid

VERSION = 1
DIRECTORY = Path("/run/vswap/attached")

Step = dict[str, Any]
Undo = Callable[[Step], None]


class Journal:
    """The steps of one attached device. A context that holds the file's lock."""

    def __init__(self, name: str, directory: Path = DIRECTORY, *, wait: bool = False) -> None:
        self.name = name
        self.path = directory / f"{name}.json"
        self.log = directory / f"{name}.log"
        """What those say who serve the device."""
        self._wait = wait
        self.steps: list[Step] = []
        self._fd = -1

    def __enter__(self) -> Journal:
        """Locks and reads. Raises StateInvalid, or Refused while another command is at it, unless
        we are to wait for it."""
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = self.path.with_suffix(".lock")
        self._fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | (0 if self._wait else fcntl.LOCK_NB))
        except OSError as error:
            os.close(self._fd)
            raise Refused(f"{self.name} is being attached or detached by another command") from (
                error
            )
        try:
            self.steps = self._read()
        except BaseException:
            os.close(self._fd)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        os.close(self._fd)

    def _read(self) -> list[Step]:
        try:
            state = json.loads(self.path.read_text())
            if state["version"] != VERSION:
                raise StateInvalid(f"{self.path} has format version {state['version']}")
            return list(state["steps"])
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError) as error:
            raise StateInvalid(f"{self.path} is damaged: {error}", path=str(self.path)) from error

    def _save(self) -> None:
        if not self.steps:
            self.path.unlink(missing_ok=True)
            return
        temporary = self.path.with_suffix(".new")
        temporary.write_text(json.dumps({"version": VERSION, "steps": self.steps}, indent=1))
        temporary.replace(self.path)

    def begin(self, kind: str, **facts: Any) -> Step:
        """Notes a step that is about to be done. Facts found out while doing it: :meth:`amend`."""
        step = {"kind": kind, **facts}
        self.steps.append(step)
        self._save()
        return step

    def amend(self, step: Step, **facts: Any) -> None:
        step.update(facts)
        self._save()

    def find(self, kind: str) -> Step | None:
        return next((step for step in self.steps if step["kind"] == kind), None)

    def undo(self, undoers: Mapping[str, Undo]) -> None:
        """Undoes all steps, the last one first; stops at one that cannot be undone, and raises.

        What is left stays on file, for another try.
        """
        while self.steps:
            step = self.steps[-1]
            undoers[step["kind"]](step)
            self.steps.pop()
            self._save()


class Users:
    """Who uses an attachment that others might undo: a context, and a lock that dies with us."""

    def __init__(self, name: str, directory: Path = DIRECTORY) -> None:
        self._path = directory / f"{name}.users"
        self._fd = -1

    def __enter__(self) -> Users:
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_SH)
        return self

    def others(self) -> bool:
        """Whether anybody else uses it. Ask with the journal open: then nobody can begin to."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            # Turning one kind of lock into the other may lose the first.
            fcntl.flock(self._fd, fcntl.LOCK_SH)
            return True
        return False

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def attached(directory: Path = DIRECTORY) -> list[str]:
    """Names of what is attached, or was half attached when a command died."""
    return sorted(path.stem for path in directory.glob("*.json"))
