"""Files: segments in a directory of a local disk (or of a mounted one).

Reads of cached segments are an ``os.pread`` in a worker thread; through an object store library the
same read costs fifty times as much. A segment is written under a temporary name and then linked, so
that it is never seen by halves and never replaced.
"""

from __future__ import annotations

import asyncio
import builtins
import errno
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
T = TypeVar("T")


class FileBackend(Backend):
    """``file:///absolute/directory``. No fsync: pages outlive the daemon, not the host."""

    segment_bytes = 4 * 2**20
    gap_bytes = 16 * 1024

    def __init__(self, spec: TierSpec) -> None:
        parts = urlsplit(spec.url)
        if parts.netloc or not parts.path.startswith("/"):
            raise BadConfig(f"tier {spec.name}: {spec.url}: say file:///absolute/path", key="url")
        self._root = Path(unquote(parts.path))
        self._spec = spec
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="files")

    async def open(self) -> None:
        await self._run(self._open)

    def _open(self) -> None:
        probe = self._root / f"vswap/probe-{secrets.token_hex(8)}{_TEMPORARY}"
        try:
            probe.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            probe.write_bytes(b"vswap")
            probe.unlink()
        except OSError as error:
            raise BackendRefused(
                f"directory {self._root} is not writable: {error.strerror}", path=str(self._root)
            ) from error
        if not self._spec.capacity_bytes:
            raise BackendRefused(f"directory {self._root}: set capacity_bytes")

    async def close(self) -> None:
        self._threads.shutdown(wait=False)

    async def put(self, name: SegmentName, data: Buffer) -> None:
        await self._run(lambda: self._put(self._root / name.key, data))

    def _put(self, path: Path, data: Buffer) -> None:
        temporary = path.with_name(f"{path.name}-{secrets.token_hex(4)}{_TEMPORARY}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with open(temporary, "xb", buffering=0) as file:
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]
            os.link(temporary, path)
        except FileExistsError as error:
            raise SegmentExists(f"{path} exists", name=path.name) from error
        except OSError as error:
            raise TierUnavailable(f"{path}: {error.strerror}") from error
        finally:
            temporary.unlink(missing_ok=True)

    async def get(self, reads: Sequence[Read]) -> list[Buffer | VswapError]:
        if not reads:
            return []
        return await self._run(lambda: self._get(reads))

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
                try:
                    (self._root / name.key).unlink(missing_ok=True)
                except OSError as error:
                    raise OutcomeUnknown(f"{self._root / name.key}: {error.strerror}") from error

        await self._run(work)

    async def list(self, prefix: str) -> AsyncIterator[Listed]:
        for listed in await self._run(lambda: self._list(prefix)):
            yield listed

    def _list(self, prefix: str) -> Sequence[Listed]:
        start = self._root / prefix.rpartition("/")[0]
        found: builtins.list[Listed] = []
        try:
            for directory, _, names in os.walk(start, onerror=_raise):
                relative = Path(directory).relative_to(self._root)
                for name in names:
                    key = f"{relative}/{name}"
                    if not key.startswith(prefix) or SegmentName.parse(key) is None:
                        continue
                    try:
                        found.append(Listed(key, os.stat(Path(directory) / name).st_size))
                    except FileNotFoundError:
                        continue
        except FileNotFoundError:
            return found
        except OSError as error:
            raise TierUnavailable(f"{start}: {error.strerror}") from error
        return found

    async def usage(self) -> Usage:
        used = sum(listed.bytes for listed in await self._run(lambda: self._list("vswap/")))
        try:
            free = shutil.disk_usage(self._root).free
        except OSError as error:
            raise TierUnavailable(f"{self._root}: {error.strerror}") from error
        return Usage(used, used + free)

    async def _run(self, work: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._threads, work)
        except RuntimeError as error:
            raise TierUnavailable(f"directory {self._root}: closed") from error


def _pread(fd: int, path: Path, read: Read) -> Buffer | VswapError:
    try:
        data = os.pread(fd, read.length, read.offset)
    except OSError as error:
        return _read_error(path, error)
    if len(data) != read.length:
        return PageLost(f"{path} is too short")
    return data


def _read_error(path: Path, error: OSError) -> VswapError:
    if error.errno == errno.ENOENT:
        return PageLost(f"{path} is missing")
    return TierUnavailable(f"{path}: {error.strerror}")


def _raise(error: OSError) -> None:
    if error.errno != errno.ENOENT:
        raise error
