"""The coordinator's durable state: what survives what, and what is refused."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
from pathlib import Path
from uuid import uuid4

import pytest
from plans import MIB, World

from vswap.coordinator import documents
from vswap.coordinator.events import ForgetNode, StartJob
from vswap.coordinator.state import Key, MoveKind, State
from vswap.coordinator.store import Store
from vswap.wire.errors import StateInvalid

CLUSTER = str(uuid4())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.sqlite"


def test_a_new_file_names_the_cluster_and_is_private(path: Path) -> None:
    store = Store.open(path, CLUSTER)
    assert store.load() == State(cluster=CLUSTER)
    store.close()
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    again = Store.open(path, str(uuid4()))
    assert again.load().cluster == CLUSTER


def test_everything_durable_comes_back(path: Path) -> None:
    world = World()
    world.add_tier("a", rank=-3)
    world.add_tier("b")
    node, gone = world.node("n1"), world.node("n2")
    node.fill("a", 10 * MIB)
    gone.fill("b", MIB)
    gone.disconnect()
    world.step(StartJob("j", MoveKind.DRAIN, "a", rate_bytes_s=9))
    world.step(ForgetNode("n2"))
    keys: list[Key] = [("cluster",), *world.disk]
    store = Store.open(path, CLUSTER)
    store.write((key, documents.document(world.state, key)) for key in keys)
    store.close()
    loaded = Store.open(path, CLUSTER).load()
    durable = ("cluster", "generation", "tiers", "shards", "holds", "jobs", "sweeps")
    for name in durable:
        assert getattr(loaded, name) == getattr(world.state, name), name
    assert loaded.jobs["j"].rate_bytes_s == 9
    assert loaded.sweeps


def test_none_deletes(path: Path) -> None:
    store = Store.open(path, CLUSTER)
    store.write([(("sweep", "s", "a"), {}), (("sweep", "s", "b"), {})])
    store.write([(("sweep", "s", "a"), None)])
    assert store.load().sweeps == {("s", "b")}


def test_a_write_that_fails_changes_nothing(path: Path) -> None:
    store = Store.open(path, CLUSTER)
    with pytest.raises(TypeError):
        store.write([(("sweep", "s", "a"), {}), (("sweep", "s", "b"), {"x": object()})])
    assert store.load().sweeps == set()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("DROP TABLE documents")
    with pytest.raises(StateInvalid, match="cannot write"):
        store.write([(("sweep", "s", "a"), {})])


@pytest.mark.parametrize("damage", ["garbage", "cut", "page", "foreign", "newer", "document"])
def test_what_is_damaged_or_foreign_is_refused_and_left_alone(path: Path, damage: str) -> None:
    if damage == "garbage":
        path.write_bytes(b"not a database, and long enough to tell" * 100)
    elif damage == "foreign":
        connection = sqlite3.connect(path)
        connection.execute("CREATE TABLE t (x)")
        connection.close()
    else:
        store = Store.open(path, CLUSTER)
        store.write([(("sweep", str(i), "a" * 500), {}) for i in range(100)])
        store.close()
        connection = sqlite3.connect(path, isolation_level=None)
        if damage == "newer":
            connection.execute("PRAGMA user_version = 99")
        if damage == "document":
            connection.execute("UPDATE documents SET body = '{\"uid\": 1}' WHERE rowid = 1")
        connection.close()
        body = bytearray(path.read_bytes())
        if damage == "cut":
            path.write_bytes(body[: len(body) // 2])
        if damage == "page":
            body[4096 * 3 : 4096 * 5] = b"\xa5" * 8192
            path.write_bytes(body)
    before = path.read_bytes()
    with pytest.raises(StateInvalid) as caught:
        Store.open(path, CLUSTER).load()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("left", [None, b""])
def test_a_file_that_is_gone_begins_no_other_cluster(path: Path, left: bytes | None) -> None:
    """Its nodes would not join that, and nothing would say why they are missing."""
    store = Store.open(path, CLUSTER)
    store.close()
    kept = path.read_bytes()
    path.unlink()
    if left is not None:
        path.write_bytes(left)
    with pytest.raises(StateInvalid, match="missing or empty; restore it") as caught:
        Store.open(path, str(uuid4()))
    assert str(path) in str(caught.value)
    path.write_bytes(kept)
    assert Store.open(path, str(uuid4())).load().cluster == CLUSTER


def test_a_first_start_that_was_killed_begins_again(path: Path) -> None:
    path.write_bytes(b"")
    assert Store.open(path, CLUSTER).load().cluster == CLUSTER


def test_a_directory_that_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateInvalid, match="cannot open"):
        Store.open(tmp_path / "file" / "state.sqlite", CLUSTER)


def test_a_kill_leaves_whole_transactions(path: Path) -> None:
    """Each transaction writes two documents with one number: they never differ."""
    Store.open(path, CLUSTER).close()
    script = textwrap.dedent(
        f"""
        from pathlib import Path
        from vswap.coordinator.store import Store
        store = Store.open(Path({str(path)!r}), "")
        number = store.load().generation
        while True:
            number += 1
            store.write([
                (("generation",), {{"generation": number}}),
                (("hold", "s", "a"), {{"granted": number, "held": number}}),
            ])
            print(number, flush=True)
        """
    )
    last = 1
    for _ in range(4):
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for _ in range(25):
                last = int(process.stdout.readline())
            os.kill(process.pid, signal.SIGKILL)
        store = Store.open(path, "")
        state = store.load()
        assert state.generation >= last
        assert state.holds["s", "a"].granted == state.generation
        store.close()
