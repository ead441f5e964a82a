"""Planning: migrations, compactions, and what the coordinator starts by itself."""

from __future__ import annotations

from typing import Any

import pytest
from plans import MIB, Node, World, state_of

from vswap.coordinator import assess, views
from vswap.coordinator.balance import Policy
from vswap.coordinator.events import AddTier, CancelJob, Now, RemoveTier, SetTier, StartJob
from vswap.coordinator.state import JobState, MoveKind, TierState
from vswap.tiers.spec import TierSpec
from vswap.wire.errors import (
    AlreadyExists,
    BackendRefused,
    BadConfig,
    InvalidRequest,
    OutOfTiers,
    Refused,
    UnknownJob,
    UnknownTier,
)

MIGRATE, COMPACT, DRAIN = MoveKind.MIGRATE, MoveKind.COMPACT, MoveKind.DRAIN


@pytest.fixture
def world() -> World:
    world = World()
    world.add_tier("a", rank=10)
    world.add_tier("b", rank=20)
    return world


@pytest.fixture
def node(world: World) -> Node:
    node = world.node("n1", ram=200 * MIB)
    node.fill("a", 30 * MIB)
    return node


# ------------------------------------------------------------------ migrate


def test_a_budget_is_split_by_what_the_nodes_hold(world: World, node: Node) -> None:
    other = world.node("n2")
    other.fill("a", 10 * MIB)
    third = world.node("n3")
    job = world.start(MIGRATE, "a", destination="b", byte_budget=20 * MIB)
    assert node.directives[job.id].byte_budget == 15 * MIB
    assert other.directives[job.id].byte_budget == 5 * MIB
    assert third.directives == {}
    assert job.bytes_total == 20 * MIB
    node.work(job.id, 15 * MIB, state="done")
    assert state_of(job) is JobState.RUNNING
    other.work(job.id, 5 * MIB, state="done")
    assert state_of(job) is JobState.DONE
    node.settle()
    assert node.directives == other.directives == {}
    assert world.state.tiers["a"].state is TierState.ACTIVE


def test_a_restarted_node_gets_what_is_left_of_its_budget(world: World, node: Node) -> None:
    job = world.start(MIGRATE, "a", destination="b", byte_budget=20 * MIB)
    node.work(job.id, 12 * MIB)
    node.restart()
    assert node.directives[job.id].byte_budget == 8 * MIB
    node.work(job.id, 8 * MIB)
    assert state_of(job) is JobState.RUNNING
    node.restart()
    assert state_of(job) is JobState.DONE
    assert views.job(world.state, job, Now(world.now_s, 0)).bytes_moved == 20 * MIB


def test_a_killed_coordinator_goes_on_with_the_same_budget(world: World, node: Node) -> None:
    job_id = world.start(MIGRATE, "a", destination="b", byte_budget=20 * MIB).id
    world.tick(5)
    node.work(job_id, 12 * MIB)
    world.restart()
    node.connect()
    assert node.directives[job_id].byte_budget == 20 * MIB
    node.work(job_id, 8 * MIB, state="done")
    assert world.state.jobs[job_id].state is JobState.DONE


def test_by_age(world: World, node: Node) -> None:
    node.ages = [("a", 0, 30 * MIB), ("a", 60, 9 * MIB), ("a", 600, 2 * MIB)]
    node.report()
    job = world.start(MIGRATE, "a", destination="b", older_than_s=90.0)
    assert job.bytes_total == 9 * MIB
    assert node.directives[job.id].older_than_s == 90
    assert node.directives[job.id].byte_budget == 0


def test_either_direction_and_onto_nodes_own_tiers(world: World, node: Node) -> None:
    world.node("n2", zram=MIB)
    up = world.start(MIGRATE, "a", destination="ram", byte_budget=MIB)
    assert up.room_bytes == {"ram": MIB}
    node.work(up.id, MIB, state="done")
    down = world.start(MIGRATE, "ram", destination="a")
    assert list(down.nodes) == [node.uuid]
    with pytest.raises(OutOfTiers, match="room for 0 bytes"):
        world.start(MIGRATE, "a", destination="zram")


def test_refused_if_the_destination_has_no_room(world: World, node: Node) -> None:
    world.node("n2").fill("b", 80 * MIB)
    with pytest.raises(OutOfTiers, match=r"30.0 MiB from a to b.*18.0 MiB"):
        world.start(MIGRATE, "a", destination="b")
    world.start(MIGRATE, "a", destination="b", byte_budget=10 * MIB)


