"""Segment handles: one row in shared memory per segment the shard has, and what is derived.

Authoritative are the header (who we are, the next serial and sequence) and each row's ``word``
(serial and state), which is written last, with one aligned store. A serial is never used twice; a
handle is recycled once its segment is deleted and unpinned.

============  =================================================================================
FREE          the row means nothing
OPEN          a block of RAM; ``records`` of it count
WRITING       the backend has not acknowledged it: after a crash it is deleted
SEALED        the backend has it
DELETING      nothing points at it; the backend may or may not have it still
============  =================================================================================
"""

from __future__ import annotations

import zlib
from collections import deque
from pathlib import Path
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from vswap.node.entry import MAX_HANDLES, TAGS
from vswap.tiers.backend import SegmentName
from vswap.tiers.record import I64, U64, salt, salts
from vswap.tiers.region import Region
from vswap.tiers.segment import shard_key
from vswap.wire.errors import InternalError, StateInvalid

FREE, OPEN, WRITING, SEALED, DELETING = range(5)
STATE_BITS = 4

DAMAGED = 1 << 15
"""In a row's ``lacking``: some server's part is bad, nobody knows whose. The other bits stand for
the servers of a redundant tier, by place: that one's part is missing."""

MAGIC = b"VSWAPSHD"
VERSION = 3
FILE = "shard"
UNBEGUN = "unbegun"
"""A file that is there as long as nothing else in the directory counts: while it is erased, and
until the first life has begun. Without it whatever is missing or half is damage."""
FORMER = "former-"
"""Empty files of this name and a uuid: shards whose state was here, and of which something may be
left on the node's own tiers (see `former.py`)."""
_HEADER_BYTES = 4096
_CHUNK_ROWS = 1024

_HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("check", "<u4"),
        ("shard", "V16"),
        ("cluster", "V16"),
        ("boot", "V16"),
        ("incarnation", "<u8"),
        ("next_serial", "<u8"),
        ("next_sequence", "<u8"),
        ("granted", "<u8", (TAGS,)),
    ]
)
_ROW = np.dtype(
    [
        ("word", "<u8"),
        ("born", "<f8"),
        ("stored", "<u4"),
        ("payload", "<u4"),
        ("records", "<u4"),
        ("block", "<u4"),
        ("tag", "u1"),
        ("lacking", "<u2"),
        ("_reserved", "V29"),
    ]
)
assert _ROW.itemsize == 64


def boot_id() -> bytes:
    """Identifies this boot of the host: shared memory does not outlive it."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return UUID(file.read().strip()).bytes


def begun(region: Region) -> bool:
    """Whether a shard is there.

    Raises StateInvalid where only the rest of one is there: its pages would be lost unsaid.
    """
    if region.exists(UNBEGUN) or not state_files(region):
        return False
    if not region.exists(FILE):
        raise StateInvalid(
            f"{region.directory / FILE} is missing, though other files of a node are there; put "
            "it back, or start with --fresh and lose the pages",
            path=str(region.directory / FILE),
        )
    return True


def state_files(region: Region) -> list[Path]:
    """The files of a shard's state that are there, without :data:`UNBEGUN`."""
    return [
        path
        for path in region.directory.iterdir()
        if path.name == FILE or path.suffix in (".table", ".heat", ".arena", ".json", ".new")
    ]


def shard_of(region: Region) -> UUID | None:
    """Whose state is there, where its header can be believed."""
    if not region.exists(FILE) or region.size(FILE) < _HEADER_BYTES:
        return None
    header = np.fromfile(region.directory / FILE, _HEADER, 1)[0]
    if header["magic"] != MAGIC or header["version"] != VERSION or header["check"] != _sum(header):
        return None
    return UUID(bytes=header["shard"].tobytes())


def _sum(header: np.void) -> int:
    """Of what never changes in it."""
    return zlib.crc32(header["shard"].tobytes() + header["boot"].tobytes())


def erase(region: Region, *, left: bool = False) -> None:
    """Removes the state of a life. Killed at any point, the next start begins anew.

    Unless the shard has ``left`` its tiers empty, it is noted that there may be something of it.
    """
    (region.directory / UNBEGUN).touch()
    shard = None if left else shard_of(region)
    if shard is not None:
        # A file without content is made also where memory is full.
        (region.directory / f"{FORMER}{shard}").touch()
    for path in state_files(region):
        path.unlink()


