"""Cutting what a client sends into requests, without I/O.

Whatever arrives is either understood, refused with an errno, or, where the protocol leaves no way
to find the next request, ends the connection. Payloads are handed on in pieces, as they arrive, cut
at page boundaries: a client cannot make the server hold a request that it does not finish.
"""

from __future__ import annotations

from vswap.node.frontends.nbd import wire
from vswap.node.frontends.nbd.runs import Run, Runs
from vswap.node.frontends.nbd.wire import Command

_WRITE = int(Command.WRITE)
"""Comparing with a member of an enumeration takes three times as long."""


class Write:
    """A write whose payload arrives in pieces. Answered once all have arrived and are stored."""

    __slots__ = ("cookie", "error", "left", "length", "offset", "pending", "why")

    def __init__(self, cookie: int, offset: int, length: int) -> None:
        self.cookie = cookie
        self.length = length
        self.offset = offset
        """Where the next piece goes."""
        self.left = length
        """Bytes that have not arrived."""
        self.pending = 0
        """Pieces that are being stored."""
        self.error = 0
        self.why = ""


class ProtocolError(Exception):
    """The stream cannot be understood from here on: hang up."""


class Parser:
    """One connection's requests. After each :meth:`feed` the lists hold what is new; the caller
    empties them, and has done with the pieces' views before it feeds again.
    """

    def __init__(
        self, *, size_bytes: int, page_bytes: int, structured: bool, has_contexts: bool
    ) -> None:
        self._size = size_bytes
        self._page_bytes = page_bytes
        self._page_mask = page_bytes - 1
        self._read_runs = Runs(Command.READ, size_bytes=size_bytes, page_bytes=page_bytes)
        self._write_runs = Runs(Command.WRITE, size_bytes=size_bytes, page_bytes=page_bytes)
        self._has_contexts = has_contexts
        self._read_flags = wire.DF if structured else 0
        """What a read may have, besides FUA. A reply that cannot be cut has no use for DF."""
        self.write: Write | None = None
        """The write whose payload comes next."""
        self._skip = 0
        self.reads: list[tuple[int, int, int, int]] = []
        """(cookie, offset, length, flags), in range, not empty."""
        self.pieces: list[tuple[Write, int, memoryview]] = []
        """(write, offset, bytes), in range. All but the last piece of a write end at a page's."""
        self.runs_read: list[Run] = []
        self.runs_written: list[Run] = []
        """Of both: what else is in range, and whole pages."""
        self.others: list[tuple[int, int, int, int, int]] = []
        """(command, cookie, offset, length, flags), in range where that means anything."""
        self.errors: list[tuple[int, int, str]] = []
        """(cookie, errno, why)."""
        self.disconnect = False

    def feed(self, data: memoryview) -> int:
        """Consumes what it can; returns how many bytes. Raises ProtocolError."""
        position, end = 0, len(data)
        header, unpack = wire.REQUEST.size, wire.REQUEST.unpack_from
        reads, size, page_bytes = self.reads, self._size, self._page_bytes
        odd_flags = ~self._read_flags
        seek = True
        while position < end and not self.disconnect:
            if self._skip or self.write is not None:
                step = self._payload(data[position:end])
                if not step:
                    break
                position += step
                continue
            if end - position < header:
                # Garbage shows as soon as it has a word.
                if end - position >= 4 and bytes(data[position : position + 4]) != wire.MAGIC:
                    raise ProtocolError("no request begins like this")
                break
            magic, flags, command, cookie, offset, length = unpack(data, position)
            if magic != wire.REQUEST_MAGIC:
                raise ProtocolError(f"no request begins with {magic:#x}")
            if seek and length == page_bytes and command <= _WRITE:
                runs = self._write_runs if command else self._read_runs
                if runs.begins(data, position):
                    found = runs.take(data[position:])
                    if found is not None:
                        (self.runs_written if command else self.runs_read).append(found[0])
                        position += found[1]
                        continue
                    # They differ in what was not looked at: so will the next ones.
                    seek = False
                if command and seek and end - position < header + page_bytes:
                    # Begun: with its rest others will come, and be a run.
                    break
            position += header
            usual = 0 < length <= wire.MAX_REQUEST_BYTES and offset + length <= size
            if usual and not command and not flags & odd_flags:
                reads.append((cookie, offset, length, flags))
            elif usual and command == _WRITE and not flags:
                self.write = Write(cookie, offset, length)
            else:
                self._request(command, flags, cookie, offset, length)
        return position

    def _payload(self, data: memoryview) -> int:
        if self._skip:
            step = min(self._skip, len(data))
            self._skip -= step
            return step
        write = self.write
        assert write is not None
        step = min(write.left, len(data))
        if step < write.left:
            # The rest of the last page is still to come: take whole pages only.
            step -= (write.offset + step) & self._page_mask
            if step <= 0:
                return 0
        write.pending += 1
        self.pieces.append((write, write.offset, data[:step]))
        self.took(step)
        return step

    def took(self, payload_bytes: int) -> None:
        """So much of the payload that comes next went elsewhere."""
        write = self.write
        assert write is not None
        write.offset += payload_bytes
        write.left -= payload_bytes
        if not write.left:
            self.write = None

    def _request(self, command: int, flags: int, cookie: int, offset: int, length: int) -> None:
        if command == Command.DISC:
            self.disconnect = True
            return
        error, why = self._check(command, flags, offset, length)
        if error:
            self.errors.append((cookie, error, why))
            if command == Command.WRITE:
                self._skip = length
        elif command == Command.READ and length:
            self.reads.append((cookie, offset, length, flags))
        elif command == Command.WRITE and length:
            self.write = Write(cookie, offset, length)
        else:
            self.others.append((command, cookie, offset, length, flags))

    def _check(self, command: int, flags: int, offset: int, length: int) -> tuple[int, str]:
        allowed = wire.ALLOWED_FLAGS.get(command)
        if allowed is None:
            return wire.EINVAL, f"unknown command {command}"
        if command == Command.READ:
            allowed |= self._read_flags
        if flags & ~allowed:
            return wire.EINVAL, f"command {command} does not take flags {flags:#x}"
        if command == Command.FLUSH:
            return (wire.EINVAL, "a flush has no range") if offset or length else (0, "")
        writes = command in (Command.WRITE, Command.WRITE_ZEROES)
        if offset + length > self._size:
            return (wire.ENOSPC if writes else wire.EINVAL), "beyond the end of the export"
        if command in (Command.READ, Command.WRITE) and length > wire.MAX_REQUEST_BYTES:
            too_long = f"{length} bytes at once; the limit is {wire.MAX_REQUEST_BYTES}"
            return (wire.EOVERFLOW if flags & wire.DF else wire.EINVAL), too_long
        if command == Command.BLOCK_STATUS and not (length and self._has_contexts):
            return wire.EINVAL, "no meta context was negotiated, or no length given"
        return 0, ""