def test_room_reserved_by_a_drain_is_not_there_for_a_migration(world: World, node: Node) -> None:
    world.add_tier("c", rank=30)
    world.node("n2").fill("b", 90 * MIB)
    world.start(DRAIN, "b")
    with pytest.raises(OutOfTiers):
        world.start(MIGRATE, "a", destination="c", byte_budget=20 * MIB)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"destination": ""}, InvalidRequest),
        ({"destination": "a"}, InvalidRequest),
        ({"destination": "x"}, UnknownTier),
        ({"destination": "b", "older_than_s": float("nan")}, InvalidRequest),
        ({"destination": "b", "older_than_s": -1.0}, InvalidRequest),
    ],
)
def test_nonsense_migrations(
    world: World, node: Node, fields: dict[str, object], error: type[Exception]
) -> None:
    before = dict(world.disk)
    with pytest.raises(error):
        world.start(MIGRATE, "a", **fields)
    assert world.disk == before


def test_jobs_that_get_in_each_others_way_are_refused(world: World, node: Node) -> None:
    world.start(DRAIN, "b")
    with pytest.raises(AlreadyExists, match="drain b"):
        world.start(MIGRATE, "a", destination="b")
    with pytest.raises(AlreadyExists, match="drain b"):
        world.start(COMPACT, "b")
    first = world.start(COMPACT, "a")
    with pytest.raises(AlreadyExists, match=first.id):
        world.start(COMPACT, "a")


def test_an_absent_node_blocks_by_name(world: World, node: Node) -> None:
    other = world.node("n2")
    other.fill("a", MIB)
    other.disconnect()
    job = world.start(MIGRATE, "a", destination="b")
    node.work(job.id, 30 * MIB, state="done")
    assert state_of(job) is JobState.BLOCKED
    assert "n2 is absent" in job.reason
    other.connect()
    other.work(job.id, MIB, state="done")
    assert state_of(job) is JobState.DONE


def test_nothing_to_move_is_done_at_once(world: World) -> None:
    assert world.start(MIGRATE, "a", destination="b").state is JobState.DONE


def test_a_cancelled_migration_stops_at_the_node(world: World, node: Node) -> None:
    job = world.start(MIGRATE, "a", destination="b")
    world.step(CancelJob(job.id))
    node.settle()
    assert node.directives == {}
    with pytest.raises(UnknownJob):
        world.step(CancelJob("x"))


# ------------------------------------------------------------------ compact


def test_compaction(world: World, node: Node) -> None:
    node.fill("a", 10 * MIB, 30 * MIB)
    job = world.start(COMPACT, "a")
    assert node.directives[job.id].target_utilisation == pytest.approx(0.9)
    node.progress[job.id].bytes_moved = 4 * MIB
    node.progress[job.id].bytes_left = 6 * MIB
    node.report()
    assert job.bytes_total == 10 * MIB
    node.progress[job.id].state = "done"
    node.report()
    assert state_of(job) is JobState.DONE
    for target in (1.5, -0.1, float("nan")):
        with pytest.raises(InvalidRequest):
            world.start(COMPACT, "a", target_utilisation=target)


