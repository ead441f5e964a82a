"""Object stores through obstore: S3 and what else it knows; and memory, for tests."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    InvalidPathError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import MemoryStore, from_url

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

_PARALLEL = 16
_EXIT_PAUSE_S = 0.05

# Told from the message alone: the library has no exception for a range beyond the end.
_TOO_SHORT = re.compile(r"status code: 416 |: Invalid range: ")
_OPTIONS = {
    "endpoint": "endpoint",
    "region": "region",
    "virtual_hosted_style_request": "virtual_hosted_style_request",
}


class ObjectBackend(Backend):
    """``s3://bucket/prefix?endpoint=...&region=...&allow_http=true``, ``gs://``, ``az://``,
    ``memory://``. Credentials come from the environment the way each cloud's tools read them;
    for S3 the tier's ``password_env`` or ``password_file`` may hold the secret key.

    A store that ignores conditional creation serves as well: a name is never used twice. A ``put``
    that finds its very own bytes succeeds."""

    segment_bytes = 4 * 2**20
    gap_bytes = 256 * 1024

    def __init__(self, spec: TierSpec) -> None:
        self._spec = spec
        self._store = _make_store(spec)
        self._parallel = asyncio.Semaphore(_PARALLEL)

    def _say(self, text: object) -> str:
        return f"{self._spec.safe_url}: {text}"

    def _reason(self, error: BaseException) -> str:
        """One line: what the library says, without its dump but with the cause hidden in there."""
        if isinstance(error, TimeoutError):
            return self._say(f"no answer within {self._spec.timeout_s:g} s")
        text, _, dump = str(error).partition("\n\nDebug source:")
        line = " ".join(text.split()).partition(": <?xml")[0][:300]
        cause = re.search(r'(?:message|error): "([^"]+)"', dump)
        return self._say(f"{line} ({cause[1]})" if cause else line)

    async def open(self) -> None:
        """Lists one key, which shows that the bucket exists and that we may look."""
        try:
            async for _ in self.list("vswap/"):
                break
        except TierUnavailable as error:
            if isinstance(error.__cause__, PermissionDeniedError | UnauthenticatedError):
                raise BackendRefused(error.message) from error
            raise
        if not self._spec.capacity_bytes:
            raise BackendRefused(self._say("an object store has no limit: set capacity_bytes"))

    async def close(self) -> None:
        # The library's threads touch Python once more after a call has returned, and abort the
        # process where that meets the interpreter's end (pyo3-async-runtimes issue 40).
        await asyncio.sleep(_EXIT_PAUSE_S)

    async def put(self, name: SegmentName, data: Buffer) -> None:
        payload = bytes(data)
        try:
            async with self._parallel, asyncio.timeout(self._spec.timeout_s):
                await obstore.put_async(self._store, name.key, payload, mode="create")
        except AlreadyExistsError as error:
            # A reply that was lost and repeated by the library finds our own first attempt.
            if not await self._holds(name, payload):
                raise SegmentExists(self._say(f"{name.key} exists"), name=name.key) from error
        except FileNotFoundError as error:
            raise TierUnavailable(self._say("no such bucket")) from error
        except (PermissionDeniedError, UnauthenticatedError, InvalidPathError) as error:
            raise TierUnavailable(self._reason(error)) from error
        except (BaseError, OSError, TimeoutError) as error:
            # Even where the last attempt could not connect: an earlier one may have.
            raise OutcomeUnknown(self._reason(error)) from error

    async def _holds(self, name: SegmentName, payload: bytes) -> bool:
        try:
            async with self._parallel, asyncio.timeout(self._spec.timeout_s):
                found = await obstore.get_async(self._store, name.key)
                return found.meta["size"] == len(payload) and await found.bytes_async() == payload
        except FileNotFoundError:
            return False
        except (BaseError, OSError, TimeoutError) as error:
            raise OutcomeUnknown(self._reason(error)) from error

    async def get(self, reads: Sequence[Read]) -> list[Buffer | VswapError]:
        return list(await asyncio.gather(*map(self._get, reads)))

    async def _get(self, read: Read) -> Buffer | VswapError:
        key = read.name.key
        try:
            async with self._parallel, asyncio.timeout(self._spec.timeout_s):
                data = await obstore.get_range_async(
                    self._store, key, start=read.offset, length=read.length
                )
        except FileNotFoundError:
            return PageLost(self._say(f"{key} is missing"))
        except (BaseError, OSError, TimeoutError) as error:
            if _TOO_SHORT.search(str(error)):
                return PageLost(self._say(f"{key} is too short"))
            return TierUnavailable(self._reason(error))
        if len(data) != read.length:
            return PageLost(self._say(f"{key} is too short"))
        return memoryview(data)

    async def delete(self, names: Sequence[SegmentName]) -> None:
        if not names:
            return
        try:
            async with asyncio.timeout(self._spec.timeout_s):
                await obstore.delete_async(self._store, [name.key for name in names])
        except FileNotFoundError:
            if len(names) > 1:
                await asyncio.gather(*(self.delete([name]) for name in names))
        except (BaseError, OSError, TimeoutError) as error:
            raise OutcomeUnknown(self._reason(error)) from error

    async def list(self, prefix: str) -> AsyncIterator[Listed]:
        try:
            async for batch in obstore.list(self._store, prefix=prefix.rstrip("/")):
                for item in batch:
                    if item["path"].startswith(prefix) and SegmentName.parse(item["path"]):
                        yield Listed(item["path"], item["size"])
        except FileNotFoundError as error:
            raise BackendRefused(self._say("no such bucket")) from error
        except (BaseError, OSError) as error:
            if "NoSuchBucket" in str(error):
                raise BackendRefused(self._say("no such bucket")) from error
            raise TierUnavailable(self._reason(error)) from error

    async def usage(self) -> Usage:
        used = 0
        async for item in self.list("vswap/"):
            used += item.bytes
        return Usage(used, None)


def _make_store(spec: TierSpec) -> Any:
    if spec.scheme == "memory":
        return MemoryStore()
    parts = urlsplit(spec.url)
    query = dict(parse_qsl(parts.query))
    options: dict[str, Any] = {_OPTIONS[k]: v for k, v in query.items() if k in _OPTIONS}
    client: dict[str, Any] = {"timeout": f"{spec.timeout_s}s"}
    if query.get("allow_http") == "true":
        client["allow_http"] = True
    unknown = set(query) - set(_OPTIONS) - {"allow_http"}
    if unknown:
        raise BadConfig(
            f"tier {spec.name}: unknown option {sorted(unknown)[0]!r} in url", key="url"
        )
    secret = spec.password()
    if secret is not None and spec.scheme == "s3":
        options["secret_access_key"] = secret
    if query.get("endpoint", "").startswith("http://") and "allow_http" not in client:
        raise BadConfig(
            f"tier {spec.name}: {spec.safe_url}: a plain http endpoint needs &allow_http=true",
            key="url",
        )
    url = urlunsplit(parts._replace(query=""))
    try:
        retry: Any = {"max_retries": 2, "retry_timeout": timedelta(seconds=spec.timeout_s)}
        make: Any = from_url
        return make(url, **options, client_options=client, retry_config=retry)
    except (BaseError, ValueError) as error:
        line = str(error).partition("\n")[0]
        raise BadConfig(f"tier {spec.name}: {spec.safe_url}: {line}", key="url") from error
