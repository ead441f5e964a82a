"""Generic netlink, as much of it as it takes to set up a block device.

A message is a header, a command, and attributes: length, number, payload, padded to 4 bytes; all in
the byte order of the machine. Source: the kernel's include/uapi/linux/netlink.h and genetlink.h.
"""

from __future__ import annotations

import itertools
import os
import socket
import struct
import sys
from collections.abc import Iterator
from typing import NamedTuple

_HEADER = struct.Struct("=IHHII")
"""length of the message, type, flags, sequence number, port"""
_COMMAND = struct.Struct("=BBH")
"""command, version of the family, nothing"""
_ATTRIBUTE = struct.Struct("=HH")
"""length without the padding, number"""
_ERROR = struct.Struct("=i")

_GENERIC = 16
_REQUEST, _ACK = 1, 4
_TYPE_ERROR = 2
_NESTED = 0x8000
_NUMBER = 0x3FFF
"""An attribute's number, without what else its field tells."""

_CONTROLLER = 16
"""The family that knows the others."""
_GET_FAMILY = 3
_FAMILY_ID, _FAMILY_NAME, _FAMILY_MAX_ATTRIBUTE = 1, 2, 5
_VERSION = 1
_MOST_BYTES = 65536


class Message(NamedTuple):
    """What the kernel says: an answer, or with ``error`` that it is done (0) or why not (an
    errno)."""

    sequence: int
    error: int | None
    attributes: dict[int, bytes]


def attribute(number: int, payload: bytes) -> bytes:
    """One attribute, padded."""
    size = _ATTRIBUTE.size + len(payload)
    return _ATTRIBUTE.pack(size, number) + payload + bytes(-size % 4)


def u32(number: int, value: int) -> bytes:
    return attribute(number, struct.pack("=I", value))


def u64(number: int, value: int) -> bytes:
    return attribute(number, struct.pack("=Q", value))


def text(number: int, value: str) -> bytes:
    return attribute(number, value.encode() + b"\0")


def as_int(payload: bytes) -> int:
    """The number that is an attribute's payload, whatever its size."""
    return int.from_bytes(payload, sys.byteorder)


def nested(number: int, *inner: bytes) -> bytes:
    return attribute(number | _NESTED, b"".join(inner))


def request(family: int, command: int, sequence: int, *attributes: bytes) -> bytes:
    """A whole message that asks for an acknowledgement."""
    body = _COMMAND.pack(command, _VERSION, 0) + b"".join(attributes)
    size = _HEADER.size + len(body)
    return _HEADER.pack(size, family, _REQUEST | _ACK, sequence, 0) + body


def messages(data: bytes) -> Iterator[Message]:
    """The messages of one datagram. Raises ValueError if it is none."""
    at = 0
    while at < len(data):
        size, kind, _, sequence, _ = _unpack(_HEADER, data, at)
        body = at + _HEADER.size
        if not body <= at + size <= len(data):
            raise ValueError("a netlink message of an impossible length")
        if kind == _TYPE_ERROR:
            yield Message(sequence, -_unpack(_ERROR, data, body)[0], {})
        else:
            yield Message(sequence, None, attributes(data[body + _COMMAND.size : at + size]))
        at += _padded(size)


def attributes(data: bytes) -> dict[int, bytes]:
    """Payloads by number; a nested one's are attributes again. Raises ValueError."""
    found = {}
    at = 0
    while at < len(data):
        size, number = _unpack(_ATTRIBUTE, data, at)
        if not _ATTRIBUTE.size <= size <= len(data) - at:
            raise ValueError("a netlink attribute of an impossible length")
        found[number & _NUMBER] = data[at + _ATTRIBUTE.size : at + size]
        at += _padded(size)
    return found


def _unpack(layout: struct.Struct, data: bytes, at: int) -> tuple[int, ...]:
    try:
        return layout.unpack_from(data, at)
    except struct.error as error:
        raise ValueError("half a netlink message") from error


def _padded(size: int) -> int:
    return size + -size % 4


class Family:
    """A part of the kernel that is spoken to by name; a context. Blocks, one thread at a time."""

    def __init__(self, name: str) -> None:
        """Raises OSError: with ENOENT, the kernel has no such family."""
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _GENERIC)
        self._sequences = itertools.count(1)
        try:
            about = self._ask(_CONTROLLER, _GET_FAMILY, text(_FAMILY_NAME, name))
            self._number = as_int(about[_FAMILY_ID])
            self.max_attribute = as_int(about[_FAMILY_MAX_ATTRIBUTE])
            """The highest attribute that this kernel knows; it is silent on those above."""
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Family:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def ask(self, command: int, *attributes: bytes) -> dict[int, bytes]:
        """Attributes of the answer, none if there is only an acknowledgement. One round trip.

        Raises OSError with what the kernel says.
        """
        return self._ask(self._number, command, *attributes)

    def _ask(self, family: int, command: int, *attributes: bytes) -> dict[int, bytes]:
        sequence = next(self._sequences)
        self._socket.send(request(family, command, sequence, *attributes))
        answer: dict[int, bytes] = {}
        while True:
            for message in messages(self._socket.recv(_MOST_BYTES)):
                if message.sequence != sequence:
                    continue
                if message.error is None:
                    answer = message.attributes
                elif message.error:
                    raise OSError(message.error, os.strerror(message.error))
                else:
                    return answer