def test_dry_runs_tell_what_would_move(world: World, node: Node) -> None:
    def planned(kind: MoveKind, **more: Any) -> tuple[int, int]:
        job = assess.plan(world.state, StartJob("p", kind, "a", **more))
        shown = views.job(world.state, job, Now(0.0, 0.0))
        assert shown.bytes_left == shown.bytes_total == sum(n.bytes_left for n in shown.nodes)
        assert shown.pages_left == sum(n.pages_left for n in shown.nodes)
        return shown.bytes_left, shown.pages_left

    assert planned(MIGRATE, destination="b") == (30 * MIB, 30 * MIB // 4096)
    assert planned(MIGRATE, destination="b", byte_budget=MIB) == (MIB, 256)
    # Nothing is to be gained where all that is stored is live.
    assert planned(COMPACT) == (0, 0)
    node.fill("a", 10 * MIB, 30 * MIB)
    assert planned(COMPACT, target_utilisation=1.0) == (10 * MIB, 2560)
    # Half of it, evenly used, frees 10 MiB: 10 of 20 are live then.
    assert planned(COMPACT, target_utilisation=0.5) == (5 * MIB, 1280)
    assert planned(COMPACT, target_utilisation=0.3) == (0, 0)


# ------------------------------------------------------------------ by itself


@pytest.fixture
def busy() -> World:
    world = World(Policy(compact_min_garbage_bytes=8 * MIB))
    world.add_tier("a", rank=10, high=0.9, low=0.8)
    world.add_tier("b", rank=20, high=0.9, low=0.8)
    world.add_tier("c", rank=30, capacity=1000 * MIB)
    return world


def test_a_tier_above_high_is_brought_to_low(busy: World) -> None:
    node = busy.node("n1")
    node.fill("a", 89 * MIB)
    busy.tick()
    assert busy.state.running() == []
    node.fill("a", 95 * MIB)
    busy.tick()
    [job] = busy.state.running()
    assert (job.kind, job.tier, job.destination) == (MIGRATE, "a", "b")
    assert job.byte_budget == 15 * MIB
    assert job.automatic
    busy.tick()
    assert len(busy.state.running()) == 1
    node.settle()
    node.work(job.id, 15 * MIB, state="done")
    node.fill("a", 95 * MIB)
    busy.tick()
    assert busy.state.running() == []
    busy.tick(60)
    node.report()
    busy.tick()
    assert len(busy.state.running()) == 1


def test_a_full_neighbour_is_passed_over(busy: World) -> None:
    node = busy.node("n1")
    node.fill("a", 95 * MIB)
    node.fill("b", 90 * MIB)
    busy.tick()
    [job] = busy.state.running()
    assert job.destination == "c"


def test_garbage_is_compacted(busy: World) -> None:
    node = busy.node("n1")
    node.fill("a", 4 * MIB, 11 * MIB)
    busy.tick()
    assert busy.state.running() == []
    node.fill("a", 4 * MIB, 13 * MIB)
    busy.tick()
    [job] = busy.state.running()
    assert (job.kind, job.tier, job.automatic) == (COMPACT, "a", True)


def test_an_operator_goes_before_the_automatic(busy: World) -> None:
    node = busy.node("n1")
    node.fill("a", 4 * MIB, 13 * MIB)
    busy.tick()
    [automatic] = busy.state.running()
    job = busy.start(COMPACT, "a")
    assert state_of(automatic) is JobState.CANCELLED
    assert job.title in automatic.reason
    assert list(node.directives) == [job.id]
    busy.start(DRAIN, "b")


def test_an_automatic_job_that_is_stuck_is_given_up(busy: World) -> None:
    node = busy.node("n1")
    node.fill("a", 95 * MIB)
    busy.tick()
    [job] = busy.state.running()
    node.disconnect()
    busy.tick(50)
    assert state_of(job) is JobState.BLOCKED
    busy.tick(20)
    assert state_of(job) is JobState.CANCELLED
    assert job.reason == "given up: n1 is absent and has pages there"


def test_it_can_be_switched_off() -> None:
    world = World(Policy(balance=False, compact=False))
    world.add_tier("a")
    world.add_tier("b", rank=20)
    world.node("n1").fill("a", 40 * MIB, 99 * MIB)
    world.tick()
    assert world.state.running() == []


# ------------------------------------------------------------------ tiers


def test_which_tiers_can_be_added(world: World) -> None:
    def spec(name: str, url: str, capacity: int = MIB) -> TierSpec:
        return TierSpec(name=name, url=url, capacity_bytes=capacity)

    with pytest.raises(BadConfig, match="configure it at the nodes"):
        world.step(AddTier(spec("r", "ram://")))
    with pytest.raises(AlreadyExists, match="exists already"):
        world.step(AddTier(spec("a", "file:///other")))
    with pytest.raises(AlreadyExists, match="tier a already lies at"):
        world.step(AddTier(spec("r", "redis://user:x@a/")))
    with pytest.raises(BackendRefused, match="capacity"):
        world.step(AddTier(spec("r", "file:///r", 0)))
    world.node("n1", own=MIB)
    with pytest.raises(AlreadyExists, match="n1 has a tier of its own"):
        world.step(AddTier(spec("own", "file:///own")))


def test_settings_of_a_tier_change_while_it_runs(world: World, node: Node) -> None:
    world.step(SetTier("a", capacity_bytes=50 * MIB, high=0.7, low=0.6, rank=5))
    node.settle()
    world.restart()
    spec = world.state.tiers["a"].spec
    assert (spec.capacity_bytes, spec.high, spec.low, spec.rank) == (50 * MIB, 0.7, 0.6, 5)
    generation = world.state.generation
    for fields in ({"capacity_bytes": 0}, {"high": 0.1}, {"low": 2.0}, {"rank": 10**9}):
        with pytest.raises(BadConfig, match="tier a: "):
            world.step(SetTier("a", **fields))
    with pytest.raises(UnknownTier):
        world.step(SetTier("x", rank=1))
    assert world.state.generation == generation


def test_a_tier_that_was_never_used_can_be_removed(world: World) -> None:
    world.step(RemoveTier("b"))
    node = world.node("n1")
    node.ask("a", MIB)
    node.ask("a", 0)
    node.report()
    with pytest.raises(Refused, match="is in use"):
        world.step(RemoveTier("a"))
    with pytest.raises(UnknownTier):
        world.step(RemoveTier("b"))


def test_the_destination_of_a_job_cannot_be_removed(world: World, node: Node) -> None:
    world.start(MIGRATE, "a", destination="b")
    with pytest.raises(Refused, match="needs the tier"):
        world.step(RemoveTier("b"))


def test_ended_jobs_are_kept_but_not_for_ever(world: World) -> None:
    for number in range(260):
        world.step(StartJob(f"j{number}", MIGRATE, "a", destination="b"))
    assert len(world.state.jobs) <= 202
    assert "j259" in world.state.jobs
    assert len([key for key in world.disk if key[0] == "job"]) == len(world.state.jobs)
