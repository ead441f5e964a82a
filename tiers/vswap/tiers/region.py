"""Shared memory: sparse files on a tmpfs, mapped whole, allocated before they are touched.

Touching a hole of a full tmpfs is SIGBUS, so :meth:`Mapping.reserve` allocates first and turns a
full file system into an error. *Reading* a hole allocates a page too: scan with
:meth:`Mapping.extents`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vswap.wire.errors import OutOfTiers, StateInvalid

_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_MADV_POPULATE_READ = 22
_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Mapping:
    """One sparse file, mapped shared and whole. Not thread-safe."""

    def __init__(
        self, path: Path, size: int, *, create: bool, grow: bool = False,
        on_full: Callable[[], int] = lambda: 0, resident: bool = False,
    ) -> None:  # fmt: skip
        """Maps ``size`` bytes of ``path``; ``create`` replaces what is there; ``resident`` touches
        all of that (a tenth of a second a GiB).

        Raises StateInvalid for an existing file that is shorter, unless it is to ``grow``, or that
        holds something beyond; a longer one with nothing there is left as long as it is.
        ``on_full`` is asked to give memory back, and says how much of it did, before
        :meth:`reserve` gives up.
        """
        self._on_full = on_full
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_TRUNC if create else 0)
        self.path = path
        self.size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            self._fd = os.open(path, flags, 0o600)
        except FileNotFoundError as error:
            raise StateInvalid(f"{path} is missing", path=str(path)) from error
        try:
            length = os.fstat(self._fd).st_size
            if length < self.size:
                if not create and not grow:
                    raise StateInvalid(
                        f"{path} is damaged: it has {length} bytes instead of {self.size}; "
                        "--fresh starts empty, and loses the pages",
                        path=str(path),
                    )
                os.ftruncate(self._fd, self.size)
            elif self._holds_more():
                raise StateInvalid(
                    f"{path} is longer than {self.size} bytes; --fresh starts empty, and loses "
                    "the pages",
                    path=str(path),
                )
            self._mmap = mmap.mmap(self._fd, self.size)
        except BaseException:
            self.close()
            raise
        self.bytes: NDArray[np.uint8] = np.frombuffer(self._mmap, np.uint8)
        if resident:
            self._touch()

    def _holds_more(self) -> bool:
        """Whether the file has anything behind what is mapped."""
        try:
            os.lseek(self._fd, self.size, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return False
            raise
        return True

    def _touch(self) -> None:
        for start, end in self.extents():
            with contextlib.suppress(OSError):  # Linux before 5.14 does not know how.
                self._mmap.madvise(_MADV_POPULATE_READ, start, end - start)

    def array(self, dtype: Any, offset: int = 0, count: int = -1) -> NDArray[Any]:
        """A view; holding one does not allocate memory."""
        return np.frombuffer(self._mmap, dtype, count, offset)

    def reserve(self, offset: int, length: int) -> None:
        """Allocates a range. Raises OutOfTiers when shared memory is full; its content stays.

        The kernel takes back what it had allocated of a range that does not fit whole.
        """
        try:
            os.posix_fallocate(self._fd, offset, length)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
                raise
            if self._on_full():
                self.reserve(offset, length)
                return
            raise OutOfTiers(
                f"shared memory at {self.path.parent} is full (needed {length} bytes more)",
                need=length,
            ) from error

    def punch(self, offset: int, length: int) -> None:
        """Gives a page-aligned range back; it reads as zeros afterwards."""
        # Not MADV_REMOVE: that is refused where memory is locked.
        if _fallocate(self._fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(self.path))

    def advise_huge(self) -> None:
        """Asks for huge pages, where the kernel has them."""
        try:
            self._mmap.madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise

    def extents(self) -> Iterator[tuple[int, int]]:
        """The allocated ranges, as (start, end) in bytes."""
        position = 0
        while position < self.size:
            try:
                start = os.lseek(self._fd, position, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                raise
            position = os.lseek(self._fd, start, os.SEEK_HOLE)
            yield start, position

    @property
    def allocated_bytes(self) -> int:
        return os.fstat(self._fd).st_blocks * 512

    def close(self, *, unlink: bool = False) -> None:
        """Unmaps when the last view is gone. Idempotent."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        os.close(fd)
        self.bytes = np.empty(0, np.uint8)
        if unlink:
            self.path.unlink(missing_ok=True)

    def __del__(self) -> None:
        # Whoever fails while it opens, or is killed in a simulation, closes nothing.
        if getattr(self, "_fd", -1) >= 0:
            os.close(self._fd)


class Region:
    """A directory of mappings: the seam behind which a node's shared memory lies.

    ``resident``: a process that locks its memory as it touches it has everything locked at once
    that an earlier life left.
    """

    def __init__(self, directory: Path, *, resident: bool = False) -> None:
        self.directory = directory
        self._resident = resident
        self.on_full: list[Callable[[], int]] = []
        """Asked for memory when there is none left: each gives back what it can, and says how
        many pieces that was."""

    def _make_room(self) -> int:
        return sum(give() for give in self.on_full)

    def create(self, name: str, size: int) -> Mapping:
        return Mapping(self.directory / name, size, create=True, on_full=self._make_room)

    def open(self, name: str, size: int, *, grow: bool = False) -> Mapping:
        """Raises StateInvalid where it is missing, or shorter and not to ``grow``."""
        return Mapping(
            self.directory / name, size, create=False, grow=grow, on_full=self._make_room,
            resident=self._resident,
        )  # fmt: skip

    def exists(self, name: str) -> bool:
        return (self.directory / name).exists()

    def remove(self, name: str) -> None:
        """Unless it is gone."""
        (self.directory / name).unlink(missing_ok=True)

    def size(self, name: str) -> int:
        return (self.directory / name).stat().st_size

    def free_bytes(self) -> int:
        stat = os.statvfs(self.directory)
        return stat.f_bavail * stat.f_frsize
