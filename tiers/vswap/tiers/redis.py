"""Redis: remote memory. One key per segment.

redis-py's connections with hiredis; reads are pipelined. Nothing is retried behind the caller's
back, since a repeated ``SET NX`` would find its own first attempt.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from typing import Any
from urllib.parse import parse_qs, urlsplit

import redis.asyncio as aioredis
from redis import exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

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

_CONNECTIONS = 4
_PIPELINE_READS = 256
_SCAN_COUNT = 500
_TLS_OPTIONS = {
    "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname",
}  # fmt: skip

# Connection errors to redis-py, yet answers of the server: it did not do what was asked.
_ANSWERS = (exceptions.BusyLoadingError, exceptions.AuthenticationError)


class RedisBackend(Backend):
    """``redis://[user:password@]host[:port][/db]``, ``rediss://`` (options ``ssl_ca_certs``,
    ``ssl_certfile``, ``ssl_keyfile``, ``ssl_cert_reqs``, ``ssl_check_hostname``) and
    ``redis+unix:///path[?db=N]``. At most four connections. Secrets never show in messages."""

    segment_bytes = 256 * 1024 - 64

    def __init__(self, spec: TierSpec) -> None:
        self._spec = spec
        self._pool = _make_pool(spec)

    def _say(self, text: object) -> str:
        return f"{self._spec.safe_url}: {text}"

    # ---------------------------------------------------------------- open

    async def open(self) -> None:
        await self.check()

    async def check(self) -> None:
        try:
            info = await self._info()
        except TierUnavailable as error:
            if isinstance(error.__cause__, exceptions.AuthenticationError):
                raise BackendRefused(
                    f"{error.message} (set password_env or password_file)"
                ) from error
            if isinstance(error.__cause__, exceptions.NoPermissionError):
                raise BackendRefused(error.message) from error
            raise
        if info.get("role") == "slave":
            raise BackendRefused(self._say("is a replica; name its primary"))
        if info.get("cluster_enabled") == "1":
            raise BackendRefused(self._say("is a Redis Cluster; name single servers as tiers"))
        if info.get("loading") == "1":
            raise TierUnavailable(self._say("is loading its data set"))
        await self._check_policy(info)

    async def _check_policy(self, info: dict[str, str]) -> None:
        policy, maximum = info.get("maxmemory_policy"), info.get("maxmemory")
        answers = await self._call(
            ["CONFIG", "GET", "maxmemory-policy"], ["CONFIG", "GET", "maxmemory"]
        )
        forbidden = next((a for a in answers if isinstance(a, exceptions.ResponseError)), None)
        if forbidden is None:
            policy, maximum = (answer[1].decode() for answer in answers)
        elif not self._spec.assert_noeviction:
            raise BackendRefused(
                self._say(
                    f"CONFIG is forbidden ({forbidden}), so its eviction policy cannot be checked; "
                    "if it is noeviction, say assert_noeviction = true"
                )
            )
        # INFO tells the policy as well: an assertion does not outweigh what can be seen.
        if policy != "noeviction" and not (forbidden and policy is None):
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

    async def _info(self, *section: str) -> dict[str, str]:
        [answer] = await self._call(["INFO", *section])
        lines = self._checked(answer).decode(errors="replace").splitlines()
        return dict(line.split(":", 1) for line in lines if ":" in line)

    async def close(self) -> None:
        try:
            await self._pool.disconnect()
        except (exceptions.RedisError, OSError):
            return

    # ---------------------------------------------------------------- segments

    async def put(self, name: SegmentName, data: Buffer) -> None:
        [answer] = await self._call(["SET", name.key, data, "NX"], writes=name.key)
        if self._checked(answer) is None:
            raise SegmentExists(self._say(f"{name.key} exists"), name=name.key)

    async def get(self, reads: Sequence[Read]) -> list[Buffer | VswapError]:
        results: list[Buffer | VswapError] = []
        for start in range(0, len(reads), _PIPELINE_READS):
            some = reads[start : start + _PIPELINE_READS]
            commands = [
                ["GETRANGE", read.name.key, read.offset, read.offset + read.length - 1]
                for read in some
            ]
            answers: Sequence[Any]
            try:
                answers = await self._call(*commands)
            except TierUnavailable as error:
                answers = [error] * len(some)
            results += map(self._range, some, answers)
        return results

    def _range(self, read: Read, answer: Any) -> Buffer | VswapError:
        if isinstance(answer, VswapError):
            return answer
        if isinstance(answer, Exception):
            return TierUnavailable(self._say(answer))
        if len(answer) != read.length:
            return PageLost(self._say(f"{read.name.key} is missing or too short"))
        found: bytes = answer
        return found

    async def delete(self, names: Sequence[SegmentName]) -> None:
        if names:
            keys = [name.key for name in names]
            [answer] = await self._call(["UNLINK", *keys], writes="delete")
            self._checked(answer)

    async def list(self, prefix: str) -> AsyncIterator[Listed]:
        cursor, seen = b"0", set[str]()
        while True:
            [answer] = await self._call(
                ["SCAN", cursor, "MATCH", f"{prefix}*", "COUNT", _SCAN_COUNT]
            )
            cursor, found = self._checked(answer)
            # A key may come twice while the server's table grows or shrinks.
            keys = {key.decode(errors="replace") for key in found} - seen
            ours = [key for key in keys if SegmentName.parse(key)]
            seen.update(ours)
            lengths = await self._call(*(["STRLEN", key] for key in ours)) if ours else []
            for key, length in zip(ours, lengths, strict=True):
                if isinstance(length, exceptions.ResponseError) and "WRONGTYPE" in str(length):
                    continue
                if self._checked(length):
                    yield Listed(key, length)
            if cursor == b"0":
                return

    async def usage(self) -> Usage:
        info = await self._info()
        return Usage(int(info["used_memory"]), int(info.get("maxmemory") or 0) or None)

    async def life(self) -> str:
        return (await self._info("server"))["run_id"]

    # ---------------------------------------------------------------- the wire

    async def _call(self, *commands: Sequence[Any], writes: str = "") -> Sequence[Any]:
        """Sends commands and reads their answers, in one round trip.

        An answer that is an error stands in the result (see `_checked`). Raises TierUnavailable,
        or OutcomeUnknown where a write (named by ``writes``) may have reached the server.
        """
        sent = False
        try:
            async with asyncio.timeout(self._spec.timeout_s):
                connection = await self._pool.get_connection()
                try:
                    packed = connection.pack_commands(commands)
                    sent = True
                    await connection.send_packed_command(packed, check_health=False)
                    return [await _answer(connection) for _ in commands]
                finally:
                    await self._pool.release(connection)
        except (exceptions.RedisError, OSError, TimeoutError) as error:
            reason = str(error) or f"no answer within {self._spec.timeout_s:g} s"
            if writes and sent and not isinstance(error, _ANSWERS):
                raise OutcomeUnknown(self._say(f"{writes}: {reason}")) from error
            raise TierUnavailable(self._say(reason)) from error

    def _checked(self, answer: Any) -> Any:
        """The answer. Raises TierUnavailable where the server said no, so nothing happened."""
        if not isinstance(answer, exceptions.ResponseError):
            return answer
        text = str(answer)
        if isinstance(answer, exceptions.OutOfMemoryError):
            text = "the server is out of memory"
        raise TierUnavailable(self._say(text)) from answer


