"""The coordinator's services over real gRPC, with scripted nodes and real backends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from links import LinkNode

from vswap.cli.embedded import EmbeddedRedis
from vswap.coordinator.config import CoordinatorConfig
from vswap.coordinator.daemon import Coordinator
from vswap.coordinator.events import AddTier
from vswap.tiers.backend import SegmentName
from vswap.tiers.files import FileBackend
from vswap.tiers.spec import TierSpec
from vswap.v1 import common_pb2, coordinator_pb2, coordinator_pb2_grpc
from vswap.wire.errors import (
    AlreadyExists,
    BackendRefused,
    BadConfig,
    InvalidRequest,
    OutOfTiers,
    Refused,
    StaleIncarnation,
    StateInvalid,
    TierUnavailable,
    UnknownJob,
    UnknownNode,
    UnknownTier,
)
from vswap.wire.rpc import from_rpc_error

MIB = 2**20


class Served:
    """A coordinator in this process and an operator's stub; errors come as vswap errors."""

    def __init__(self, directory: Path, **config: Any) -> None:
        settings = {"listen": "127.0.0.1:0", "lease_s": 2.0, **config}
        self.directory = directory
        self.coordinator = Coordinator(CoordinatorConfig(**settings), directory / "state.jsonl")
        self.address = ""

    async def __aenter__(self) -> Served:
        self.address = await self.coordinator.start()
        self.channel = grpc.aio.insecure_channel(self.address)
        generated: Any = coordinator_pb2_grpc
        self.stub = generated.OperatorStub(self.channel)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.channel.close()
        await self.coordinator.close()

    async def __call__(self, method: str, **fields: Any) -> Any:
        request = getattr(coordinator_pb2, f"{method}Request")(**fields)
        try:
            return await getattr(self.stub, method)(request)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, self.address) from error

    def spec(self, name: str, capacity: int = 100 * MIB, **more: Any) -> common_pb2.TierSpec:
        url = f"file://{self.directory}/{name}"
        fields = {"name": name, "url": url, "capacity_bytes": capacity, "rank": 10, **more}
        return common_pb2.TierSpec(**fields)

    async def add(self, name: str, **more: Any) -> None:
        await self("AddTier", spec=self.spec(name, **more))

    async def drain(self, tier: str, *, dry_run: bool = False) -> coordinator_pb2.Job:
        spec = coordinator_pb2.JobSpec(kind="MOVE_KIND_DRAIN", tier=tier)
        job: coordinator_pb2.Job = await self("StartJob", spec=spec, dry_run=dry_run)
        return job

    async def watch(self, job_id: str) -> list[coordinator_pb2.Job]:
        call = self.stub.WatchJob(coordinator_pb2.WatchJobRequest(id=job_id))
        try:
            async with asyncio.timeout(20):
                return [job async for job in call]
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, self.address) from error

    async def put(self, tier: str, cluster: str, shard: str, serials: range) -> None:
        """Segments on the backend itself."""
        url = f"file://{self.directory}/{tier}"
        backend = FileBackend(TierSpec(name=tier, url=url, capacity_bytes=10**6))
        await backend.open()
        for serial in serials:
            await backend.put(SegmentName(UUID(cluster), UUID(shard), serial), b"x" * 1000)
        await backend.close()

    def files(self, tier: str, shard: str) -> int:
        return sum(shard in str(path) for path in (self.directory / tier).rglob("*/" + "?" * 16))


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with Served(tmp_path) as served:
        yield served


async def test_health_and_reflection(served: Served) -> None:
    health: Any = health_pb2_grpc
    for name in ("", "vswap.v1.NodeLink", "vswap.v1.Operator"):
        reply = await health.HealthStub(served.channel).Check(
            health_pb2.HealthCheckRequest(service=name)
        )
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    generated: Any = reflection_pb2_grpc
    call = generated.ServerReflectionStub(served.channel).ServerReflectionInfo(
        iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    )
    [reply] = [reply async for reply in call]
    names = {service.name for service in reply.list_services_response.service}
    assert {"vswap.v1.NodeLink", "vswap.v1.Operator"} <= names


async def test_a_node_comes_and_goes(served: Served) -> None:
    await served.add("a")
    async with LinkNode(served.address) as node:
        await node.until(lambda: "a" in node.tiers)
        await node.store("a", 10 * MIB)
        status = await served("GetCluster")
        [info] = status.nodes
        assert (info.name, info.state, info.shard_uuid) == ("n1", "connected", node.shard)
        assert status.cluster_uuid == node.cluster
        assert status.tiers[0].granted_bytes >= 10 * MIB
    async with asyncio.timeout(5):
        while (await served("GetCluster")).nodes[0].state != "absent":
            await asyncio.sleep(0.02)


