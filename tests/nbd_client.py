"""A small NBD client for tests, written against the protocol document and not against the server.

Blocking; run it in a thread beside a server that shares the event loop.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

IHAVEOPT = 0x49484156454F5054
OPTION_REPLY = 0x3E889045565A9
REQUEST = 0x25609513
SIMPLE = 0x67446698
STRUCTURED = 0x668E33EF

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = (1 << n for n in range(5))
EXPORT_NAME, ABORT, LIST = 1, 2, 3
STARTTLS, INFO, GO, STRUCTURED_REPLY, LIST_META, SET_META = range(5, 11)
ACK, SERVER, INFO_REPLY, META_CONTEXT = 1, 2, 3, 4
ERR_UNSUP, ERR_POLICY, ERR_INVALID = (2**31 + n for n in (1, 2, 3))
ERR_UNKNOWN, ERR_TOO_BIG = 2**31 + 6, 2**31 + 9


@dataclass
class Answer:
    """What came back for one request."""

    error: int = 0
    message: str = ""
    pieces: list[tuple[int, bytes]] = field(default_factory=list)
    """(offset, data); a hole as zeros. A simple reply has one piece at offset -1."""
    extents: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """Per context id: (length, state)."""
    chunks: int = 0


class Nbd:
    """One connection. ``lengths`` remembers what simple replies to reads must carry."""

    def __init__(self, address: str, *, timeout_s: float = 20.0) -> None:
        if address.startswith("unix:"):
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(timeout_s)
            self.sock.connect(address.removeprefix("unix:"))
        else:
            host, _, port = address.rpartition(":")
            self.sock = socket.create_connection((host, int(port)), timeout_s)
        self.structured = False
        self.size = self.flags = 0
        self.contexts: dict[str, int] = {}
        self._cookie = 0
        self._lengths: dict[int, int] = {}
        magic, opt, self.handshake_flags = struct.unpack(">8sQH", self.take(18))
        assert (magic, opt) == (b"NBDMAGIC", IHAVEOPT)

    def __enter__(self) -> Nbd:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.sock.close()

    def take(self, count: int) -> bytes:
        """Exactly so many bytes. Raises ConnectionError at the end of the stream."""
        parts = bytearray()
        while len(parts) < count:
            got = self.sock.recv(count - len(parts))
            if not got:
                raise ConnectionError("the server hung up")
            parts += got
        return bytes(parts)

    def closed(self) -> bool:
        """Whether the server hangs up (waits for it)."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True

    # ---------------------------------------------------------------- negotiation

    def hello(self, flags: int = 3) -> None:
        self.sock.sendall(struct.pack(">I", flags))

    def option(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Sends an option; returns its replies up to the last one."""
        self.sock.sendall(struct.pack(">QII", IHAVEOPT, option, len(data)) + data)
        replies = []
        while True:
            magic, about, kind, length = struct.unpack(">QIII", self.take(20))
            assert (magic, about) == (OPTION_REPLY, option)
            replies.append((kind, self.take(length)))
            if kind == ACK or kind >= 2**31:
                return replies

    def go(self, name: str, *, structured: bool = True, contexts: tuple[str, ...] = ()) -> Nbd:
        """The usual way in. Raises AssertionError where the server refuses."""
        self.hello()
        if structured:
            assert self.option(STRUCTURED_REPLY)[-1][0] == ACK
            self.structured = True
        if contexts:
            for kind, data in self.option(SET_META, meta_query(name, *contexts)):
                assert kind in (ACK, META_CONTEXT), data
                if kind == META_CONTEXT:
                    self.contexts[data[4:].decode()] = int.from_bytes(data[:4], "big")
        replies = self.option(GO, info_query(name))
        assert replies[-1][0] == ACK, replies
        for kind, data in replies:
            if kind == INFO_REPLY and data[:2] == b"\0\0":
                self.size, self.flags = struct.unpack(">QH", data[2:])
        return self

    # ---------------------------------------------------------------- requests

    def send(
        self, command: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0
    ) -> int:
        """Sends a request; returns its cookie."""
        self._cookie += 1
        if command == READ:
            self._lengths[self._cookie] = length
        self.sock.sendall(
            struct.pack(">IHHQQI", REQUEST, flags, command, self._cookie, offset, length) + data
        )
        return self._cookie

    def replies(self, count: int) -> dict[int, Answer]:
        """Answers to ``count`` requests, in whatever order they come, by cookie."""
        done: dict[int, Answer] = {}
        under_way: dict[int, Answer] = {}
        while len(done) < count:
            cookie, answer, last = self._reply(under_way)
            if last:
                done[cookie] = answer
        assert set(under_way) <= set(done)
        return done

    def _reply(self, under_way: dict[int, Answer]) -> tuple[int, Answer, bool]:
        [magic] = struct.unpack(">I", self.take(4))
        if magic == SIMPLE:
            error, cookie = struct.unpack(">IQ", self.take(12))
            answer = Answer(error=error)
            length = self._lengths.pop(cookie, 0)
            if length:
                assert not self.structured or error, "a structured client got a simple read reply"
                if not error:
                    answer.pieces.append((-1, self.take(length)))
            return cookie, answer, True
        assert self.structured
        assert magic == STRUCTURED, hex(magic)
        flags, kind, cookie, length = struct.unpack(">HHQI", self.take(16))
        body = self.take(length)
        answer = under_way.setdefault(cookie, Answer())
        answer.chunks += 1
        if kind == 1:
            answer.pieces.append((int.from_bytes(body[:8], "big"), body[8:]))
        elif kind == 2:
            offset, size = struct.unpack(">QI", body)
            answer.pieces.append((offset, bytes(size)))
        elif kind == 5:
            pairs = list(struct.iter_unpack(">II", body[4:]))
            answer.extents[int.from_bytes(body[:4], "big")] = pairs
        elif kind >= 2**15:
            answer.error, size = struct.unpack(">IH", body[:6])
            answer.message = body[6 : 6 + size].decode()
        else:
            assert (kind, length) == (0, 0)
        if flags & 1:
            self._lengths.pop(cookie, None)
        return cookie, answer, bool(flags & 1)

    def ask(self, *request: Any, **more: Any) -> Answer:
        cookie = self.send(*request, **more)
        return self.replies(1)[cookie]

    def read(self, offset: int, length: int, flags: int = 0) -> bytes:
        answer = self.ask(READ, offset, length, flags=flags)
        if answer.error:
            raise OSError(answer.error, answer.message)
        if not self.structured:
            return answer.pieces[0][1]
        out = bytearray(length)
        covered = 0
        for start, data in answer.pieces:
            assert offset <= start <= offset + length - len(data)
            out[start - offset : start - offset + len(data)] = data
            covered += len(data)
        assert covered == length
        return bytes(out)

    def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        answer = self.ask(WRITE, offset, len(data), data, flags)
        if answer.error:
            raise OSError(answer.error, answer.message)

    def do(self, command: int, offset: int = 0, length: int = 0, flags: int = 0) -> None:
        """A request without data either way."""
        answer = self.ask(command, offset, length, flags=flags)
        if answer.error:
            raise OSError(answer.error, answer.message)


def text(name: str) -> bytes:
    encoded = name.encode()
    return struct.pack(">I", len(encoded)) + encoded


def info_query(name: str, *infos: int) -> bytes:
    return text(name) + struct.pack(f">H{len(infos)}H", len(infos), *infos)


def meta_query(name: str, *contexts: str) -> bytes:
    return text(name) + struct.pack(">I", len(contexts)) + b"".join(map(text, contexts))
