"""The node's side of the control plane against a coordinator that follows a script."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import grpc
import pytest
from shards import objects, open_shard, pages, ram, slots

from vswap.node.control import Control
from vswap.node.departure import Departure
from vswap.node.seams import Seams
from vswap.node.shard import Shard
from vswap.node.spaces import Limits
from vswap.node.tier import TierState
from vswap.tiers.backend import Backend, prefix
from vswap.tiers.factory import make_backend
from vswap.tiers.spec import TierSpec
from vswap.tiers.wrappers.faulty import FaultPlan, Faulty
from vswap.v1 import common_pb2, coordinator_pb2_grpc
from vswap.v1 import coordinator_pb2 as pb
from vswap.wire.aio import served_stream
from vswap.wire.errors import (
    AlreadyExists,
    InvalidRequest,
    OutOfTiers,
    Refused,
    StaleIncarnation,
    TierUnavailable,
    VswapError,
)

MIB = 2**20
LEASE_S = 30.0


class Stream:
    """One connection of the node: what it said, and what is said to it."""

    def __init__(self, hello: pb.Hello) -> None:
        self.hello = hello
        self.said: list[pb.NodeMessage] = []
        self.came = asyncio.Event()
        self.to_node: asyncio.Queue[pb.CoordinatorMessage | None] = asyncio.Queue()

    def say(self, **message: Any) -> None:
        self.to_node.put_nowait(pb.CoordinatorMessage(**message))

    def end(self) -> None:
        self.to_node.put_nowait(None)

    async def hears(self, kind: str, which: Callable[[Any], bool] = lambda message: True) -> Any:
        """The first message of a kind that the node has sent or sends."""
        async with asyncio.timeout(10):
            while True:
                for message in self.said:
                    if message.HasField(kind) and which(getattr(message, kind)):
                        return getattr(message, kind)
                self.came.clear()
                await self.came.wait()


class Coordinator(coordinator_pb2_grpc.NodeLinkServicer):
    def __init__(self) -> None:
        self.cluster = str(uuid4())
        self.refuses: VswapError | None = None
        self.lease_s = LEASE_S
        self.streams: asyncio.Queue[Stream] = asyncio.Queue()
        self.attempts = 0

    @served_stream
    async def Connect(self, request_iterator: Any, context: Any) -> Any:  # noqa: N802
        self.attempts += 1
        requests = aiter(request_iterator)
        stream = Stream((await anext(requests)).hello)
        if self.refuses is not None:
            raise self.refuses
        welcome = pb.Welcome(cluster_uuid=self.cluster, lease_s=self.lease_s)
        yield pb.CoordinatorMessage(welcome=welcome)
        self.streams.put_nowait(stream)

        async def read() -> None:
            async for message in requests:
                stream.said.append(message)
                stream.came.set()

        reading = asyncio.create_task(read())
        try:
            while (message := await stream.to_node.get()) is not None:
                yield message
        finally:
            reading.cancel()

    async def stream(self) -> Stream:
        async with asyncio.timeout(10):
            return await self.streams.get()


@asynccontextmanager
async def listening(coordinator: Coordinator, port: int = 0) -> AsyncIterator[str]:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    coordinator_pb2_grpc.add_NodeLinkServicer_to_server(coordinator, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


class HalfSteps(random.Random):
    """No chance: every pause is as short as jitter makes it."""

    def uniform(self, a: float, b: float) -> float:
        return a


class Watched(Control):
    """Notes the states it tells."""

    def __init__(self, shard: Shard, coordinator: str) -> None:
        super().__init__(
            shard, name="n", address="here:1", coordinator=coordinator, rng=HalfSteps()
        )
        self.states: list[str] = []
        self.on_state = self.states.append


@asynccontextmanager
async def linked(shard: Shard, address: str) -> AsyncIterator[Watched]:
    control = Watched(shard, address)
    task = asyncio.create_task(control.run())
    try:
        yield control
        assert not task.done(), task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def tier(spec: TierSpec, state: TierState = TierState.ACTIVE) -> common_pb2.Tier:
    return common_pb2.Tier(spec=spec.to_proto(), state=common_pb2.TierState.Name(state.value))


def configuration(generation: int, *tiers: common_pb2.Tier) -> pb.Configuration:
    return pb.Configuration(generation=generation, tiers=tiers)


async def test_hello_welcome_configuration_grant_report(tmp_path: Path) -> None:
    coordinator = Coordinator()
    async with (
        open_shard(tmp_path / "s", ram()) as shard,
        listening(coordinator) as address,
        linked(shard, address) as control,
    ):
        stream = await coordinator.stream()
        assert (stream.hello.node, stream.hello.shard_uuid) == ("n", str(shard.uuid))
        assert (stream.hello.incarnation, stream.hello.generation) == (1, 0)
        assert (stream.hello.address, stream.hello.cluster_uuid) == ("here:1", "")
        assert [(u.tier, u.local) for u in stream.hello.tiers] == [("ram", True)]
        stream.say(configuration=configuration(4, tier(objects(tmp_path / "o"))))
        assert (await stream.hears("generation_ack")).generation == 4
        stream.say(grant=pb.Grant(tier="objects", total_bytes=64 * MIB))
        stream.say(grant=pb.Grant(tier="unknown", total_bytes=1))
        stream.say(configuration=configuration(5, tier(objects(tmp_path / "o"))))
        await stream.hears("generation_ack", lambda ack: ack.generation == 5)
        report = await stream.hears("report", lambda r: r.grants and r.grants[0].total_bytes)
        assert [(g.tier, g.total_bytes) for g in report.grants] == [("objects", 64 * MIB)]
        assert shard.cluster == UUID(coordinator.cluster)
        assert control.states == ["absent", "connected"]
        stream.end()
        again = await coordinator.stream()
        assert (again.hello.generation, again.hello.cluster_uuid) == (5, coordinator.cluster)
        assert [(g.tier, g.total_bytes) for g in again.hello.grants] == [("objects", 64 * MIB)]
        await again.hears("report")
        assert control.states == ["absent", "connected", "absent", "connected"]


async def test_reports_come_at_a_third_of_the_lease(tmp_path: Path) -> None:
    coordinator = Coordinator()
    coordinator.lease_s = 0.6
    async with (
        open_shard(tmp_path / "s", ram()) as shard,
        listening(coordinator) as address,
        linked(shard, address),
    ):
        stream = await coordinator.stream()
        await asyncio.sleep(1.3)
        assert 4 <= len(stream.said) <= 9


async def test_the_end_of_a_directive_is_reported_at_once(tmp_path: Path) -> None:
    coordinator = Coordinator()
    async with (
        open_shard(tmp_path / "s", ram(), objects(tmp_path / "o")) as shard,
        listening(coordinator) as address,
        linked(shard, address),
    ):
        space = shard.spaces.create("s")
        where = slots(*range(200))
        await shard.pager.store(space, where, pages(where, 1))
        stream = await coordinator.stream()
        stream.say(
            directive=pb.Directive(
                job_id="j", kind=pb.MOVE_KIND_MIGRATE, tier="ram", destination="objects"
            )
        )
        # Far sooner than a third of the lease.
        done = await stream.hears("report", lambda r: any(d.state == "done" for d in r.directives))
        assert done.directives[0].job_id == "j"
        assert done.directives[0].pages_moved > 100
        stream.say(stop_directive=pb.StopDirective(job_id="j"))
        while shard.directives.progress():
            await asyncio.sleep(0.01)
        assert (await shard.pager.load(space, where) == pages(where, 1)).all()


async def test_a_message_that_makes_no_sense_costs_only_itself(tmp_path: Path) -> None:
    coordinator = Coordinator()
    async with (
        open_shard(tmp_path / "s", ram()) as shard,
        listening(coordinator) as address,
        linked(shard, address),
    ):
        stream = await coordinator.stream()
        stream.say(directive=pb.Directive.FromString(b"\x0a\x01j\x10\x63"))
        stream.say()
        bad = common_pb2.Tier(spec=common_pb2.TierSpec(name="x", url="ftp://x"))
        stream.say(configuration=configuration(2, bad))
        await asyncio.sleep(0.1)
        stream.say(configuration=configuration(3, tier(objects(tmp_path / "o"))))
        await stream.hears("generation_ack", lambda ack: ack.generation == 3)
        assert not any(m.generation_ack.generation == 2 for m in stream.said)
        assert coordinator.attempts == 1


async def test_an_acknowledgement_means_that_earlier_writes_have_resolved(tmp_path: Path) -> None:
    slow: list[Faulty] = []

    def make(spec: TierSpec) -> Backend:
        slow.append(Faulty(make_backend(spec), FaultPlan()))
        return slow[-1]

    coordinator, spec = Coordinator(), objects(tmp_path / "o", rank=-1, codec="none")
    async with (
        open_shard(tmp_path / "s", ram(mib=1), seams=Seams(make_backend=make)) as shard,
        listening(coordinator) as address,
        linked(shard, address),
    ):
        space = shard.spaces.create("s")
        stream = await coordinator.stream()
        stream.say(configuration=configuration(1, tier(spec)))
        await stream.hears("generation_ack")
        stream.say(grant=pb.Grant(tier="objects", total_bytes=64 * MIB))
        while not shard.grants()["objects"]:
            await asyncio.sleep(0.001)
        space.limits = space.limits.model_copy(update={"tiers": ("objects",)})
        slow[0].plan = FaultPlan(delay=1, delay_ms=1500)
        storing = asyncio.create_task(shard.pager.store(space, slots(1), pages(slots(1), 1)))
        while not shard.tiers.get("objects").writing:
            await asyncio.sleep(0.001)
        stream.say(configuration=configuration(2, tier(spec, TierState.DRAINING)))
        while shard.tiers.get("objects").state is not TierState.DRAINING:
            await asyncio.sleep(0.001)
        # It is in force and not acknowledged; neither is it in the hello of the next stream.
        stream.end()
        again = await coordinator.stream()
        assert again.hello.generation == 1
        assert not any(m.generation_ack.generation == 2 for m in stream.said)
        assert not storing.done()
        await again.hears("generation_ack", lambda ack: ack.generation == 2)
        assert not shard.tiers.get("objects").writing
        await storing
        assert (await shard.pager.load(space, slots(1)) == pages(slots(1), 1)).all()


async def test_a_configuration_that_fails_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vswap.node.control._BACKOFF_MOST_S", 0.05)
    taken: list[int] = []
    coordinator = Coordinator()
    async with (
        open_shard(tmp_path / "s", ram("mine")) as shard,
        listening(coordinator) as address,
        linked(shard, address),
    ):
        real = shard.configure

        async def configure(generation: int, tiers: list[tuple[TierSpec, TierState]]) -> None:
            taken.append(generation)
            if len(taken) < 3:
                raise AlreadyExists("not yet")
            await real(generation, tiers)

        monkeypatch.setattr(shard, "configure", configure)
        stream = await coordinator.stream()
        stream.say(configuration=configuration(1, tier(objects(tmp_path / "o"))))
        assert (await stream.hears("generation_ack")).generation == 1
        assert taken == [1, 1, 1]


async def test_a_tier_with_the_name_of_a_local_one_changes_nothing(tmp_path: Path) -> None:
    coordinator = Coordinator()
    async with (
        open_shard(tmp_path / "s", ram("mine")) as shard,
        listening(coordinator) as address,
        linked(shard, address),
    ):
        stream = await coordinator.stream()
        clash = objects(tmp_path / "o", "mine")
        stream.say(configuration=configuration(7, tier(objects(tmp_path / "p", "p")), tier(clash)))
        await asyncio.sleep(0.2)
        assert [t.name for t in shard.tiers] == ["mine"]
        assert shard.generation == 0
        assert not any(m.HasField("generation_ack") for m in stream.said)


def locked(spec: TierSpec) -> Backend:
    """A backend that needs its tier's password to be made."""
    spec.password()
    return make_backend(spec)


