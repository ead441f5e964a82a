"""Durable state: the documents of :mod:`vswap.coordinator.documents` in one SQLite file.

A write returns once the transaction is on disk (WAL, synchronous=FULL); a kill at any point leaves
the state before or after it. Size and cost are O(tiers + nodes + jobs). Used by one process, which
holds the state directory's lock, and one thread.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vswap.coordinator import documents
from vswap.coordinator.documents import FORMAT_VERSION
from vswap.coordinator.state import Key, State
from vswap.wire.errors import StateInvalid

APPLICATION_ID = 0x76737770
_WAY_OUT = "restore it from a copy, or move its directory away to begin a new cluster"
_BEGUN = "begun"
"""Lies beside the file once there is one: without it a new cluster may begin."""


class Store:
    """Open it with :meth:`open`; close it after the last write."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection

    @classmethod
    def open(cls, path: Path, new_cluster: str) -> Store:
        """Opens the file, or makes one for a cluster of that uuid.

        Raises StateInvalid where the file is damaged, not ours, of another format version, or gone;
        it is left as it was.
        """
        begun = path.with_name(_BEGUN)
        if begun.exists() and not (path.exists() and path.stat().st_size):
            # Begun anew, it would be another cluster, that none of the nodes joins.
            raise StateInvalid(f"{path} is missing or empty; {_WAY_OUT}", path=str(path))
        try:
            # Made by hand first: SQLite would make it readable for others.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            connection = sqlite3.connect(path, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise StateInvalid(f"cannot open {path}: {error}", path=str(path)) from error
        store = cls(path, connection)
        try:
            store._check(new_cluster)
            begun.touch(0o600)
        except OSError as error:
            connection.close()
            raise StateInvalid(f"cannot write {begun}: {error}", path=str(begun)) from error
        except sqlite3.Error as error:
            connection.close()
            raise StateInvalid(
                f"{path} is damaged or no state of a coordinator ({error}); {_WAY_OUT}",
                path=str(path),
            ) from error
        except StateInvalid:
            connection.close()
            raise
        return store

    def load(self) -> State:
        """Everything. Raises StateInvalid."""
        try:
            rows = self._connection.execute("SELECT key, body FROM documents ORDER BY rowid")
            bodies = [(tuple(json.loads(key)), json.loads(body)) for key, body in rows]
        except (sqlite3.Error, ValueError, TypeError) as error:
            raise StateInvalid(
                f"{self.path} cannot be read ({error}); {_WAY_OUT}", path=str(self.path)
            ) from error
        return documents.restore(bodies, str(self.path))

    def write(self, bodies: Iterable[tuple[Key, dict[str, Any] | None]]) -> None:
        """Writes (None: deletes) documents in one transaction. Raises StateInvalid: not written."""
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                self._put(bodies)
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise StateInvalid(f"cannot write {self.path}: {error}", path=str(self.path)) from error

    def close(self) -> None:
        self._connection.close()

    # -------------------------------------------------------------- inside

    def _put(self, bodies: Iterable[tuple[Key, dict[str, Any] | None]]) -> None:
        for key, body in bodies:
            name = json.dumps(key)
            if body is None:
                self._connection.execute("DELETE FROM documents WHERE key = ?", (name,))
            else:
                self._connection.execute(
                    "INSERT INTO documents (key, body) VALUES (?, ?) "
                    "ON CONFLICT (key) DO UPDATE SET body = excluded.body",
                    (name, json.dumps(body)),
                )

    def _check(self, new_cluster: str) -> None:
        run = self._connection.execute
        if not run("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            self._create(new_cluster)
        if run("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
            raise StateInvalid(
                f"{self.path} is a database of something else; {_WAY_OUT}", path=str(self.path)
            )
        version = run("PRAGMA user_version").fetchone()[0]
        if version != FORMAT_VERSION:
            raise StateInvalid(
                f"{self.path} has format {version}, this coordinator reads {FORMAT_VERSION}; "
                f"use the version of vswap that wrote it, or {_WAY_OUT}",
                path=str(self.path),
            )
        verdict = run("PRAGMA integrity_check(1)").fetchone()[0]
        if verdict != "ok":
            what = verdict.splitlines()[-1]
            raise StateInvalid(f"{self.path} is damaged ({what}); {_WAY_OUT}", path=str(self.path))
        # Only now: it writes to the file, which might not have been ours.
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = FULL")

    def _create(self, new_cluster: str) -> None:
        run = self._connection.execute
        run("BEGIN IMMEDIATE")
        run(f"PRAGMA application_id = {APPLICATION_ID}")
        run(f"PRAGMA user_version = {FORMAT_VERSION}")
        run("CREATE TABLE documents (key TEXT PRIMARY KEY NOT NULL, body TEXT NOT NULL)")
        self._put([(("cluster",), {"uuid": new_cluster}), (("generation",), {"generation": 1})])
        run("COMMIT")
