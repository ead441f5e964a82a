"""Fixed newstyle negotiation, without I/O: bytes in, bytes and a decision out."""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vswap.node.frontends.nbd import wire
from vswap.node.frontends.nbd.wire import Info, Option, Reply

CONTEXTS = {"base:allocation": 1, "vswap:tier": 2}
"""Meta contexts and the ids that we give them."""

_MAX_OPTIONS = 256
"""Options in one negotiation. Nobody needs twenty; a client that goes on for ever is dropped."""

_FLAGS = (
    wire.Flag.HAS_FLAGS | wire.Flag.SEND_FLUSH | wire.Flag.SEND_FUA | wire.Flag.SEND_TRIM
    | wire.Flag.SEND_WRITE_ZEROES | wire.Flag.CAN_MULTI_CONN | wire.Flag.SEND_CACHE
    | wire.Flag.SEND_FAST_ZERO
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Offer:
    """What a client is told of an export."""

    name: str
    size_bytes: int
    page_bytes: int
    identity: str = ""
    """Names this very space: never that of another one, not even of one of the same name."""


class Catalogue(Protocol):
    """The exports there are now."""

    def names(self) -> Sequence[str]: ...

    def find(self, name: str) -> Offer | None:
        """None if there is no such export. The empty name asks for the default one."""


class Phase(enum.Enum):
    OPTIONS = 1
    TRANSMISSION = 2
    CLOSED = 3


class _Malformed(Exception):
    """The data of an option does not read as it should."""


class Handshake:
    """One client's negotiation. Feed it what arrives; send what it says.

    After each :meth:`feed`, ``replies`` holds what to send (the caller empties it) and ``phase``
    says how it goes on. In phase TRANSMISSION ``export``, ``structured`` and ``contexts`` are what
    was agreed.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self.phase = Phase.OPTIONS
        self.replies = bytearray(
            wire.GREETING.pack(
                wire.NBDMAGIC,
                wire.IHAVEOPT,
                wire.HANDSHAKE_FIXED_NEWSTYLE | wire.HANDSHAKE_NO_ZEROES,
            )
        )
        self.export: Offer | None = None
        self.structured = False
        self.contexts: frozenset[str] = frozenset()
        self._contexts_of = ""
        self._no_zeroes = False
        self._greeted = False
        self._options = 0
        self._skip = 0

    def feed(self, data: memoryview) -> int:
        """Consumes what can be understood of ``data``; returns how many bytes that was."""
        used = 0
        while self.phase is Phase.OPTIONS:
            step = self._step(data[used:])
            if not step:
                break
            used += step
        return used

    def _step(self, data: memoryview) -> int:
        if self._skip:
            skipped = min(self._skip, len(data))
            self._skip -= skipped
            return skipped
        if not self._greeted:
            return self._client_flags(data)
        if len(data) < wire.OPTION.size:
            return 0
        magic, option, length = wire.OPTION.unpack_from(data)
        self._options += 1
        if magic != wire.IHAVEOPT or self._options > _MAX_OPTIONS:
            self.phase = Phase.CLOSED
            return len(data)
        if option == Option.ABORT:
            # Whatever data it may have.
            self._reply(option, Reply.ACK)
            self.phase = Phase.CLOSED
            return len(data)
        if option == Option.SET_META_CONTEXT:
            # Whatever comes of this one, it replaces the one before.
            self.contexts = frozenset()
        if length > wire.MAX_OPTION_BYTES:
            if option == Option.EXPORT_NAME:
                self.phase = Phase.CLOSED
                return len(data)
            self._skip = length
            self._refuse(option, Reply.ERR_TOO_BIG, "too long")
            return wire.OPTION.size
        end: int = wire.OPTION.size + length
        if len(data) < end:
            self._options -= 1
            return 0
        self._option(option, bytes(data[wire.OPTION.size : end]))
        return end

    def _client_flags(self, data: memoryview) -> int:
        if len(data) < wire.CLIENT_FLAGS.size:
            return 0
        [flags] = wire.CLIENT_FLAGS.unpack_from(data)
        known = wire.HANDSHAKE_FIXED_NEWSTYLE | wire.HANDSHAKE_NO_ZEROES
        if flags & ~known:
            self.phase = Phase.CLOSED
        self._no_zeroes = bool(flags & wire.HANDSHAKE_NO_ZEROES)
        self._greeted = True
        return wire.CLIENT_FLAGS.size

    # ---------------------------------------------------------------- options

    def _option(self, option: int, data: bytes) -> None:
        try:
            if option == Option.EXPORT_NAME:
                self._export_name(data)
            elif option == Option.LIST:
                self._list(data)
            elif option in (Option.INFO, Option.GO):
                self._info(option, data)
            elif option == Option.STRUCTURED_REPLY:
                if data:
                    raise _Malformed
                self.structured = True
                self._reply(option, Reply.ACK)
            elif option in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
                self._meta_context(option, data)
            elif option == Option.STARTTLS:
                self._refuse(option, Reply.ERR_POLICY, "no TLS here")
            else:
                self._refuse(option, Reply.ERR_UNSUP, "unknown option")
        except _Malformed:
            self._refuse(option, Reply.ERR_INVALID, "malformed option")

    def _export_name(self, data: bytes) -> None:
        """The old way in: it has no way to tell an error but to hang up."""
        try:
            name = _text(data)
            offer = self._catalogue.find(name)
        except _Malformed:
            offer = None
        if offer is None:
            self.phase = Phase.CLOSED
            return
        self.replies += struct.pack(">QH", offer.size_bytes, self._flags())
        if not self._no_zeroes:
            self.replies += bytes(124)
        self._enter(name, offer)

    def _list(self, data: bytes) -> None:
        if data:
            raise _Malformed
        for name in self._catalogue.names():
            encoded = name.encode()
            self._reply(Option.LIST, Reply.SERVER, struct.pack(">I", len(encoded)) + encoded)
        self._reply(Option.LIST, Reply.ACK)

    def _info(self, option: int, data: bytes) -> None:
        name, end = _name(data)
        if len(data) < end + 2:
            raise _Malformed
        [count] = struct.unpack_from(">H", data, end)
        if len(data) != end + 2 + 2 * count:
            raise _Malformed
        wanted = struct.unpack_from(f">{count}H", data, end + 2)
        offer = self._catalogue.find(name)
        if offer is None:
            self._refuse(option, Reply.ERR_UNKNOWN, "no such export")
            return
        about = struct.pack(">HQH", Info.EXPORT, offer.size_bytes, self._flags())
        self._reply(option, Reply.INFO, about)
        if Info.NAME in wanted:
            self._reply(option, Reply.INFO, struct.pack(">H", Info.NAME) + offer.name.encode())
        if Info.DESCRIPTION in wanted:
            text = f"vswap space {offer.name}, pages of {offer.page_bytes} bytes"
            text += f", {offer.identity}" if offer.identity else ""
            self._reply(option, Reply.INFO, struct.pack(">H", Info.DESCRIPTION) + text.encode())
        sizes = (1, offer.page_bytes, wire.MAX_REQUEST_BYTES)
        self._reply(option, Reply.INFO, struct.pack(">HIII", Info.BLOCK_SIZE, *sizes))
        self._reply(option, Reply.ACK)
        if option == Option.GO:
            self._enter(name, offer)

    def _meta_context(self, option: int, data: bytes) -> None:
        if not self.structured:
            raise _Malformed
        name, end = _name(data)
        queries = _queries(data, end)
        if self._catalogue.find(name) is None:
            self._refuse(option, Reply.ERR_UNKNOWN, "no such export")
            return
        if option == Option.LIST_META_CONTEXT:
            chosen = [
                known for known in CONTEXTS
                if not queries or any(known == q or q == known.split(":")[0] + ":" for q in queries)
            ]  # fmt: skip
        else:
            chosen = [known for known in CONTEXTS if known in queries]
            self.contexts, self._contexts_of = frozenset(chosen), name
        for known in chosen:
            # In a list the id means nothing, and must be zero.
            number = CONTEXTS[known] if option == Option.SET_META_CONTEXT else 0
            self._reply(
                option, Reply.META_CONTEXT, struct.pack(">I", number) + known.encode()
            )  # fmt: skip
        self._reply(option, Reply.ACK)

    # ---------------------------------------------------------------- replies

    def _flags(self) -> int:
        return int(_FLAGS | wire.Flag.SEND_DF if self.structured else _FLAGS)

    def _enter(self, name: str, offer: Offer) -> None:
        if name != self._contexts_of:
            self.contexts = frozenset()
        self.export = offer
        self.phase = Phase.TRANSMISSION

    def _reply(self, option: int, kind: Reply, data: bytes = b"") -> None:
        self.replies += wire.OPTION_REPLY.pack(wire.OPTION_REPLY_MAGIC, option, kind, len(data))
        self.replies += data

    def _refuse(self, option: int, kind: Reply, why: str) -> None:
        self._reply(option, kind, why.encode())


def _text(data: bytes) -> str:
    if len(data) > wire.MAX_NAME_BYTES:
        raise _Malformed
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _Malformed from error


def _name(data: bytes, start: int = 0) -> tuple[str, int]:
    """A name with its length in front, and where it ends."""
    if len(data) < start + 4:
        raise _Malformed
    [length] = struct.unpack_from(">I", data, start)
    end = start + 4 + length
    if end > len(data):
        raise _Malformed
    return _text(data[start + 4 : end]), end


def _queries(data: bytes, start: int) -> list[str]:
    if len(data) < start + 4:
        raise _Malformed
    [count] = struct.unpack_from(">I", data, start)
    queries, end = [], start + 4
    for _ in range(count):
        query, end = _name(data, end)
        if query.find(":") < 1:
            # A namespace, a colon, and what the namespace makes of the rest.
            raise _Malformed
        queries.append(query)
    if end != len(data):
        raise _Malformed
    return queries
