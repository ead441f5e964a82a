"""Servers that are unfit, absent or die: one clear error each, and no secret in it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest
import redis.asyncio as aioredis

from vswap.cli.embedded import EmbeddedRedis, free_port
from vswap.tiers.backend import Read, SegmentName, prefix
from vswap.tiers.factory import make_backend
from vswap.tiers.spec import TierSpec
from vswap.wire.errors import (
    BackendRefused,
    BadConfig,
    OutcomeUnknown,
    PageLost,
    Refused,
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


async def test_a_redis_that_begins_to_evict() -> None:
    with EmbeddedRedis() as server:
        backend = make_backend(spec(server.url))
        await backend.open()
        await backend.check()
        async with aioredis.from_url(server.url) as operator:
            await operator.config_set("maxmemory-policy", "allkeys-lru")
            with pytest.raises(BackendRefused, match="noeviction"):
                await backend.check()
            await operator.config_set("maxmemory-policy", "noeviction")
        await backend.check()
        await backend.close()


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


async def test_a_cluster() -> None:
    with EmbeddedRedis(extra=("--cluster-enabled", "yes")) as server:
        assert "Cluster" in await refused(spec(server.url))


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("redis://h:port", "no Redis URL"),
        ("redis://:top/secret@h", "%2F"),
        ("redis://h/tree", "number"),
        # redis-py would let these win over what we rely on.
        ("redis://h?decode_responses=true", "decode_responses"),
        ("redis://h?socket_timeout=0", "socket_timeout"),
        ("redis://h?ssl_ca_certs=/ca", "ssl_ca_certs"),
        ("redis://h?colour=", "colour"),
        ("s3://b?endpont=http://x", "endpont"),
        ("s3://b?endpoint=http://x", "allow_http"),
        ("az://container", "Account"),
        ("file://relative/dir", "absolute"),
        ("ram://", "node"),
    ],
)
def test_a_url_that_makes_no_sense(url: str, word: str) -> None:
    with pytest.raises(BadConfig, match=word) as error:
        make_backend(spec(url))
    assert "secret" not in error.value.message
    assert "\n" not in error.value.message


async def test_a_certificate_of_a_stranger(spec_for: Callable[[str], TierSpec]) -> None:
    good = spec_for("rediss")
    message = await refused(spec(good.url.partition("?")[0]), TierUnavailable)
    assert "certificate" in message.lower()


@pytest.mark.parametrize("url", ["redis://127.0.0.1:{port}", "redis+unix:///nowhere/redis.sock",
                                 "rediss://127.0.0.1:{port}"])  # fmt: skip
async def test_no_server(url: str) -> None:
    await refused(spec(url.format(port=free_port()), capacity_bytes=1), TierUnavailable)


@pytest.mark.parametrize("bucket", ["b", "range/416"])
async def test_no_s3_server(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is unavailable; its pages are not lost, whatever numbers and words its address holds."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    endpoint = f"http://127.0.0.1:{free_port()}"
    url = f"s3://{bucket}?endpoint={endpoint}&region=us-east-1&allow_http=true"
    tier = spec(url, capacity_bytes=1, timeout_s=1)
    message = await refused(tier, TierUnavailable)
    assert "\n" not in message
    assert "Debug" not in message
    assert "Connection refused" in message
    backend = make_backend(tier)
    name = SegmentName(uuid4(), uuid4(), 416)
    [result] = await backend.get([Read(name, 0, 1)])
    assert isinstance(result, TierUnavailable)
    with pytest.raises((TierUnavailable, OutcomeUnknown)):
        await backend.put(name, b"x")
    await backend.close()


async def test_an_object_store_that_hangs_costs_the_timeout_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        url = f"s3://b?endpoint={endpoint}&region=us-east-1&allow_http=true"
        backend = make_backend(spec(url, capacity_bytes=1, timeout_s=0.3))
        name = SegmentName(uuid4(), uuid4(), 1)
        async with asyncio.timeout(5):
            with pytest.raises(OutcomeUnknown, match="no answer within"):
                await backend.put(name, b"x")
            with pytest.raises(OutcomeUnknown, match="no answer within"):
                await backend.delete([name])
            [result] = await backend.get([Read(name, 0, 1)])
            assert isinstance(result, TierUnavailable)
            assert "no answer within" in result.message
        await backend.close()


async def test_a_put_that_finds_its_own_bytes_was_its_own(
    spec_for: Callable[[str], TierSpec],
) -> None:
    """The reply to the first attempt was lost and the library tried again."""
    backend = make_backend(spec_for("s3"))
    name = SegmentName(uuid4(), uuid4(), 1)
    await backend.put(name, b"mine")
    await backend.put(name, b"mine")
    with pytest.raises(VswapError, match="exists"):
        await backend.put(name, b"mine and more")
    with pytest.raises(VswapError, match="exists"):
        await backend.put(name, b"min")
    await backend.close()


async def test_no_bucket(s3_server: str, spec_for: Callable[[str], TierSpec]) -> None:
    good = spec_for("s3")
    await refused(good.model_copy(update={"url": good.url.replace("bucket-", "none-")}))


async def test_a_directory_that_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = await refused(spec(f"file://{tmp_path}/file/below", capacity_bytes=1 << 20))
    assert "not writable" in message


async def test_keys_of_others_are_not_ours(
    redis_server: EmbeddedRedis, tmp_path: Path, spec_for: Callable[[str], TierSpec]
) -> None:
    name = SegmentName(uuid4(), uuid4(), 0xAB)
    foreign = [
        f"vswap/{name.cluster}/notes", f"vswap/{name.cluster}/{name.shard}/zz",
        f"{name.key}.part", f"{name.key}/below", f"other/{name.key}",
    ]  # fmt: skip
    on_redis, on_disk = make_backend(spec_for("redis")), make_backend(spec_for("file"))
    for backend in (on_redis, on_disk):
        await backend.open()
        await backend.put(name, b"ours")
    with socket.socket(socket.AF_UNIX) as wire:
        wire.connect(str(redis_server.unix_path))
        for key in foreign:
            wire.sendall(f"SET {key} theirs\r\n".encode())
            assert wire.recv(64) == b"+OK\r\n"
        # A name of ours, yet no segment: that must not spoil the listing.
        wire.sendall(f"LPUSH {name.key[:-1]}c theirs\r\n".encode())
        assert wire.recv(64) == b":1\r\n"
    for key in foreign:
        path = tmp_path / "objects" / key
        if name.key not in str(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("theirs")
    for backend in (on_redis, on_disk):
        listed = [item async for item in backend.list(prefix(name.cluster))]
        assert [(item.key, item.bytes) for item in listed] == [(name.key, 4)]
        await backend.close()


async def test_what_a_killed_writer_left_is_removed_once_it_is_old(
    tmp_path: Path, spec_for: Callable[[str], TierSpec]
) -> None:
    name = SegmentName(uuid4(), uuid4(), 1)
    backend = make_backend(spec_for("file"))
    await backend.open()
    await backend.put(name, b"x" * 100)
    segment = tmp_path / "objects" / name.key
    old, new = (segment.with_name(f"{segment.name}-{age}.part") for age in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    yesterday = time.time() - 86400
    os.utime(old, (yesterday, yesterday))
    os.utime(segment, (yesterday, yesterday))
    assert [item.key async for item in backend.list(prefix())] == [name.key]
    await backend.close()
    backend = make_backend(spec_for("file"))
    await backend.open()
    await backend.close()
    assert (old.exists(), new.exists(), segment.exists()) == (False, True, True)


async def test_what_a_killed_writer_left_goes_with_its_segment(
    tmp_path: Path, spec_for: Callable[[str], TierSpec]
) -> None:
    shard = uuid4()
    killed, other = (SegmentName(uuid4(), shard, serial) for serial in (1, 2))
    backend = make_backend(spec_for("file"))
    await backend.open()
    left = [tmp_path / "objects" / f"{name.key}-1234abcd.part" for name in (killed, other)]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    await backend.delete([killed])
    await backend.close()
    assert [path.exists() for path in left] == [False, True]


async def test_a_directory_that_vanishes_or_is_closed(
    tmp_path: Path, spec_for: Callable[[str], TierSpec]
) -> None:
    backend = make_backend(spec_for("file"))
    await backend.open()
    name = SegmentName(uuid4(), uuid4(), 1)
    await backend.put(name, b"x")
    shutil.rmtree(tmp_path / "objects")
    [result] = await backend.get([Read(name, 0, 1)])
    assert isinstance(result, PageLost)
    assert [item async for item in backend.list(prefix())] == []
    (tmp_path / "objects").write_text("in the way")
    with pytest.raises(TierUnavailable):
        await backend.put(name, b"x")
    await backend.close()
    with pytest.raises(TierUnavailable, match="closed"):
        await backend.put(name, b"x")
    [result] = await backend.get([Read(name, 0, 1)])
    assert isinstance(result, TierUnavailable)


async def test_a_disk_that_hangs_costs_the_timeout_and_no_more(tmp_path: Path) -> None:
    """A pipe in the place of a segment: to open it waits for a writer that never comes."""
    backend = make_backend(spec(f"file://{tmp_path}", capacity_bytes=1 << 20, timeout_s=0.3))
    await backend.open()
    name = SegmentName(uuid4(), uuid4(), 1)
    pipe = tmp_path / name.key
    pipe.parent.mkdir(parents=True)
    os.mkfifo(pipe)
    try:
        async with asyncio.timeout(5):
            results = await asyncio.gather(*(backend.get([Read(name, 0, 1)]) for _ in range(4)))
            assert all(isinstance(result, TierUnavailable) for [result] in results)
            # All threads hang: this one never began, so nothing happened.
            with pytest.raises(TierUnavailable, match="no answer within"):
                await backend.put(SegmentName(name.cluster, name.shard, 2), b"x")
    finally:
        os.close(os.open(pipe, os.O_RDWR))
        await backend.close()


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


# ---------------------------------------------------------------- after the refusal


async def test_a_password_that_changes_under_us_is_unavailable_not_unknown() -> None:
    with EmbeddedRedis(extra=("--requirepass", "first")) as server:
        backend = make_backend(spec(server.url.replace("://", "://:wrong@")))
        name = SegmentName(uuid4(), uuid4(), 1)
        with pytest.raises(TierUnavailable):
            await backend.put(name, b"x")
        [result] = await backend.get([Read(name, 0, 1)])
        assert isinstance(result, TierUnavailable)
        await backend.close()


async def test_a_cancelled_call_gives_its_connection_back() -> None:
    with EmbeddedRedis() as server:
        backend = make_backend(spec(server.url))
        await backend.open()
        assert server.process is not None
        cluster, shard = uuid4(), uuid4()
        server.process.send_signal(signal.SIGSTOP)
        calls = [
            asyncio.create_task(backend.put(SegmentName(cluster, shard, serial), bytes(100_000)))
            for serial in range(20)
        ]
        await asyncio.sleep(0.1)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        server.process.send_signal(signal.SIGCONT)
        names = [SegmentName(cluster, shard, serial) for serial in range(100, 120)]
        async with asyncio.timeout(5):
            await asyncio.gather(*(backend.put(name, name.key.encode()) for name in names))
            results = await backend.get([Read(name, 0, len(name.key)) for name in names])
        # A reply to a cancelled call must not be taken for that of a later one.
        assert [bytes(r) if not isinstance(r, VswapError) else r for r in results] == [
            name.key.encode() for name in names
        ]
        await backend.close()


def test_an_embedded_server_dies_with_its_parent(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from vswap.cli.embedded import EmbeddedRedis\n"
        "server = EmbeddedRedis(directory=Path(sys.argv[1])).start()\n"
        "print(server.pid, server.version, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL
    pid, version = done.stdout.split()
    assert version[0].isdigit()
    deadline = time.monotonic() + 5
    while _alive(int(pid)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _alive(int(pid))


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_no_server_to_embed_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Refused, match="pip install"):
        EmbeddedRedis().start()


async def test_another_life_of_a_redis_has_another_name() -> None:
    with EmbeddedRedis(port=free_port()) as server:
        backend = make_backend(spec(server.url))
        await backend.open()
        life = await backend.life()
        assert life
        assert await backend.life() == life
        server.kill()
        with pytest.raises(TierUnavailable):
            await backend.life()
        server.start()
        assert await backend.life() not in ("", life)
        await backend.close()