async def _answer(connection: Any) -> Any:
    try:
        return await connection.read_response(disable_decoding=True)
    except exceptions.ResponseError as error:
        return error


def _make_pool(spec: TierSpec) -> Any:
    parts = urlsplit(spec.url)
    # redis-py lets options of the URL win over ours, and ignores a database that is no number.
    allowed = {"db"} | (_TLS_OPTIONS if spec.scheme == "rediss" else set())
    unknown = sorted(set(parse_qs(parts.query, keep_blank_values=True)) - allowed)
    if unknown:
        raise BadConfig(f"tier {spec.name}: unknown option {unknown[0]!r} in url", key="url")
    local = spec.scheme == "redis+unix"
    if not local and not re.fullmatch(r"/?\d*", parts.path):
        raise BadConfig(
            f"tier {spec.name}: {spec.safe_url}: the path is the number of a database "
            "(and a / in a password is %2F)",
            key="url",
        )
    try:
        url = spec.resolved_url()
        return aioredis.BlockingConnectionPool.from_url(
            "unix" + url.removeprefix("redis+unix") if local else url,
            max_connections=_CONNECTIONS,
            timeout=spec.timeout_s,
            socket_connect_timeout=spec.timeout_s,
            # One timeout over the whole call instead; a timer per answer costs more than to parse.
            socket_timeout=None,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
        )
    except ValueError as error:
        # Its text may hold a part of a password that was not percent-encoded.
        raise BadConfig(f"tier {spec.name}: {spec.safe_url} is no Redis URL", key="url") from error
