"""The contract every backend fulfils: a flat store of segments that are written once.

A backend knows segments, not pages. It is used from one event loop, by many tasks at once. All
errors are of :mod:`vswap.wire.errors`:

==================  ==============================================================================
TierUnavailable     nothing happened (no connection, refused, server out of memory)
OutcomeUnknown      a ``put`` or ``delete`` may have happened (timeout, connection lost midway)
SegmentExists       ``put`` found a segment of that name; it was left untouched
PageLost            ``get`` found no such segment, or it is shorter than the range
BackendRefused      ``open`` found the server unfit, see the message
==================  ==============================================================================

``tests/contract`` runs one suite over every backend and every wrapper.
"""

from __future__ import annotations

import abc
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias
from uuid import UUID

from vswap.wire.errors import VswapError

Buffer: TypeAlias = bytes | bytearray | memoryview

_KEY = re.compile(r"^vswap/([0-9a-f-]{36})/([0-9a-f-]{36})/([0-9a-f]{16})$")


@dataclass(frozen=True, slots=True)
class SegmentName:
    """Names a segment for all time: a shard never uses a serial twice."""

    cluster: UUID
    shard: UUID
    serial: int

    @property
    def key(self) -> str:
        """The key, object path or file name: ``vswap/{cluster}/{shard}/{serial:016x}``."""
        return f"vswap/{self.cluster}/{self.shard}/{self.serial:016x}"

    @classmethod
    def parse(cls, key: str) -> SegmentName | None:
        """The name a key stands for, or None where it is not one of ours."""
        match = _KEY.match(key)
        if match is None:
            return None
        return cls(UUID(match[1]), UUID(match[2]), int(match[3], 16))


def prefix(cluster: UUID | None = None, shard: UUID | None = None) -> str:
    """The key prefix of everything, of a cluster, or of one shard of a cluster."""
    if cluster is None:
        return "vswap/"
    return f"vswap/{cluster}/" if shard is None else f"vswap/{cluster}/{shard}/"


@dataclass(frozen=True, slots=True)
class Read:
    """A byte range of a segment: ``length`` bytes (> 0) from ``offset``.

    ``whole`` is the segment's length, 0 where the reader does not know it. From it a coded backend
    works out where the range lies; else it has to ask first.
    """

    name: SegmentName
    offset: int
    length: int
    whole: int = 0


@dataclass(frozen=True, slots=True)
class Listed:
    """A stored segment as the backend lists it. ``bytes`` is its length."""

    key: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Usage:
    """What the backend says of itself; None where it cannot tell.

    ``used_bytes`` is the server's own figure (Redis ``used_memory``, size of the directory's
    segments), ``limit_bytes`` its own limit (``maxmemory``, free plus used space of the disk).
    """

    used_bytes: int | None
    limit_bytes: int | None


class Backend(abc.ABC):
    """A store of segments. Concurrent calls are allowed; calls on one name are not ordered."""

    segment_bytes: int = 256 * 1024 - 64
    """Best size of a segment on this backend, in bytes; callers fill segments up to it.

    Redis: 256 KiB less 64, since an exact power of two costs 25 % more memory there. Objects 4 MiB.
    """

    gap_bytes: int = 4096
    """Two ranges of a segment this near to each other are better read as one."""

    stripes: int = 1
    """Into so many parts of one length a segment is cut; best no record lies across a cut."""

    @abc.abstractmethod
    async def open(self) -> None:
        """Connect and check that the server is fit. Raises TierUnavailable or BackendRefused."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Release connections. Idempotent; never raises."""

    @abc.abstractmethod
    async def put(self, name: SegmentName, data: Buffer) -> None:
        """Store a segment, whole. Returns once the backend acknowledged it; one round trip.

        ``data`` is not needed once the call returns. After OutcomeUnknown the name is burnt: what
        lies under it, now or later, may be anything.
        """

    @abc.abstractmethod
    async def get(self, reads: Sequence[Read]) -> list[Buffer | VswapError]:
        """Read ranges, in parallel or pipelined; one round trip where the backend can.

        The result has one item per read: exactly ``length`` bytes, or the error of that read, so
        that one lost segment does not fail its neighbours.
        """

    async def alternatives(self, read: Read) -> AsyncIterator[Buffer]:
        """What else the range may be, for a reader whose check the bytes of :meth:`get` failed.

        Other copies, or what other fragments give. None where there is no redundancy. Never raises.
        """
        return
        yield b""

    @abc.abstractmethod
    async def delete(self, names: Sequence[SegmentName]) -> None:
        """Delete segments; names that do not exist are ignored. After an error any may be gone."""

    @abc.abstractmethod
    def list(self, prefix: str) -> AsyncIterator[Listed]:
        """Every segment whose key starts with ``prefix`` (see :func:`prefix`), in no order.

        Segments put or deleted during the iteration may or may not appear; all others do, once.
        Keys that vswap did not write are skipped.
        """

    @abc.abstractmethod
    async def usage(self) -> Usage:
        """The server's own view of its memory or disk. Raises TierUnavailable."""

    async def check(self) -> None:
        """Whether the server is as fit as it was when it was opened; somebody may have changed it.

        Raises BackendRefused, or TierUnavailable.
        """
        return

    async def life(self) -> str:
        """Names the server's present life: in another one it may have lost what it held.

        Empty where there is no such thing. Raises TierUnavailable.
        """
        return ""
