"""The kernel's own nbd driver: a connected socket becomes a block device, /dev/nbdN.

It is set up over netlink, with no handshake, and with no timeout: requests wait for their answers
for as long as it takes, and only an end of the connection is an error. A device carries the name of
its owner, by which it is found again whatever happened to who made it.

Source: the kernel's include/uapi/linux/nbd-netlink.h and drivers/block/nbd.c.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from vswap.cli.device import netlink
from vswap.cli.device.netlink import Family
from vswap.wire.errors import Refused

_NAME = "nbd"
_SYS = Path("/sys/block")
_DEV = Path("/dev")
_PATIENCE_S = 10.0
_BLOCK_BYTES = 4096
"""Every request is a multiple of it, at a multiple of it. The kernel swaps no smaller pages."""


class _Command(enum.IntEnum):
    CONNECT = 1
    DISCONNECT = 2


class Attribute(enum.IntEnum):
    INDEX = 1
    SIZE_BYTES = 2
    BLOCK_SIZE_BYTES = 3
    TIMEOUT = 4
    SERVER_FLAGS = 5
    SOCKETS = 7
    BACKEND_IDENTIFIER = 10


_SOCKET_ITEM = 1
_SOCKET_FD = 1


def usable() -> bool:
    """Whether this kernel has the driver, as of Linux 5.14: since then a device has an owner.

    Loads its module. A container with a network of its own sees the driver as of Linux 6.3.
    """
    if not _answers() and shutil.which("modprobe"):
        subprocess.run(["modprobe", _NAME], capture_output=True, check=False)
    return _answers()


def connect(connection: socket.socket, *, size_bytes: int, flags: int, owner: str) -> str:
    """Makes a device of a connection in the transmission phase; returns its path.

    ``flags`` are the export's, and ``size_bytes`` whole blocks. The kernel keeps the connection, so
    ours may be closed. Raises Refused.
    """
    try:
        with Family(_NAME) as nbd:
            answer = nbd.ask(_Command.CONNECT, *_wanted(connection, size_bytes, flags, owner))
    except OSError as error:
        raise Refused(f"the kernel's nbd driver makes no device: {error.strerror}") from error
    device = _DEV / f"nbd{netlink.as_int(answer[Attribute.INDEX])}"
    until_s = time.monotonic() + _PATIENCE_S
    while not device.is_block_device():
        if time.monotonic() > until_s:
            raise Refused(f"the kernel has made {device.name}, but {device} does not appear")
        time.sleep(0.02)
    return str(device)


def disconnect(owner: str) -> None:
    """Takes the owner's device away, if there is one; who serves it is told good-bye.

    Raises Refused while it is in use; then nothing has changed.
    """
    for number in _numbers(owner):
        with _unused(_DEV / f"nbd{number}"):
            try:
                with Family(_NAME) as nbd:
                    nbd.ask(_Command.DISCONNECT, netlink.u32(Attribute.INDEX, number))
            except OSError as error:
                raise Refused(f"nbd{number} stays connected: {error.strerror}") from error
    until_s = time.monotonic() + _PATIENCE_S
    while left := _numbers(owner):
        if time.monotonic() > until_s:
            raise Refused(f"/dev/nbd{left[0]} is gone, but a process still has it open")
        time.sleep(0.02)


def _answers() -> bool:
    try:
        with Family(_NAME) as nbd:
            return nbd.max_attribute >= Attribute.BACKEND_IDENTIFIER
    except OSError:
        return False


def _wanted(connection: socket.socket, size_bytes: int, flags: int, owner: str) -> list[bytes]:
    """No index: the kernel takes a device that nobody has."""
    item = netlink.nested(_SOCKET_ITEM, netlink.u32(_SOCKET_FD, connection.fileno()))
    return [
        netlink.u64(Attribute.SIZE_BYTES, size_bytes),
        netlink.u64(Attribute.BLOCK_SIZE_BYTES, _BLOCK_BYTES),
        # 0 is none. Said, since a device may have another one from who had it before.
        netlink.u64(Attribute.TIMEOUT, 0),
        netlink.u64(Attribute.SERVER_FLAGS, flags),
        netlink.text(Attribute.BACKEND_IDENTIFIER, owner),
        netlink.nested(Attribute.SOCKETS, item),
    ]


def _numbers(owner: str) -> list[int]:
    """Of the devices that someone owns."""
    found = []
    for path in _SYS.glob("nbd*"):
        with contextlib.suppress(OSError):
            # It is there only while the device is connected.
            if (path / "backend").read_text().removesuffix("\n") == owner:
                found.append(int(path.name.removeprefix("nbd")))
    return found


@contextlib.contextmanager
def _unused(device: Path) -> Iterator[None]:
    """Keeps others from mounting a device or swapping on it. Raises Refused if they do."""
    with contextlib.ExitStack() as last:
        try:
            fd = os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
            last.callback(os.close, fd)
            # What someone wrote and nobody has synced.
            os.fsync(fd)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise Refused(f"{device} is in use") from error
            # What cannot be opened nobody uses. And what cannot be written is in the kernel's log,
            # and no reason to keep the device of a node that is gone.
        yield