async def test_refusals_reach_the_node_as_what_they_are(served: Served) -> None:
    async with LinkNode(served.address) as node:
        with pytest.raises(StaleIncarnation):
            await LinkNode(served.address, shard=node.shard).connect()
        with pytest.raises(AlreadyExists, match="n1"):
            await LinkNode(served.address).connect()
        stranger = LinkNode(served.address, "n2")
        stranger.cluster = str(uuid4())
        with pytest.raises(Refused, match="belongs to cluster"):
            await stranger.connect()
        newer = LinkNode(served.address, shard=node.shard)
        newer.incarnation = 2
        async with newer:
            await node.closed()
            assert isinstance(node.error, StaleIncarnation)


async def test_nonsense_on_the_stream_ends_the_stream_only(served: Served) -> None:
    generated: Any = coordinator_pb2_grpc
    call = generated.NodeLinkStub(served.channel).Connect()
    await call.write(coordinator_pb2.NodeMessage(goodbye=coordinator_pb2.Goodbye()))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert isinstance(from_rpc_error(caught.value, ""), InvalidRequest)
    async with LinkNode(served.address) as node:
        await node.until(lambda: node.generation == 1)
        # A client of grpc.aio that is still writing when the stream ends may miss the reason.
        await asyncio.sleep(0.2)
        node.say(generation_ack=coordinator_pb2.GenerationAck(generation=77))
        await node.closed()
        assert isinstance(node.error, InvalidRequest)
    await served("GetCluster")


async def test_bad_tiers_are_refused_one_by_one(served: Served) -> None:
    cases: list[tuple[dict[str, Any], type[Exception]]] = [
        ({"url": "redis://127.0.0.1:1"}, TierUnavailable),
        ({"url": "file:///proc/version/x"}, BackendRefused),
        ({"url": "ram://"}, BadConfig),
        ({"url": "gopher://x"}, BadConfig),
        ({"codec": "zip"}, BadConfig),
        ({"high": 0.2, "low": 0.5}, BadConfig),
        ({"name": "No Name"}, BadConfig),
        ({"capacity_bytes": 0}, BackendRefused),
        ({"url": "redis://127.0.0.1:1", "password_env": "NOT_SET_ANYWHERE"}, BadConfig),
    ]
    for fields, kind in cases:
        with pytest.raises(kind) as caught:
            await served("AddTier", spec=served.spec(**{"name": "x", **fields}))
        assert "\n" not in str(caught.value)
    assert not (await served("GetCluster")).tiers
    with pytest.raises(UnknownTier):
        await served("SetTier", name="x", rank=1)
    with pytest.raises(UnknownTier):
        await served("RemoveTier", name="x")
    with pytest.raises(UnknownTier):
        await served("ActivateTier", name="x")
    with pytest.raises(UnknownNode):
        await served("ForgetNode", node="x")
    with pytest.raises(UnknownJob):
        await served("CancelJob", id="x")
    with pytest.raises(UnknownJob):
        await served.watch("x")
    with pytest.raises(InvalidRequest):
        await served("StartJob", spec=coordinator_pb2.JobSpec(tier="x"))


async def test_a_redis_server_names_its_own_capacity(served: Served, tmp_path: Path) -> None:
    directory = tmp_path / "redis"
    directory.mkdir()
    async with EmbeddedRedis(maxmemory_bytes=64 * 2**20, directory=directory) as redis:
        url = redis.url.replace("redis://", "redis://default:@", 1)
        spec = served.spec("r", capacity=0, url=url)
        tier = await served("AddTier", spec=spec)
        assert 48 * 2**20 < tier.spec.capacity_bytes < 64 * 2**20


async def test_secrets_go_to_nodes_only(served: Served, tmp_path: Path) -> None:
    url = f"file://user:hunter2@{tmp_path}/a"
    spec = TierSpec(name="a", url=url, capacity_bytes=MIB)
    served.coordinator.runner.apply(AddTier(spec))
    status = await served("GetCluster")
    assert "hunter2" not in str(status)
    async with LinkNode(served.address) as node:
        await node.until(lambda: "a" in node.tiers)
        assert node.tiers["a"].spec.url == url


async def test_a_drain_ends_only_when_the_backend_itself_is_empty(served: Served) -> None:
    await served.add("a")
    await served.add("b", rank=20)
    async with LinkNode(served.address) as node:
        await node.store("a", 30 * MIB)
        await served.put("a", node.cluster, node.shard, range(3))
        await served.put("a", str(uuid4()), str(uuid4()), range(2))
        planned = await served.drain("a", dry_run=True)
        assert planned.state == coordinator_pb2.JOB_STATE_PLANNED
        assert (planned.bytes_total, planned.room_bytes["b"]) == (30 * MIB, 92 * MIB)
        assert not (await served("ListJobs", all=True)).jobs
        job = await served.drain("a")
        watching = asyncio.create_task(served.watch(job.id))
        await node.until(lambda: job.id in node.directives)
        assert node.tiers["a"].state == common_pb2.TIER_STATE_DRAINING
        node.move(job.id, 30 * MIB, "b")
        async with asyncio.timeout(10):
            while "3 segments of n1" not in (await served("ListJobs")).jobs[0].reason:
                await asyncio.sleep(0.02)
        backend = FileBackend(
            TierSpec(name="a", url=f"file://{served.directory}/a", capacity_bytes=MIB)
        )
        await backend.open()
        ours = UUID(node.cluster), UUID(node.shard)
        await backend.delete([SegmentName(*ours, serial) for serial in range(3)])
        await backend.close()
        seen = await watching
        assert seen[-1].state == coordinator_pb2.JOB_STATE_DONE
        assert seen[-1].bytes_moved == 30 * MIB
        assert coordinator_pb2.JOB_STATE_BLOCKED in {shown.state for shown in seen}
        status = await served("GetCluster")
        assert status.tiers[0].tier.state == common_pb2.TIER_STATE_DRAINED
        await node.until(lambda: job.id not in node.directives)
        await served("RemoveTier", name="a")
        assert [tier.tier.spec.name for tier in (await served("GetCluster")).tiers] == ["b"]


