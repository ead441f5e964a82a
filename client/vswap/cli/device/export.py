"""Opening an export of a node from outside, and offering one: the two handshakes of a relay."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

from vswap.node.frontends.nbd import wire
from vswap.node.frontends.nbd.wire import Info, Option, Reply
from vswap.wire.errors import Refused, UnknownSpace, Unreachable
from vswap.wire.tcp import notice_loss

_PATIENCE_S = 10.0
_OLDSTYLE_MAGIC = 0x00420281861253
_OLDSTYLE = struct.Struct(">QQQHH124x")


@dataclass(frozen=True, slots=True)
class Export:
    """An export as its node tells it."""

    size_bytes: int
    flags: int
    description: str
    """Names the very space, by shard and number: another one of the same name has another."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What a relay offers of an export."""

    size_bytes: int
    flags: int


def greeting(size_bytes: int, flags: int) -> bytes:
    """All that a server says in the oldest negotiation, which asks the client nothing."""
    return _OLDSTYLE.pack(wire.NBDMAGIC, _OLDSTYLE_MAGIC, size_bytes, 0, flags)


def take_greeting(connection: socket.socket) -> Offer:
    """The other side of :func:`greeting`. Blocks. Raises OSError, or EOFError: nobody offers."""
    _, _, size_bytes, _, flags = _OLDSTYLE.unpack(_take(connection, _OLDSTYLE.size))
    return Offer(size_bytes, flags)


def connect(address: str, name: str) -> tuple[socket.socket, Export]:
    """A connection in the transmission phase, with simple replies. Blocks for seconds at most.

    Raises Unreachable; UnknownSpace: there is no such export; Refused: it is not to be had now.
    """
    try:
        connection = _open(address)
        try:
            export = _go(connection, name.encode())
            connection.settimeout(None)
        except BaseException:
            connection.close()
            raise
    except (OSError, EOFError) as error:
        raise Unreachable(f"{address}: {error}", address=address) from error
    return connection, export


def _open(address: str) -> socket.socket:
    if address.startswith("unix:"):
        local = socket.socket(socket.AF_UNIX)
        local.settimeout(_PATIENCE_S)
        try:
            local.connect(address.removeprefix("unix:"))
        except BaseException:
            local.close()
            raise
        return local
    host, _, port = address.rpartition(":")
    remote = socket.create_connection((host.strip("[]"), int(port)), _PATIENCE_S)
    remote.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    notice_loss(remote)
    # Also while requests are under way to it.
    remote.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000)
    return remote


def _go(connection: socket.socket, name: bytes) -> Export:
    magic, option, _ = wire.GREETING.unpack(_take(connection, wire.GREETING.size))
    if (magic, option) != (wire.NBDMAGIC, wire.IHAVEOPT):
        raise Refused("this is no NBD server of the present kind")
    data = struct.pack(">I", len(name)) + name + struct.pack(">HH", 1, Info.DESCRIPTION)
    connection.sendall(
        wire.CLIENT_FLAGS.pack(wire.HANDSHAKE_FIXED_NEWSTYLE | wire.HANDSHAKE_NO_ZEROES)
        + wire.OPTION.pack(wire.IHAVEOPT, Option.GO, len(data)) + data
    )  # fmt: skip
    size_bytes, flags, description = 0, 0, ""
    while True:
        header = _take(connection, wire.OPTION_REPLY.size)
        _, _, kind, length = wire.OPTION_REPLY.unpack(header)
        if length > wire.MAX_OPTION_BYTES:
            raise Refused("this is no NBD server of the present kind")
        told = _take(connection, length)
        if kind == Reply.ACK:
            return Export(size_bytes, flags, description)
        if kind != Reply.INFO:
            why = f"export {name.decode()!r}: {told.decode(errors='replace') or 'refused'}"
            raise UnknownSpace(why) if kind == Reply.ERR_UNKNOWN else Refused(why)
        [about] = struct.unpack_from(">H", told)
        if about == Info.EXPORT:
            size_bytes, flags = struct.unpack_from(">QH", told, 2)
        elif about == Info.DESCRIPTION:
            description = told[2:].decode(errors="replace")


def _take(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            raise EOFError("closed in the middle of the negotiation")
        data += more
    return data
