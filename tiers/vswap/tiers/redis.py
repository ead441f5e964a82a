"""Redis: remote memory. One key per segment.

redis-py with hiredis; reads are pipelined. Nothing is retried behind the caller's back, since a
repeated ``SET NX`` would find its own first attempt.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any, TypeVar

import redis.asyncio as aioredis
from redis import exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from vswap.tiers.backend import Backend, Buffer, Listed, Read, SegmentName, Usage
from vswap.tiers.spec import TierSpec
from vswap.wire.errors import (
    BackendRefused,
    OutcomeUnknown,
    PageLost,
    SegmentExists,
    TierUnavailable,
    VswapError,
)

_CONNECTIONS = 4
_PIPELINE_READS = 256
_SCAN_COUNT = 500
T = TypeVar("T")


class RedisBackend(Backend):
    """``redis://``, ``rediss://`` and ``redis+unix://``. Secrets never show in messages."""

    segment_bytes = 256 * 1024 - 64

    def __init__(self, spec: TierSpec) -> None:
        self._spec = spec
        url = spec.resolved_url()
        if url.startswith("redis+unix://"):
            url = "unix://" + url.removeprefix("redis+unix://")
        pool: Any = aioredis.BlockingConnectionPool.from_url(
            url,
            max_connections=_CONNECTIONS,
            timeout=spec.timeout_s,
            socket_timeout=spec.timeout_s,
            socket_connect_timeout=spec.timeout_s,
            retry=Retry(NoBackoff(), 0),
        )
        self._redis: Any = aioredis.Redis(connection_pool=pool)

    def _say(self, text: object) -> str:
        return f"{self._spec.safe_url}: {text}"

    # ---------------------------------------------------------------- open

    async def open(self) -> None:
        try:
            info = await self._within(self._redis.info())
            if info.get("role") == "slave":
                raise BackendRefused(self._say("is a replica; name its primary"))
            await self._check_policy(info)
        except (exceptions.AuthenticationError, exceptions.NoPermissionError) as error:
            if "HELLO" in str(error):
                raise BackendRefused(
                    self._say("wants a password: set password_env or password_file")
                ) from error
            raise BackendRefused(self._say(f"refuses us: {error}")) from error
        except exceptions.ResponseError as error:
            if "NOAUTH" in str(error) or "WRONGPASS" in str(error):
                raise BackendRefused(self._say(f"refuses us: {error}")) from error
            raise TierUnavailable(self._say(error)) from error
        except (exceptions.RedisError, OSError, TimeoutError) as error:
            raise TierUnavailable(self._say(_reason(error))) from error

    async def _check_policy(self, info: dict[str, Any]) -> None:
        policy, maximum = info.get("maxmemory_policy"), info.get("maxmemory")
        try:
            config = await self._within(self._redis.config_get("maxmemory*"))
            policy, maximum = config["maxmemory-policy"], int(config["maxmemory"])
        except exceptions.ResponseError as error:
            if not self._spec.assert_noeviction:
                raise BackendRefused(
                    self._say(
                        f"CONFIG is forbidden ({error}), so its eviction policy cannot be checked; "
                        "if it is noeviction, say assert_noeviction = true"
                    )
                ) from error
            policy = "noeviction"
        if policy != "noeviction":
            raise BackendRefused(
                self._say(
                    f"evicts ({policy}), which is silent loss: "
                    "CONFIG SET maxmemory-policy noeviction"
                )
            )
        if not int(maximum or 0) and not self._spec.capacity_bytes:
            raise BackendRefused(
                self._say("has no maxmemory, so the tier needs a capacity (capacity_bytes)")
            )

    async def close(self) -> None:
        try:
            await self._redis.aclose()
            await self._redis.connection_pool.disconnect()
        except (exceptions.RedisError, OSError):
            return

    # ---------------------------------------------------------------- segments

    async def put(self, name: SegmentName, data: Buffer) -> None:
        stored = await self._write(self._redis.set(name.key, data, nx=True), name.key)
        if not stored:
            raise SegmentExists(self._say(f"{name.key} exists"), name=name.key)

    async def get(self, reads: Sequence[Read]) -> list[Buffer | VswapError]:
        results: list[Buffer | VswapError] = []
        for start in range(0, len(reads), _PIPELINE_READS):
            results += await self._get(reads[start : start + _PIPELINE_READS])
        return results

    async def _get(self, reads: Sequence[Read]) -> list[Buffer | VswapError]:
        pipeline = self._redis.pipeline(transaction=False)
        for read in reads:
            pipeline.getrange(read.name.key, read.offset, read.offset + read.length - 1)
        try:
            answers = await self._within(pipeline.execute(raise_on_error=False))
        except (exceptions.RedisError, OSError, TimeoutError) as error:
            gone = TierUnavailable(self._say(_reason(error)))
            return [gone] * len(reads)
        return [self._answer(read, data) for read, data in zip(reads, answers, strict=True)]

    def _answer(self, read: Read, data: Any) -> Buffer | VswapError:
        if isinstance(data, Exception):
            return TierUnavailable(self._say(_reason(data)))
        if len(data) != read.length:
            return PageLost(self._say(f"{read.name.key} is missing or too short"))
        found: bytes = data
        return found

    async def delete(self, names: Sequence[SegmentName]) -> None:
        if names:
            await self._write(self._redis.unlink(*(name.key for name in names)), "delete")

    async def list(self, prefix: str) -> AsyncIterator[Listed]:
        cursor, seen = 0, set[str]()
        while True:
            try:
                cursor, found = await self._within(
                    self._redis.scan(cursor, match=f"{prefix}*", count=_SCAN_COUNT)
                )
                keys = [key.decode(errors="replace") for key in found]
                keys = [key for key in keys if key not in seen and SegmentName.parse(key)]
                pipeline = self._redis.pipeline(transaction=False)
                for key in keys:
                    pipeline.strlen(key)
                lengths = await self._within(pipeline.execute()) if keys else []
            except (exceptions.RedisError, OSError, TimeoutError) as error:
                raise TierUnavailable(self._say(_reason(error))) from error
            seen.update(keys)
            for key, length in zip(keys, lengths, strict=True):
                if length:
                    yield Listed(key, length)
            if not cursor:
                return

    async def usage(self) -> Usage:
        try:
            info = await self._within(self._redis.info("memory"))
        except (exceptions.RedisError, OSError, TimeoutError) as error:
            raise TierUnavailable(self._say(_reason(error))) from error
        return Usage(int(info["used_memory"]), int(info.get("maxmemory") or 0) or None)

    # ---------------------------------------------------------------- errors

    async def _within(self, work: Awaitable[T]) -> T:
        async with asyncio.timeout(self._spec.timeout_s):
            return await work

    async def _write(self, work: Awaitable[Any], what: str) -> Any:
        """A write that failed before it was sent did not happen; after that, nobody knows."""
        try:
            return await self._within(work)
        except exceptions.OutOfMemoryError as error:
            raise TierUnavailable(self._say("the server is out of memory")) from error
        except exceptions.ResponseError as error:
            if "OOM" in str(error):
                raise TierUnavailable(self._say("the server is out of memory")) from error
            raise TierUnavailable(self._say(_reason(error))) from error
        except (exceptions.RedisError, OSError, TimeoutError) as error:
            if _never_sent(error):
                raise TierUnavailable(self._say(_reason(error))) from error
            raise OutcomeUnknown(self._say(f"{what}: {_reason(error)}")) from error


def _never_sent(error: BaseException) -> bool:
    text = str(error)
    if isinstance(error, exceptions.ConnectionError) and not isinstance(
        error, exceptions.TimeoutError
    ):
        return "connecting to" in text or "No connection available" in text or "Error 111" in text
    return isinstance(error, ConnectionRefusedError | FileNotFoundError)


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__