async def test_of_two_lives_the_older_leaves_the_newer_ones_segments_alone(tmp_path: Path) -> None:
    """Its state directory was copied, and the copy was started: one prefix, two who sweep it."""
    coordinator = Coordinator()
    async with (
        open_shard(tmp_path / "s", ram(), seams=Seams(late_s=0)) as shard,
        listening(coordinator) as address,
        linked(shard, address) as control,
    ):
        stream = await coordinator.stream()
        stream.say(configuration=configuration(4, tier(objects(tmp_path / "o"))))
        await stream.hears("generation_ack")
        shared = shard.tiers.get("objects")
        shard.set_grant("objects", 64 * MIB)
        space = shard.spaces.create("s", limits=Limits(tiers=("objects",)))
        names = []
        for slot in (1, 2):
            await shard.pager.store(space, slots(slot), pages(slots(slot), 1))
            names.append(shared.segment_name(next(reversed(shared.segments))))
        theirs, ours = names
        await shard.pager.free(space, slots(1))
        async with asyncio.timeout(10):
            while len(shared.segments) > 1:
                await asyncio.sleep(0.02)
        await shared.backend.put(theirs, b"of the newer life")

        async def there() -> set[str]:
            listed = shared.backend.list(prefix(ours.cluster, ours.shard))
            return {item.key async for item in listed}

        # A dead stream of our own that the coordinator has not noticed is another matter.
        for known, stops in ((shard.incarnation, False), (shard.incarnation + 1, True)):
            coordinator.refuses = StaleIncarnation("known in another life", incarnation=known)
            stream.end()
            async with asyncio.timeout(10):
                while control.refused is None or control.refused.fields["incarnation"] != known:
                    await asyncio.sleep(0.02)
            assert shared.fenced is stops
            assert (shared.state is TierState.DRAINED) is stops
            if not stops:
                coordinator.refuses = None
                stream = await coordinator.stream()
        # Nothing is written there, and nothing deleted; what is there can be read.
        assert (await shard.pager.load(space, slots(2)) == pages(slots(2), 1)).all()
        with pytest.raises(OutOfTiers):
            await shard.pager.store(space, slots(3), pages(slots(3), 1))
        await shard.pager.free(space, slots(2))
        await shard.sweep(shared)
        assert not await shard.reaper.pass_once()
        assert await there() == {ours.key, theirs.key}
        # Until the coordinator takes it for the newest again.
        coordinator.refuses = None
        stream = await coordinator.stream()
        stream.say(configuration=configuration(4, tier(objects(tmp_path / "o"))))
        async with asyncio.timeout(10):
            while shared.fenced or shard.reaper.pending:
                await asyncio.sleep(0.02)
        await shard.sweep(shared)
        assert await there() == set()


