"""The NBD wire format: numbers and layouts, no logic.

Source: the protocol document of the Network Block Device project (doc/proto.md in
NetworkBlockDevice/nbd), fixed newstyle negotiation. All integers are big-endian.
"""

from __future__ import annotations

import enum
import struct
from errno import EINVAL, ENOSPC, ENOTSUP, EOVERFLOW, ESHUTDOWN

__all__ = ["EINVAL", "ENOSPC", "ENOTSUP", "EOVERFLOW", "ESHUTDOWN"]

NBDMAGIC = 0x4E42444D41474943
IHAVEOPT = 0x49484156454F5054
OPTION_REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
MAGIC = REQUEST_MAGIC.to_bytes(4, "big")
SIMPLE_REPLY_MAGIC = 0x67446698
CHUNK_MAGIC = 0x668E33EF

GREETING = struct.Struct(">QQH")
CLIENT_FLAGS = struct.Struct(">I")
OPTION = struct.Struct(">QII")
"""magic, option, length of the data that follows"""
OPTION_REPLY = struct.Struct(">QIII")
"""magic, option, reply type, length"""
REQUEST = struct.Struct(">IHHQQI")
"""magic, command flags, command, cookie, offset, length"""
SIMPLE_REPLY = struct.Struct(">IIQ")
"""magic, error, cookie"""
CHUNK = struct.Struct(">IHHQI")
"""magic, flags, type, cookie, length"""
DATA_CHUNK = struct.Struct(">IHHQIQ")
"""A chunk header and the offset of the data that follows."""

HANDSHAKE_FIXED_NEWSTYLE = 1
HANDSHAKE_NO_ZEROES = 2

MAX_OPTION_BYTES = 65536
MAX_NAME_BYTES = 4096
MAX_REQUEST_BYTES = 32 * 2**20
"""Longest READ and WRITE. What clients assume that do not ask for block sizes."""


class Option(enum.IntEnum):
    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class Reply(enum.IntEnum):
    """Types of option replies."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 2**31 + 1
    ERR_POLICY = 2**31 + 2
    ERR_INVALID = 2**31 + 3
    ERR_UNKNOWN = 2**31 + 6
    ERR_TOO_BIG = 2**31 + 9


class Info(enum.IntEnum):
    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Flag(enum.IntFlag):
    """Transmission flags of an export."""

    HAS_FLAGS = 1 << 0
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11


class Command(enum.IntEnum):
    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


FUA = 1 << 0
NO_HOLE = 1 << 1
DF = 1 << 2
REQ_ONE = 1 << 3
FAST_ZERO = 1 << 4

ALLOWED_FLAGS: dict[int, int] = {
    Command.READ: FUA,
    Command.WRITE: FUA,
    Command.DISC: 0xFFFF,
    Command.FLUSH: FUA,
    Command.TRIM: FUA,
    Command.CACHE: FUA,
    Command.WRITE_ZEROES: FUA | NO_HOLE | FAST_ZERO,
    Command.BLOCK_STATUS: FUA | REQ_ONE,
}
"""FUA is allowed everywhere, and means nothing where nothing is written. DF, for reads, only where
replies are structured."""

CHUNK_DONE = 1
CHUNK_NONE = 0
CHUNK_DATA = 1
CHUNK_BLOCK_STATUS = 5
CHUNK_ERROR = 2**15 + 1

STATE_HOLE = 1
STATE_ZERO = 2
