"""Files: segments in a directory of a local disk (or of a mounted one).

Reads of cached segments are an ``os.pread`` in a worker thread; through an object store library the
same read costs fifty times as much. A segment is written under a temporary name and then linked, so
that it is never seen by halves and never replaced. What a killed writer left under such a name is
removed when the segment is deleted, or by a later `open`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit

from vswap.tiers.backend import Backend, Buffer, Listed, Read, SegmentName, Usage
from vswap.tiers.spec import TierSpec
from vswap.wire.errors import (
    BackendRefused,
    BadConfig,
    OutcomeUnknown,
    PageLost,
    SegmentExists,
    TierUnavailable,
    VswapError,
)

_THREADS = 4
_TEMPORARY = ".part"
_ABANDONED_S = 3600.0
"""Age from which a temporary file is nobody's: other nodes may be writing to the same directory."""

T = TypeVar("T")


class FileBackend(Backend):
    """``file:///absolute/directory``. No fsync: pages outlive the daemon, not the host.

    A call that exceeds the tier's timeout (a mounted disk that hangs) fails, yet goes on in its
    thread: a ``put`` of unknown outcome may still store whatever its buffer then holds.
    """

    segment_bytes = 4 * 2**20
    gap_bytes = 16 * 1024

    def __init__(self, spec: TierSpec) -> None:
        parts = urlsplit(spec.url)
        if parts.netloc or not parts.path.startswith("/"):
            raise BadConfig(
                f"tier {spec.name}: {spec.safe_url}: say file:///absolute/path", key="url"
            )
        self._root = Path(unquote(parts.path))
        self._spec = spec
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="files")

    async def open(self) -> None:
        await self._run(self._open)

    def _open(self) -> None:
        if not self._spec.capacity_bytes:
            raise BackendRefused(f"directory {self._root}: set capacity_bytes")
        ours = self._root / "vswap"
        probe = ours / f"probe-{secrets.token_hex(8)}{_TEMPORARY}"
        linked = probe.with_name(f"linked-{probe.name}")
        fault = "is not writable"
        try:
            try:
                ours.mkdir(parents=True, exist_ok=True, mode=0o700)
                probe.write_bytes(b"vswap")
                fault = "has no hard links"
                os.link(probe, linked)
            finally:
                linked.unlink(missing_ok=True)
                probe.unlink(missing_ok=True)
        except OSError as error:
            # A full disk still serves what it holds.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise BackendRefused(
                    f"directory {self._root} {fault}: {error.strerror}",
                    path=str(self._root),
                ) from error
        before = time.time() - _ABANDONED_S
        for path in ours.rglob(f"*{_TEMPORARY}"):
            # Another node may have removed it first, or may not let us.
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < before:
                    path.unlink()

    async def close(self) -> None:
        self._threads.shutdown(wait=False)

    async def put(self, name: SegmentName, data: Buffer) -> None:
        await self._run(lambda: self._put(self._root / name.key, data), late=OutcomeUnknown)

    def _put(self, path: Path, data: Buffer) -> None:
        temporary = path.with_name(f"{path.name}-{secrets.token_hex(4)}{_TEMPORARY}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with open(temporary, "xb", buffering=0) as file:
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]
            try:
                os.link(temporary, path)
            except FileExistsError as error:
                raise SegmentExists(f"{path} exists", name=path.name) from error
        except OSError as error:
            raise TierUnavailable(f"{path}: {error.strerror}") from error
        finally:
            # Left behind it does no harm, see `_open`; and the segment is where it is.
            with contextlib.suppress(OSError):
                temporary.unlink()

    async def get(self, reads: Sequence[Read]) -> list[Buffer | VswapError]:
        if not reads:
            return []
        try:
            return await self._run(lambda: self._get(reads))
        except TierUnavailable as error:
            return [error] * len(reads)

    def _get(self, reads: Sequence[Read]) -> list[Buffer | VswapError]:
        results: list[Buffer | VswapError] = [b""] * len(reads)
        order = sorted(range(len(reads)), key=lambda i: reads[i].name.key)
        for key, indices in groupby(order, key=lambda i: reads[i].name.key):
            path = self._root / key
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                for i in indices:
                    results[i] = _read_error(path, error)
                continue
            try:
                for i in indices:
                    results[i] = _pread(fd, path, reads[i])
            finally:
                os.close(fd)
        return results

    async def delete(self, names: Sequence[SegmentName]) -> None:
        def work() -> None:
            for name in names:
                path = self._root / name.key
                try:
                    _delete(path)
                except OSError as error:
                    raise OutcomeUnknown(f"{path}: {error.strerror}") from error

        await self._run(work, late=OutcomeUnknown)

    async def list(self, prefix: str) -> AsyncIterator[Listed]:
        pending = [self._root / prefix.rpartition("/")[0]]
        while pending:
            directory = pending.pop()
            directories, found = await self._run(partial(self._scan, directory, prefix))
            pending += directories
            for listed in found:
                yield listed

    def _scan(self, directory: Path, prefix: str) -> tuple[Sequence[Path], Sequence[Listed]]:
        """Directories and segments of one directory."""
        key = directory.relative_to(self._root)
        directories, found = [], []
        try:
            with os.scandir(directory) as items:
                for item in items:
                    if item.is_dir(follow_symlinks=False):
                        directories.append(directory / item.name)
                        continue
                    name = f"{key}/{item.name}"
                    if name.startswith(prefix) and SegmentName.parse(name) is not None:
                        # It may be deleted at any moment.
                        with contextlib.suppress(FileNotFoundError):
                            found.append(Listed(name, item.stat().st_size))
        except FileNotFoundError:
            return [], []
        except OSError as error:
            raise TierUnavailable(f"{directory}: {error.strerror}") from error
        return directories, found

    async def usage(self) -> Usage:
        used = 0
        async for listed in self.list("vswap/"):
            used += listed.bytes
        return Usage(used, used + await self._run(self._free))

    def _free(self) -> int:
        try:
            return shutil.disk_usage(self._root).free
        except OSError as error:
            raise TierUnavailable(f"{self._root}: {error.strerror}") from error

    async def _run(self, work: Callable[[], T], late: type[VswapError] = TierUnavailable) -> T:
        """In a thread. Raises ``late`` where it takes too long, TierUnavailable if it never ran."""
        try:
            future = self._threads.submit(work)
        except RuntimeError as error:
            raise TierUnavailable(f"directory {self._root}: closed") from error
        try:
            async with asyncio.timeout(self._spec.timeout_s):
                return await asyncio.wrap_future(future)
        except TimeoutError as error:
            kind = TierUnavailable if future.cancel() else late
            raise kind(
                f"directory {self._root}: no answer within {self._spec.timeout_s:g} s"
            ) from error


def _pread(fd: int, path: Path, read: Read) -> Buffer | VswapError:
    try:
        data = os.pread(fd, read.length, read.offset)
    except OSError as error:
        return _read_error(path, error)
    if len(data) != read.length:
        return PageLost(f"{path} is too short")
    return data


def _delete(path: Path) -> None:
    try:
        path.unlink()
    except FileNotFoundError:
        # Perhaps its writer was killed before it was a segment.
        for temporary in path.parent.glob(f"{path.name}-*{_TEMPORARY}"):
            temporary.unlink(missing_ok=True)


def _read_error(path: Path, error: OSError) -> VswapError:
    if error.errno == errno.ENOENT:
        return PageLost(f"{path} is missing")
    return TierUnavailable(f"{path}: {error.strerror}")