async def test_an_older_life_stays_the_older_one_over_a_restart(tmp_path: Path) -> None:
    """With nobody there to say it again."""
    both = TierSpec(
        name="both", capacity_bytes=256 * MIB, rank=60, redundancy="mirror:2",
        urls=tuple(f"file://{tmp_path / place}" for place in "ab"),
    )  # fmt: skip
    tiers = [(objects(tmp_path / "o"), TierState.ACTIVE), (both, TierState.ACTIVE)]
    seams = Seams(late_s=0)

    def there() -> set[Path]:
        found = (path for place in "oab" for path in (tmp_path / place).rglob("*"))
        return {path for path in found if path.is_file()}

    async with open_shard(tmp_path / "s", ram(), seams=seams) as shard:
        await shard.join(uuid4())
        await shard.configure(4, tiers)
        for name in ("objects", "both"):
            shard.set_grant(name, 64 * MIB)
            space = shard.spaces.create(name, limits=Limits(tiers=(name,)))
            shared = shard.tiers.get(name)
            await shard.pager.store(space, slots(1), pages(slots(1), 1))
            theirs = shared.segment_name(next(iter(shared.segments)))
            await shard.pager.free(space, slots(1))
            async with asyncio.timeout(10):
                while shared.segments:
                    await asyncio.sleep(0.02)
            await shared.backend.put(theirs, b"of the newer life")
            await shard.pager.store(space, slots(1), pages(slots(1), 1))
        shard.disown(outlived=True)
        for name in ("objects", "both"):
            await shard.pager.free(shard.spaces.get(name), slots(1))
        incarnation, before = shard.incarnation, there()
        assert before
    for _ in range(2):
        async with open_shard(tmp_path / "s", ram(), seams=seams) as shard:
            # What it does of itself: dead segments, a sweep, an audit of every server.
            assert shard.incarnation == incarnation
            assert shard.reaper.pending
            for name in ("objects", "both"):
                tier = shard.tiers.get(name)
                assert tier.state is TierState.DRAINED
                await shard.sweep(tier)
            assert not await shard.reaper.pass_once()
            await asyncio.sleep(0.3)
            assert there() == before
    async with open_shard(tmp_path / "s", ram(), seams=seams) as shard:
        await shard.configure(4, tiers)
        for name in ("objects", "both"):
            await shard.sweep(shard.tiers.get(name))
        async with asyncio.timeout(10):
            while shard.reaper.pending:
                await asyncio.sleep(0.02)
        assert not there()
    async with open_shard(tmp_path / "s", ram(), seams=seams) as shard:
        assert shard.incarnation == incarnation + 1


