"""Servers that are unfit, absent or die: one clear error each, and no secret in it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest

from vswap.cli.embedded import EmbeddedRedis, free_port
from vswap.tiers.backend import Read, SegmentName
from vswap.tiers.factory import make_backend
from vswap.tiers.spec import TierSpec
from vswap.wire.errors import (
    BackendRefused,
    BadConfig,
    OutcomeUnknown,
    TierUnavailable,
    VswapError,
)


def spec(url: str, **more: object) -> TierSpec:
    return TierSpec.model_validate({"name": "t", "url": url, "timeout_s": 2, **more})


async def refused(tier: TierSpec, kind: type[VswapError] = BackendRefused) -> str:
    backend = make_backend(tier)
    with pytest.raises(kind) as error:
        await backend.open()
    await backend.close()
    return error.value.message


async def test_a_redis_that_evicts() -> None:
    with EmbeddedRedis(policy="allkeys-lru") as server:
        assert "noeviction" in await refused(spec(server.url))
        # Saying that it does not evict does not help where we can see that it does.
        assert "noeviction" in await refused(spec(server.url, assert_noeviction=True))


async def test_a_redis_without_limit_needs_a_capacity() -> None:
    with EmbeddedRedis(maxmemory_bytes=0) as server:
        assert "capacity" in await refused(spec(server.url))
        fit = make_backend(spec(server.url, capacity_bytes=1 << 20))
        await fit.open()
        await fit.close()


async def test_a_redis_that_forbids_config(tmp_path: Path) -> None:
    acl = tmp_path / "users.acl"
    acl.write_text("user default on nopass ~* &* +@all -config\n")
    with EmbeddedRedis(extra=("--aclfile", str(acl))) as server:
        assert "assert_noeviction" in await refused(spec(server.url))
        asserted = make_backend(spec(server.url, assert_noeviction=True))
        await asserted.open()
        await asserted.close()


async def test_wrong_password_and_none_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    with EmbeddedRedis(extra=("--requirepass", "right-secret")) as server:
        assert "password" in await refused(spec(server.url))
        wrong = server.url.replace("://", "://:wrong-secret@")
        message = await refused(spec(wrong))
        assert "wrong-secret" not in message
        assert "***" in message
        monkeypatch.setenv("TIER_PASSWORD", "right-secret")
        fit = make_backend(spec(server.url, password_env="TIER_PASSWORD"))
        await fit.open()
        await fit.close()
        monkeypatch.delenv("TIER_PASSWORD")
        with pytest.raises(BadConfig, match="TIER_PASSWORD"):
            make_backend(spec(server.url, password_env="TIER_PASSWORD"))


async def test_a_replica() -> None:
    with (
        EmbeddedRedis() as server,
        EmbeddedRedis(extra=("--replicaof", "127.0.0.1", str(server.port))) as replica,
    ):
        assert "replica" in await refused(spec(replica.url))


@pytest.mark.parametrize("url", ["redis://127.0.0.1:{port}", "redis+unix:///nowhere/redis.sock",
                                 "rediss://127.0.0.1:{port}"])  # fmt: skip
async def test_no_server(url: str) -> None:
    await refused(spec(url.format(port=free_port()), capacity_bytes=1), TierUnavailable)


async def test_no_s3_server() -> None:
    url = f"s3://b?endpoint=http://127.0.0.1:{free_port()}&region=us-east-1&allow_http=true"
    await refused(spec(url, capacity_bytes=1, timeout_s=1), TierUnavailable)


async def test_no_bucket(s3_server: str, spec_for: Callable[[str], TierSpec]) -> None:
    good = spec_for("s3")
    await refused(good.model_copy(update={"url": good.url.replace("bucket-", "none-")}))


async def test_a_directory_that_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = await refused(spec(f"file://{tmp_path}/file/below", capacity_bytes=1 << 20))
    assert "not writable" in message


async def test_a_relative_directory_and_an_unknown_option() -> None:
    with pytest.raises(BadConfig):
        make_backend(spec("file://relative/dir"))
    with pytest.raises(BadConfig, match="endpont"):
        make_backend(spec("s3://b?endpont=http://x"))
    with pytest.raises(BadConfig):
        make_backend(spec("ram://"))


async def test_a_full_redis_says_so_and_keeps_what_it_has() -> None:
    with EmbeddedRedis(maxmemory_bytes=8 << 20) as server:
        backend = make_backend(spec(server.url))
        await backend.open()
        stored: list[SegmentName] = []
        cluster, shard = uuid4(), uuid4()
        with pytest.raises(TierUnavailable, match="out of memory"):
            for serial in range(100):
                name = SegmentName(cluster, shard, serial)
                await backend.put(name, bytes(256 * 1024 - 64))
                stored.append(name)
        assert len(stored) > 10
        results = await backend.get([Read(name, 0, 10) for name in stored])
        assert all(not isinstance(result, VswapError) for result in results)
        await backend.close()


async def test_a_server_killed_midway_is_an_error_and_its_return_is_noticed(
    tmp_path: Path,
) -> None:
    server = EmbeddedRedis(directory=tmp_path, port=free_port()).start()
    backend = make_backend(spec(server.url))
    await backend.open()
    name = SegmentName(uuid4(), uuid4(), 1)
    await backend.put(name, b"x" * 100)
    server.kill()
    with pytest.raises((TierUnavailable, OutcomeUnknown)):
        await backend.put(SegmentName(name.cluster, name.shard, 2), b"x")
    with pytest.raises(TierUnavailable):
        await backend.put(SegmentName(name.cluster, name.shard, 3), b"x")
    [result] = await backend.get([Read(name, 0, 1)])
    assert isinstance(result, TierUnavailable)
    server.start()
    try:
        await backend.put(SegmentName(name.cluster, name.shard, 4), b"x")
    finally:
        await backend.close()
        server.stop()


async def test_a_stopped_server_costs_the_timeout_and_no_more() -> None:
    with EmbeddedRedis() as server:
        backend = make_backend(spec(server.url, timeout_s=0.3))
        await backend.open()
        assert server.process is not None
        server.process.send_signal(signal.SIGSTOP)
        name = SegmentName(uuid4(), uuid4(), 1)
        async with asyncio.timeout(5):
            with pytest.raises(OutcomeUnknown):
                await backend.put(name, b"x")
            [result] = await backend.get([Read(name, 0, 1)])
            assert isinstance(result, TierUnavailable)
        await backend.close()