async def test_a_drain_that_cannot_fit_is_refused_with_figures(served: Served) -> None:
    await served.add("a")
    await served.add("b", rank=20, capacity=20 * MIB)
    async with LinkNode(served.address) as node:
        await node.store("a", 30 * MIB)
        for dry_run in (True, False):
            with pytest.raises(OutOfTiers) as caught:
                await served.drain("a", dry_run=dry_run)
            assert caught.value.fields["need"] == 30 * MIB
            assert caught.value.fields["room"] == {"b": 12 * MIB}
        assert (await served("GetCluster")).generation == node.generation


async def test_forgetting_a_node_deletes_its_segments_and_no_others(served: Served) -> None:
    await served.add("a")
    other = str(uuid4())
    async with LinkNode(served.address) as node:
        await node.store("a", 30 * MIB)
        with pytest.raises(Refused, match="is connected"):
            await served("ForgetNode", node="n1")
    await served.put("a", node.cluster, node.shard, range(300))
    await served.put("a", node.cluster, other, range(4))
    await served.put("a", other, node.shard, range(5))
    async with asyncio.timeout(5):
        while (await served("GetCluster")).nodes[0].state != "absent":
            await asyncio.sleep(0.02)
    reply = await served("ForgetNode", node="n1")
    assert (reply.segments_deleted, reply.bytes_deleted) == (300, 300_000)
    assert not reply.pending_tiers
    assert served.files("a", f"{node.cluster}/{node.shard}") == 0
    assert served.files("a", f"{node.cluster}/{other}") == 4
    assert served.files("a", f"{other}/{node.shard}") == 5
    status = await served("GetCluster")
    assert not status.nodes
    assert status.tiers[0].granted_bytes == 0
    with pytest.raises(Refused, match="--fresh"):
        await node.connect()


async def test_strangers_are_listed_when_a_tier_is_added(served: Served) -> None:
    stranger = str(uuid4())
    await served.put("a", stranger, stranger, range(2))
    await served.add("a")
    async with asyncio.timeout(5):
        while not (found := (await served("GetCluster")).strangers):
            await asyncio.sleep(0.02)
    assert (found[0].tier, found[0].segments, found[0].bytes) == ("a", 2, 2000)
    assert found[0].prefix == f"vswap/{stranger}/{stranger}/"


async def test_a_change_that_cannot_be_written_did_not_happen(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    await served.add("a")
    runner = served.coordinator.runner
    async with LinkNode(served.address) as node:
        await node.until(lambda: "a" in node.tiers)

        def full(bodies: object) -> None:
            raise StateInvalid("cannot write state.jsonl: no space left")

        with monkeypatch.context() as patch:
            patch.setattr(runner._store, "write", full)
            with pytest.raises(StateInvalid, match="no space left"):
                await served("SetTier", name="a", rank=77)
        await node.closed()
        assert (await served("GetCluster")).tiers[0].tier.spec.rank == 10
        await node.connect()
        assert (await served("SetTier", name="a", rank=78)).spec.rank == 78


async def test_a_configured_tier_joins_once_its_server_answers(tmp_path: Path) -> None:
    directory = tmp_path / "redis"
    directory.mkdir()
    socket = directory / "late.sock"
    spec = TierSpec(name="late", url=f"redis+unix://{socket}", capacity_bytes=MIB)
    good = TierSpec(name="good", url=f"file://{tmp_path}/good", capacity_bytes=MIB)
    async with Served(tmp_path, tiers=(spec, good)) as served:
        assert [t.tier.spec.name for t in (await served("GetCluster")).tiers] == ["good"]
        async with EmbeddedRedis(directory=directory, maxmemory_bytes=2**26) as redis:
            socket.symlink_to(Path(redis.unix_path))
            async with asyncio.timeout(10):
                while len((await served("GetCluster")).tiers) < 2:
                    await asyncio.sleep(0.1)
    async with Served(tmp_path, tiers=(good,)) as served:
        assert len((await served("GetCluster")).tiers) == 2


async def test_an_unfit_configured_tier_ends_the_start(tmp_path: Path) -> None:
    spec = TierSpec(name="bad", url="file:///proc/version/x", capacity_bytes=MIB)
    served = Served(tmp_path, tiers=(spec,))
    with pytest.raises(BackendRefused):
        await served.coordinator.start()
    await served.coordinator.close()