async def test_a_tier_without_its_password_holds_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator = Coordinator()
    monkeypatch.delenv("VSWAP_TEST_SECRET", raising=False)
    spec = objects(tmp_path / "o", rank=-1, password_env="VSWAP_TEST_SECRET")
    seams = Seams(make_backend=locked)
    async with (
        open_shard(tmp_path / "s", ram(), seams=seams) as shard,
        listening(coordinator) as address,
        linked(shard, address),
    ):
        stream = await coordinator.stream()
        stream.say(configuration=configuration(3, tier(spec)))
        assert (await stream.hears("generation_ack")).generation == 3
        stream.say(grant=pb.Grant(tier="objects", total_bytes=64 * MIB))
        report = await stream.hears("report", lambda r: r.grants and r.grants[0].total_bytes)
        told = next(usage for usage in report.tiers if usage.tier == "objects")
        assert not told.available
        assert told.error == "environment variable VSWAP_TEST_SECRET is not set"
        # Stores pass it over; where nothing else is allowed they say why they cannot.
        anywhere = shard.spaces.create("anywhere")
        await shard.pager.store(anywhere, slots(1), pages(slots(1), 1))
        assert shard.tiers.get("objects").stored_bytes == 0
        only = anywhere.limits.model_copy(update={"tiers": ("objects",)})
        there = shard.spaces.create("there", limits=only)
        with pytest.raises(TierUnavailable, match="VSWAP_TEST_SECRET is not set"):
            await shard.pager.store(there, slots(1), pages(slots(1), 1))
    # A restart takes it up again, with the variable or without.
    async with open_shard(tmp_path / "s", ram(), seams=seams) as shard:
        assert not shard.tiers.get("objects").available
        assert (await shard.pager.load(shard.spaces.get("anywhere"), slots(1))).any()
    monkeypatch.setenv("VSWAP_TEST_SECRET", "x")
    async with open_shard(tmp_path / "s", ram(), seams=seams) as shard:
        assert shard.tiers.get("objects").available
        shard.set_grant("objects", 64 * MIB)
        await shard.pager.store(shard.spaces.get("there"), slots(1), pages(slots(1), 1))
        assert shard.tiers.get("objects").stored_bytes


