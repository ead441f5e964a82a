"""Where a daemon may listen, and what it takes for its own: its directory, its socket, its port."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import grpc
import pytest

from vswap.wire.errors import BadConfig, StateInUse, StateInvalid
from vswap.wire.listen import StateDirectory, bind, check_listen, runtime_directory


@pytest.mark.parametrize("address", ["127.0.0.1:0", "127.8.8.8:1", "[::1]:5", "localhost:65535",
                                     "unix:/x"])  # fmt: skip
def test_loopback_needs_no_leave(address: str) -> None:
    check_listen(address, insecure=False)


@pytest.mark.parametrize("address", ["0.0.0.0:1", "[::]:1", "192.0.2.1:1", "example.org:1"])
def test_more_than_loopback_does(address: str) -> None:
    with pytest.raises(BadConfig, match="--insecure"):
        check_listen(address, insecure=False)
    check_listen(address, insecure=True)


@pytest.mark.parametrize("address", ["", "h", ":1", "h:", "h:65536", "h:-1", "unix:x", "h:²"])
def test_nonsense_is_refused_always(address: str) -> None:
    with pytest.raises(BadConfig):
        check_listen(address, insecure=True)


async def test_bind_says_why_it_cannot(tmp_path: Path) -> None:
    server = grpc.aio.server()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BadConfig, match="Address already in use"):
            bind(server, f"127.0.0.1:{port}")
    assert bind(server, f"127.0.0.1:{port}") == f"127.0.0.1:{port}"
    with pytest.raises(BadConfig, match="No such file"):
        bind(server, f"unix:{tmp_path}/nowhere/s")
    await server.stop(None)


async def test_a_socket_in_use_is_not_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "s"
    server = grpc.aio.server()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(BadConfig, match="Address already in use"):
            bind(server, f"unix:{path}")
    # Its owner died: what is left is a file.
    assert path.exists()
    assert bind(server, f"unix:{path}") == f"unix:{path}"
    await server.stop(None)


@pytest.mark.parametrize("kind", ["file", "directory", "link", "pipe"])
async def test_what_is_no_socket_is_left_alone(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "s"
    dead = tmp_path / "dead"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(dead))
    if kind == "file":
        path.touch()
    elif kind == "directory":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(dead)
    else:
        os.mkfifo(path)
    before = path.lstat()
    server = grpc.aio.server()
    with pytest.raises(BadConfig, match="no socket"):
        bind(server, f"unix:{path}")
    assert path.lstat() == before
    await server.stop(None)


def test_a_state_directory_is_private_and_locked(tmp_path: Path) -> None:
    directory = StateDirectory(tmp_path / "a" / "b")
    directory.lock()
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700
    with pytest.raises(StateInUse, match=f"pid {os.getpid()}"):
        StateDirectory(tmp_path / "a" / "b").lock()
    directory.write_address("h:1")
    assert (directory.path / "address").read_text() == "h:1\n"
    directory.unlock()
    assert not (directory.path / "address").exists()
    (directory.path / "left").touch()
    again = StateDirectory(directory.path)
    again.lock()
    again.unlock()


def test_a_directory_of_others_is_left_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "package.json").write_text("{}")
    with pytest.raises(StateInvalid, match="not vswap's"):
        StateDirectory(tmp_path).lock()
    assert [path.name for path in tmp_path.iterdir()] == ["package.json"]
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
    with pytest.raises(StateInvalid, match="not vswap's"):
        StateDirectory(tmp_path, backup="state").lock()


def test_a_directory_that_holds_a_backup_is_taken(tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    directory = StateDirectory(tmp_path, backup="state")
    directory.lock()
    directory.unlock()


def test_a_directory_below_somebody_elses_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shared" / "mine").mkdir(parents=True)
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    if me == 0:
        os.chown(tmp_path / "shared", 12345, -1)
    with pytest.raises(StateInvalid, match="belongs to another user"):
        StateDirectory(tmp_path / "shared" / "mine").lock()


def test_a_path_that_cannot_be_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StateInvalid, match="not usable"):
        StateDirectory(tmp_path / "file" / "x").lock()


def test_the_runtime_directory_is_in_memory(tmp_path: Path) -> None:
    assert runtime_directory("n", {"XDG_RUNTIME_DIR": str(tmp_path)}) == tmp_path / "vswap" / "n"
    shm = Path(f"/dev/shm/vswap-{os.geteuid()}/n")
    assert runtime_directory("n", {}) == shm
    assert runtime_directory("n", {"XDG_RUNTIME_DIR": "/does/not/exist"}) == shm
