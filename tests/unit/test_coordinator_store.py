"""The coordinator's durable state: what survives what, and what is refused."""

from __future__ import annotations

import os
import shutil
import signal
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
from vswap.coordinator.store import FILE, Store
from vswap.wire.errors import StateInvalid

CLUSTER = str(uuid4())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / FILE


def test_a_new_file_names_the_cluster_and_is_private(path: Path) -> None:
    store = Store.open(path, CLUSTER)
    assert store.load() == State(cluster=CLUSTER)
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
    path.with_name(f"{FILE}.new").mkdir()
    with pytest.raises(StateInvalid, match="cannot be written"):
        store.write([(("sweep", "s", "a"), {})])
    path.with_name(f"{FILE}.new").rmdir()
    store.write([(("sweep", "s", "c"), {})])
    assert Store.open(path, CLUSTER).load().sweeps == {("s", "c")}


def damaged(path: Path, damage: str) -> None:
    store = Store.open(path, CLUSTER)
    store.write([(("sweep", str(i), "a" * 500), {}) for i in range(100)])
    if damage == "garbage":
        path.write_bytes(b"not what it was, and long enough to tell" * 100)
    elif damage == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "empty":
        os.truncate(path, 0)
    elif damage == "foreign":
        path.write_text('{"vswap": "node", "format": 2}\n')
    elif damage == "newer":
        path.write_text(path.read_text().replace('"format": 2', '"format": 3', 1))
    elif damage == "document":
        store.write([(("shard", "s"), {"uid": 1})])
    elif damage == "number":
        path.with_name("begun").write_text("\x00\x00")


@pytest.mark.parametrize(
    "damage", ["garbage", "cut", "empty", "foreign", "newer", "document", "number"]
)
def test_what_is_damaged_or_foreign_is_refused_and_left_alone(path: Path, damage: str) -> None:
    damaged(path, damage)
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    with pytest.raises(StateInvalid) as caught:
        Store.open(path, CLUSTER).load()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == before


def test_no_damage_is_taken_for_state(path: Path) -> None:
    """Wherever a byte is another one, or the file ends."""
    store = Store.open(path, CLUSTER)
    store.write([(("hold", "s", "a"), {"granted": 1, "held": 1})])
    whole = path.read_bytes()
    flipped = (whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(len(whole)))
    for bad in (*flipped, *(whole[:i] for i in range(len(whole)))):
        path.write_bytes(bad)
        with pytest.raises(StateInvalid):
            Store.open(path, CLUSTER)
        # Nor where a coordinator reads it back while it runs.
        with pytest.raises(StateInvalid):
            store.load()
    path.write_bytes(whole)
    assert Store.open(path, CLUSTER).load().holds["s", "a"].granted == 1


def test_a_plain_copy_is_all_of_the_state(path: Path, tmp_path: Path) -> None:
    """Of the one file, while its coordinator runs; another directory goes on from it."""
    store = Store.open(path, CLUSTER)
    store.write([(("sweep", "s", "a"), {})])
    (tmp_path / "other").mkdir()
    shutil.copy(path, tmp_path / "other" / FILE)
    assert Store.open(tmp_path / "other" / FILE, str(uuid4())).load() == store.load()


def test_an_older_copy_counts_only_on_somebodys_word(path: Path) -> None:
    """What it does not know (tombstones, grants) would be as if it had never been."""
    store = Store.open(path, CLUSTER)
    old = path.read_bytes()
    store.write([(("sweep", "s", "a"), {})])
    new = path.read_bytes()
    path.write_bytes(old)
    with pytest.raises(StateInvalid, match="older than what was written last") as caught:
        Store.open(path, CLUSTER)
    assert f"remove {path.with_name('begun')}" in str(caught.value)
    path.write_bytes(new)
    assert Store.open(path, CLUSTER).load().sweeps
    path.write_bytes(old)
    path.with_name("begun").unlink()
    again = Store.open(path, CLUSTER)
    assert not again.load().sweeps
    again.write([(("sweep", "s", "b"), {})])
    assert Store.open(path, CLUSTER).load().sweeps == {("s", "b")}


def test_a_kill_between_a_write_and_its_number_does_no_harm(path: Path) -> None:
    store = Store.open(path, CLUSTER)
    number = path.with_name("begun").read_bytes()
    store.write([(("sweep", "s", "a"), {})])
    path.with_name("begun").write_bytes(number)
    assert Store.open(path, CLUSTER).load().sweeps
    assert path.with_name("begun").read_bytes() != number
    # Empty is what a host that dies may leave of a new one.
    path.with_name("begun").write_bytes(b"")
    assert Store.open(path, CLUSTER).load().sweeps


@pytest.mark.parametrize("left", [None, b""])
def test_a_file_that_is_gone_begins_no_other_cluster(path: Path, left: bytes | None) -> None:
    """Its nodes would not join that, and nothing would say why they are missing."""
    Store.open(path, CLUSTER)
    kept = path.read_bytes()
    path.unlink()
    if left is not None:
        path.write_bytes(left)
    with pytest.raises(StateInvalid, match="restore it from a copy") as caught:
        Store.open(path, str(uuid4()))
    assert str(path) in str(caught.value)
    path.write_bytes(kept)
    assert Store.open(path, str(uuid4())).load().cluster == CLUSTER


def test_an_older_format_begins_no_other_cluster(path: Path) -> None:
    older = path.with_name("state.sqlite")
    older.write_bytes(b"SQLite format 3\0")
    with pytest.raises(StateInvalid, match="format 1"):
        Store.open(path, CLUSTER)
    assert list(path.parent.iterdir()) == [older]
    older.unlink()
    assert Store.open(path, CLUSTER).load().cluster == CLUSTER


def test_a_first_start_that_was_killed_begins_again(path: Path) -> None:
    path.with_name(f"{FILE}.new").write_bytes(b'{"vswap": "coord')
    assert Store.open(path, CLUSTER).load().cluster == CLUSTER


def test_a_directory_that_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateInvalid, match="cannot be "):
        Store.open(tmp_path / "file" / FILE, CLUSTER)


def test_a_kill_leaves_whole_transactions(path: Path) -> None:
    """Each transaction writes two documents with one number: they never differ."""
    Store.open(path, CLUSTER)
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