async def test_a_password_that_comes_later_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "password"
    spec = objects(tmp_path / "o", password_file=str(file))
    async with open_shard(tmp_path / "s", ram(), seams=Seams(make_backend=locked)) as shard:
        await shard.configure(1, [(spec, TierState.ACTIVE)])
        assert "cannot read password file" in shard.tiers.get("objects").error
        file.write_text("x")
        async with asyncio.timeout(10):
            while not shard.tiers.get("objects").available:
                await asyncio.sleep(0.05)


async def test_a_tier_that_was_removed_and_added_again_at_once_is_another(tmp_path: Path) -> None:
    first = objects(tmp_path / "o", password_file=str(tmp_path / "missing"))
    second = objects(tmp_path / "p", mib=64)
    async with open_shard(tmp_path / "s", ram(), seams=Seams(make_backend=locked)) as shard:
        await shard.configure(1, [(first, TierState.ACTIVE)])
        await shard.configure(3, [(second, TierState.ACTIVE)])
        now = shard.tiers.get("objects")
        assert now.available
        await shard.configure(4, [(objects(tmp_path / "p", mib=32), TierState.ACTIVE)])
        assert shard.tiers.get("objects") is now


async def test_what_was_asked_on_a_lost_stream_is_asked_again(tmp_path: Path) -> None:
    coordinator = Coordinator()
    async with (
        open_shard(tmp_path / "s", ram()) as shard,
        listening(coordinator) as address,
        linked(shard, address),
    ):
        for generation in (1, 2):
            stream = await coordinator.stream()
            stream.say(configuration=configuration(generation, tier(objects(tmp_path / "o"))))
            assert (await stream.hears("grant_request")).tier == "objects"
            stream.end()


async def test_an_absent_coordinator_is_tried_ever_more_slowly(tmp_path: Path) -> None:
    coordinator = Coordinator()
    channels: list[float] = []

    def count(address: str) -> grpc.aio.Channel:
        channels.append(time.monotonic())
        return grpc.aio.insecure_channel(address)

    async with open_shard(tmp_path / "s", ram()) as shard, contextlib.AsyncExitStack() as stack:
        server = contextlib.AsyncExitStack()
        address = await server.enter_async_context(listening(coordinator))
        control = await stack.enter_async_context(linked(shard, address))
        control._make_channel = count
        await coordinator.stream()
        await server.aclose()
        await asyncio.sleep(2.0)
        # Pauses of 50, 100, 200, 400 and 800 ms; without backoff there would be 40.
        assert 3 <= len(channels) <= 7
        assert control.states[:3] == ["absent", "connected", "absent"]
        assert set(control.states[3:]) == {"absent"}
        async with listening(coordinator, int(address.rpartition(":")[2])):
            stream = await coordinator.stream()
            await stream.hears("report")
            assert control.states[-1] == "connected"


