"""The kernel's nbd driver, pretended: what it is asked, and which device is taken away."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from vswap.cli.device import driver, netlink
from vswap.wire.errors import Refused

CONNECT, DISCONNECT = 1, 2


class Kernel:
    """The driver, with three devices. One that is connected has an owner."""

    def __init__(self, root: Path) -> None:
        self.sys, self.dev = root / "sys", root / "dev"
        self.max_attribute = 10
        self.asked: list[tuple[int, dict[int, bytes]]] = []
        self.error = 0
        for number in range(3):
            (self.sys / f"nbd{number}").mkdir(parents=True)
        self.dev.mkdir()

    def __call__(self, name: str) -> Kernel:
        assert name == "nbd"
        if not self.max_attribute:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        return self

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def own(self, number: int, owner: str) -> None:
        (self.sys / f"nbd{number}/backend").write_text(f"{owner}\n")

    def ask(self, command: int, *attributes: bytes) -> dict[int, bytes]:
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        told = netlink.attributes(b"".join(attributes))
        self.asked.append((command, told))
        if command == DISCONNECT:
            (self.sys / f"nbd{netlink.as_int(told[1])}/backend").unlink()
            return {}
        self.own(2, told[10].removesuffix(b"\0").decode())
        return netlink.attributes(netlink.u32(1, 2))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Kernel:
    made = Kernel(tmp_path)
    monkeypatch.setattr(driver, "Family", made)
    monkeypatch.setattr(driver, "_SYS", made.sys)
    monkeypatch.setattr(driver, "_DEV", made.dev)
    monkeypatch.setattr(driver, "_PATIENCE_S", 0.1)
    monkeypatch.setattr("shutil.which", lambda program: None)
    return made


@pytest.fixture
def connection() -> Iterator[socket.socket]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours


def test_a_connection_becomes_a_device(
    kernel: Kernel, connection: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "is_block_device", lambda path: path.name == "nbd2")
    device = driver.connect(connection, size_bytes=2**40, flags=0x2D, owner="vswap s@n")
    assert device == str(kernel.dev / "nbd2")
    [(command, told)] = kernel.asked
    assert command == CONNECT
    sockets = netlink.attributes(netlink.attributes(told.pop(7))[1])
    assert netlink.as_int(sockets[1]) == connection.fileno()
    assert told.pop(10) == b"vswap s@n\0"
    # Size, block size, no timeout, flags; no number: the kernel picks a free device.
    assert {number: netlink.as_int(value) for number, value in told.items()} == {
        2: 2**40, 3: 4096, 4: 0, 5: 0x2D,
    }  # fmt: skip
    assert all(len(value) == 8 for value in told.values())


def test_a_device_that_does_not_appear_is_told(kernel: Kernel, connection: socket.socket) -> None:
    with pytest.raises(Refused, match="nbd2 does not appear"):
        driver.connect(connection, size_bytes=4096, flags=0, owner="vswap s@n")
    # It is there all the same, and found.
    driver.disconnect("vswap s@n")
    assert [command for command, _ in kernel.asked] == [CONNECT, DISCONNECT]


def test_what_the_kernel_says_is_told(kernel: Kernel, connection: socket.socket) -> None:
    kernel.error = errno.EPERM
    with pytest.raises(Refused, match="Operation not permitted"):
        driver.connect(connection, size_bytes=4096, flags=0, owner="vswap s@n")
    kernel.own(0, "vswap s@n")
    with pytest.raises(Refused, match="nbd0 stays connected: Operation not permitted"):
        driver.disconnect("vswap s@n")


def test_only_the_owners_device_is_taken_away(kernel: Kernel) -> None:
    kernel.own(0, "vswap s@n2")
    kernel.own(1, "vswap s@n")
    driver.disconnect("vswap s@n")
    assert [(c, netlink.as_int(told[1])) for c, told in kernel.asked] == [(DISCONNECT, 1)]
    driver.disconnect("vswap s@n")
    assert len(kernel.asked) == 1, "what is not there needs no undoing"


def test_a_device_in_use_stays(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel.own(1, "vswap s@n")

    def busy(path: Path, flags: int) -> int:
        assert flags & os.O_EXCL
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(os, "open", busy)
    with pytest.raises(Refused, match="nbd1 is in use"):
        driver.disconnect("vswap s@n")
    assert not kernel.asked


def test_a_device_that_is_left_open_is_told(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel.own(1, "vswap s@n")
    monkeypatch.setattr(Path, "unlink", lambda path: None)
    with pytest.raises(Refused, match="still has it open"):
        driver.disconnect("vswap s@n")


@pytest.mark.parametrize(("max_attribute", "usable"), [(0, False), (9, False), (10, True)])
def test_which_kernels_have_what_it_takes(max_attribute: int, usable: bool, kernel: Kernel) -> None:
    kernel.max_attribute = max_attribute
    assert driver.usable() is usable
