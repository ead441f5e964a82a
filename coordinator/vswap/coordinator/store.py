"""Durable state: the documents of :mod:`vswap.coordinator.documents` in one file.

The file is replaced as a whole, atomically, and a write returns once it is on disk: a kill at any
point leaves the state before or after it, and a plain copy of the file, made at any time, is all of
one state. Its first line holds a hash of the rest, so that no damage is taken for state; the
file ``begun`` beside it says how new it must be. Size and the cost of a write are
O(tiers + nodes + jobs): kilobytes. Used by one process, which holds the state directory's lock, and
one thread.

Format version 2, lines of JSON::

    {"vswap": "coordinator", "format": 2, "sha256": of all that follows}
    number of the write that made the file
    [key, body] of a document, one a line
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vswap.coordinator import documents
from vswap.coordinator.documents import FORMAT_VERSION
from vswap.coordinator.state import Key, State
from vswap.wire.errors import StateInvalid

FILE = "state.jsonl"
"""What a state directory's file is called."""

_OWNER = "coordinator"
_WAY_OUT = "restore it from a copy, or move its directory away to begin a new cluster"
_FORMAT_1 = "state.sqlite"
_BEGUN = "begun"
"""Lies beside the file once there is one, with the number of the last write: without it a new
cluster may begin, and any state counts."""


class Store:
    """Open it with :meth:`open`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begun = path.with_name(_BEGUN)
        self._writes = 0
        self._lines: dict[str, str] = {}
        """Of every document, by the JSON of its key."""

    @classmethod
    def open(cls, path: Path, new_cluster: str) -> Store:
        """Opens the file, or makes one for a cluster of that uuid.

        Raises StateInvalid where the file is damaged, not ours, of another format version, older
        than what was written last, or gone; it is left as it was.
        """
        store = cls(path)
        least = store._least()
        if least is None and not path.exists():
            older = path.with_name(_FORMAT_1)
            if older.exists():
                raise store._invalid(
                    f"is not there, but {older}, of format 1, is, which this coordinator does not "
                    "read; use the version of vswap that wrote it, or move its directory away to "
                    "begin a new cluster"
                )
            store.write(
                [(("cluster",), {"uuid": new_cluster}), (("generation",), {"generation": 1})]
            )
            return store
        store._read()
        if store._writes < (least or 0):
            raise store._invalid(
                f"is older than what was written last ({store._writes} writes, not {least}); put "
                f"the newest copy in its place, or remove {store._begun} to go on from this one"
            )
        store._note()
        return store

    def load(self) -> State:
        """Everything, read anew. Raises StateInvalid."""
        self._read()
        bodies = [json.loads(line) for line in self._lines.values()]
        return documents.restore([(tuple(key), body) for key, body in bodies], str(self.path))

    def write(self, bodies: Iterable[tuple[Key, dict[str, Any] | None]]) -> None:
        """Writes (None: deletes) documents, all or none of them.

        Raises StateInvalid: then :meth:`load` tells what counts.
        """
        lines = dict(self._lines)
        for key, body in bodies:
            name = json.dumps(key)
            if body is None:
                lines.pop(name, None)
            else:
                lines[name] = f"[{name}, {json.dumps(body)}]"
        try:
            self._replace("\n".join([str(self._writes + 1), *lines.values(), ""]).encode())
        except OSError as error:
            raise self._invalid(f"cannot be written ({error})") from error
        self._lines, self._writes = lines, self._writes + 1
        self._note()

    # -------------------------------------------------------------- inside

    def _read(self) -> None:
        try:
            first, _, rest = self.path.read_bytes().partition(b"\n")
        except FileNotFoundError as error:
            # Begun anew, it would be another cluster, that none of the nodes joins.
            raise self._invalid(f"is missing; {_WAY_OUT}") from error
        except OSError as error:
            raise self._invalid(f"cannot be read ({error})") from error
        try:
            head = json.loads(first)
            owner, version, expected = head["vswap"], head["format"], head["sha256"]
        except (ValueError, TypeError, KeyError):
            owner = version = expected = None
        if owner != _OWNER:
            raise self._invalid(f"is damaged or no state of a coordinator; {_WAY_OUT}")
        if version != FORMAT_VERSION:
            raise self._invalid(
                f"has format {version}, this coordinator reads {FORMAT_VERSION}; "
                f"use the version of vswap that wrote it, or {_WAY_OUT}"
            )
        if hashlib.sha256(rest).hexdigest() != expected:
            raise self._invalid(f"is damaged; {_WAY_OUT}")
        writes, *lines = rest.decode().split("\n")[:-1]
        self._writes = int(writes)
        self._lines = {json.dumps(json.loads(line)[0]): line for line in lines}

    def _replace(self, rest: bytes) -> None:
        head = {
            "vswap": _OWNER, "format": FORMAT_VERSION, "sha256": hashlib.sha256(rest).hexdigest()
        }  # fmt: skip
        new = self.path.with_name(f"{self.path.name}.new")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        with open(os.open(new, flags, 0o600), "wb") as file:
            file.write(json.dumps(head).encode() + b"\n" + rest)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.path)
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _least(self) -> int | None:
        """How many writes the file must have seen at least; None where there need be no file."""
        try:
            # Empty where the host died as it was made.
            return int(self._begun.read_text() or 0)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise self._invalid(
                f"may be old: {self._begun} cannot be read ({error}); remove that if the state is "
                "the newest"
            ) from error

    def _note(self) -> None:
        """After the write, and not synced: behind the file it only asks for less."""
        try:
            fd = os.open(self._begun, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                # In place and of one length: what a kill leaves is the old number or the new one.
                os.pwrite(fd, f"{self._writes:020}\n".encode(), 0)
            finally:
                os.close(fd)
        except OSError as error:
            raise self._invalid(f"is written, but {self._begun} is not ({error})") from error

    def _invalid(self, what: str) -> StateInvalid:
        return StateInvalid(f"{self.path} {what}", path=str(self.path))