@pytest.mark.parametrize("why", [AlreadyExists("the name is taken"), Refused("forgotten")])
async def test_a_refusal_is_known_and_retried_slowly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: VswapError
) -> None:
    monkeypatch.setattr("vswap.node.control._BACKOFF_MOST_S", 1.0)
    coordinator = Coordinator()
    coordinator.refuses = why
    async with (
        open_shard(tmp_path / "s", ram()) as shard,
        listening(coordinator) as address,
        linked(shard, address) as control,
    ):
        async with asyncio.timeout(5):
            await control.attempted.wait()
        assert type(control.refused) is type(why)
        assert str(control.refused) == str(why)
        await asyncio.sleep(0.3)
        assert coordinator.attempts == 1
        coordinator.refuses = None
        stream = await coordinator.stream()
        await stream.hears("report")
        assert control.refused is None


async def test_another_cluster_is_refused_by_the_node_itself(tmp_path: Path) -> None:
    coordinator = Coordinator()
    async with open_shard(tmp_path / "s", ram()) as shard:
        await shard.join(uuid4())
        async with listening(coordinator) as address, linked(shard, address) as control:
            await control.attempted.wait()
            assert isinstance(control.refused, Refused)
            assert str(shard.cluster) in str(control.refused)
            assert "connected" not in control.states


async def test_an_absent_coordinator_delays_nothing(tmp_path: Path) -> None:
    async with open_shard(tmp_path / "s", ram()) as shard:
        started = time.monotonic()
        async with linked(shard, "127.0.0.1:1") as control:
            await control.attempted.wait()
            assert control.refused is None
            assert time.monotonic() - started < 2


async def test_something_else_at_the_address_is_a_refusal(tmp_path: Path) -> None:
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with (
        open_shard(tmp_path / "s", ram()) as shard,
        linked(shard, f"127.0.0.1:{port}") as control,
    ):
        await control.attempted.wait()
        assert isinstance(control.refused, InvalidRequest)
    await server.stop(None)


async def test_a_defect_does_not_end_the_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator = Coordinator()
    async with (
        open_shard(tmp_path / "s", ram()) as shard,
        listening(coordinator) as address,
    ):
        real, failed = shard.ages, list[int]()

        def ages() -> Any:
            if not failed:
                failed.append(1)
                raise RuntimeError("a defect")
            return real()

        monkeypatch.setattr(shard, "ages", ages)
        async with linked(shard, address):
            await coordinator.stream()
            stream = await coordinator.stream()
            await stream.hears("report")
            assert failed


async def test_a_node_that_was_killed_after_its_goodbye_can_leave(tmp_path: Path) -> None:
    coordinator = Coordinator()
    coordinator.refuses = Refused("forgotten", forgotten=True)
    left: list[bool] = []
    async with open_shard(tmp_path / "s", ram()) as shard:
        await shard.join(UUID(coordinator.cluster))
        async with listening(coordinator) as address, linked(shard, address) as control:
            await control.attempted.wait()
            departure = Departure(shard, done=lambda: left.append(True))
            departure.control = control
            async with asyncio.timeout(5):
                await departure.leave()
    assert left


@pytest.mark.parametrize("lost", ["nothing", "the goodbye", "the farewell"])
async def test_a_goodbye_is_said_until_it_is_confirmed(tmp_path: Path, lost: str) -> None:
    coordinator = Coordinator()
    async with (
        open_shard(tmp_path / "s", ram()) as shard,
        listening(coordinator) as address,
    ):
        control = Watched(shard, address)
        running = asyncio.create_task(control.run())
        stream = await coordinator.stream()
        saying = asyncio.create_task(control.goodbye())
        await stream.hears("goodbye")
        if lost == "the goodbye":
            stream.end()
            stream = await coordinator.stream()
            await stream.hears("goodbye")
        assert not saying.done()
        if lost == "the farewell":
            coordinator.refuses = Refused("forgotten", forgotten=True)
        else:
            stream.say(farewell=pb.Farewell())
        stream.end()
        async with asyncio.timeout(10):
            await asyncio.gather(saying, running)
        assert control.states[-1] == "absent"