class Handles:
    """The shard's segments. Written by the event loop alone.

    Derived, in process memory, indexed by handle: ``live_bytes`` and ``live_records`` (what table
    entries point at), ``pins`` (readers that keep the segment from deletion), ``salts`` (what ties
    a record's checksum to its segment).
    """

    def __init__(self, region: Region, *, fresh: tuple[UUID, bytes] | None) -> None:
        """``fresh`` = (shard uuid, boot id) starts anew; None opens what is there."""
        size = _HEADER_BYTES + MAX_HANDLES * _ROW.itemsize
        self._map = region.create(FILE, size) if fresh else region.open(FILE, size)
        if fresh:
            self._map.reserve(0, _HEADER_BYTES)
        self._header = self._map.array(_HEADER, 0, 1)
        self.rows = self._map.array(_ROW, _HEADER_BYTES, MAX_HANDLES)
        self._name_columns()
        """Of segments in RAM: the block of the arena."""
        self._allocated = 0
        """Rows whose memory is reserved; all handles handed out lie below."""
        self._free: deque[int] = deque()
        self.live_bytes: I64 = np.zeros(0, np.int64)
        self.live_records: I64 = np.zeros(0, np.int64)
        self.pins: NDArray[np.int32] = np.zeros(0, np.int32)
        self.salts: U64 = np.zeros(0, np.uint64)
        if fresh:
            self._start(*fresh)
        else:
            self._check()
        self.shard = UUID(bytes=self._header["shard"][0].tobytes())
        self._key = shard_key(self.shard)
        if not fresh:
            self._load()

    def _start(self, shard: UUID, boot: bytes) -> None:
        header = self._header[0]
        header["shard"], header["boot"] = np.void(shard.bytes), np.void(boot)
        header["version"], header["next_serial"], header["next_sequence"] = VERSION, 1, 1
        header["check"] = _sum(header)
        header["magic"] = MAGIC

    def _check(self) -> None:
        path = str(self._map.path)
        if self._header["magic"][0] != MAGIC:
            raise StateInvalid(f"{path} is not the state of a vswap node", path=path)
        version = int(self._header["version"][0])
        if version != VERSION:
            raise StateInvalid(
                f"{path} has format version {version}, this vswap knows {VERSION}: "
                "run the other version, or start with --fresh and lose its pages",
                path=path,
            )
        header = self._header[0]
        counts = ("incarnation", "next_serial", "next_sequence")
        if header["check"] != _sum(header) or not all(header[name] for name in counts):
            raise self._damaged("its header")

    def _damaged(self, what: str) -> StateInvalid:
        path = str(self._map.path)
        return StateInvalid(
            f"{path} is damaged ({what}); start with --fresh and lose the pages", path=path
        )

    def _load(self) -> None:
        last = 0
        for start, end in self._map.extents():
            low = max(start - _HEADER_BYTES, 0) // _ROW.itemsize
            high = max(end - _HEADER_BYTES, 0) // _ROW.itemsize
            used = np.flatnonzero(self.rows["word"][low:high])
            last = max(last, low + int(used[-1]) + 1 if len(used) else 0)
        while self._allocated < last:
            self._grow()
        serials = self.rows["word"][: self._allocated] >> np.uint64(STATE_BITS)
        if last and int(serials.max()) >= self.next_serial():
            raise self._damaged(f"serial {serials.max()} is there, {self.next_serial()} is next")
        self.salts[:] = salts(self._key, serials)
        self._free.clear()
        states = self.states(np.arange(self._allocated))
        self._free.extend(np.flatnonzero(states == FREE).tolist())

    # ---------------------------------------------------------------- header

    @property
    def boot(self) -> bytes:
        return bytes(self._header["boot"][0].tobytes())

    @property
    def cluster(self) -> UUID:
        """All zeros until the shard joins a cluster."""
        return UUID(bytes=self._header["cluster"][0].tobytes())

    @cluster.setter
    def cluster(self, uuid: UUID) -> None:
        self._header["cluster"][0] = np.void(uuid.bytes)

    @property
    def incarnation(self) -> int:
        return int(self._header["incarnation"][0])

    def begin_life(self) -> None:
        self._header["incarnation"][0] += 1

    @property
    def granted(self) -> U64:
        """By tag, the bytes that the coordinator lets the shard hold in a tier of the cluster."""
        granted: U64 = self._header["granted"][0]
        return granted

    def take_sequences(self, count: int) -> int:
        """The first of ``count`` fresh sequence numbers."""
        first = int(self._header["next_sequence"][0])
        self._header["next_sequence"][0] = first + count
        return first

    # ---------------------------------------------------------------- rows

    def _name_columns(self) -> None:
        """Views of what stores and loads look up: a field of a row takes five times as long."""
        rows = self.rows
        self.blocks: NDArray[np.uint32] = rows["block"]
        self.payloads: NDArray[np.uint32] = rows["payload"]
        self.counts: NDArray[np.uint32] = rows["records"]

    def states(self, handles: I64) -> NDArray[np.uint8]:
        return (self.rows["word"][handles] & np.uint64(15)).astype(np.uint8)

    def state(self, handle: int) -> int:
        return int(self.rows["word"][handle]) & 15

    def serial(self, handle: int) -> int:
        return int(self.rows["word"][handle]) >> STATE_BITS

    def name(self, handle: int) -> SegmentName:
        return SegmentName(self.cluster, self.shard, self.serial(handle))

    def create(self, tag: int, state: int, now: float, *, block: int = 0, stored: int = 0) -> int:
        """A handle for a new segment with a fresh serial, published in ``state``.

        The serial counter moves first, so that no crash lets a serial be used twice. Raises
        OutOfTiers when shared memory is full.
        """
        if not self._free:
            self._grow()
        handle = self._free.popleft()
        serial = int(self._header["next_serial"][0])
        self._header["next_serial"][0] = serial + 1
        row = self.rows[handle]
        row["born"], row["tag"], row["block"], row["stored"] = now, tag, block, stored
        row["payload"] = row["records"] = row["lacking"] = 0
        self.live_bytes[handle] = self.live_records[handle] = self.pins[handle] = 0
        self.salts[handle] = salt(self._key, serial)
        self.rows["word"][handle] = serial << STATE_BITS | state
        return handle

    def next_serial(self) -> int:
        return int(self._header["next_serial"][0])

    def set_state(self, handle: int, state: int) -> None:
        self.rows["word"][handle] = self.serial(handle) << STATE_BITS | state

    def find(self, serial: int) -> int | None:
        """The handle of a segment. Looks at every row."""
        serials = self.rows["word"][: self._allocated] >> np.uint64(STATE_BITS)
        found = np.flatnonzero(serials == np.uint64(serial))
        return int(found[0]) if len(found) else None

    def recycle(self, handle: int) -> None:
        if self.pins[handle] or self.live_records[handle]:
            raise InternalError(f"handle {handle} recycled while in use")
        self.rows["word"][handle] = 0
        self._free.append(handle)

    def _grow(self) -> None:
        start, count = self._allocated, _CHUNK_ROWS
        if start + count > MAX_HANDLES:
            raise InternalError("all segment handles are in use")
        self._map.reserve(_HEADER_BYTES + start * _ROW.itemsize, count * _ROW.itemsize)
        self._allocated += count
        self.live_bytes = np.concatenate((self.live_bytes, np.zeros(count, np.int64)))
        self.live_records = np.concatenate((self.live_records, np.zeros(count, np.int64)))
        self.pins = np.concatenate((self.pins, np.zeros(count, np.int32)))
        self.salts = np.concatenate((self.salts, np.zeros(count, np.uint64)))
        self._free.extend(range(start, start + count))

    def in_use(self) -> I64:
        """Handles of every row that is not FREE."""
        return np.flatnonzero(self.rows["word"][: self._allocated]).astype(np.int64)

    def spare(self) -> I64:
        """Handles that a new segment may get."""
        return np.fromiter(self._free, np.int64, len(self._free))

    @property
    def allocated(self) -> int:
        """All rows in use or spare lie below."""
        return self._allocated

    def close(self) -> None:
        self._header = self._header.copy()
        self.rows = self.rows[:0].copy()
        self._name_columns()
        self._map.close()
