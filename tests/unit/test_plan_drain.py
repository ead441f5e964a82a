"""Planning: draining a tier."""

from __future__ import annotations

import pytest
from plans import CLUSTER, MIB, Node, World, state_of

from vswap.coordinator import assess, views
from vswap.coordinator.events import (
    ActivateTier,
    AddTier,
    CancelJob,
    ForgetNode,
    ListBackend,
    Now,
    RemoveTier,
    StartJob,
)
from vswap.coordinator.state import Found, JobState, MoveKind, TierState
from vswap.tiers.spec import TierSpec
from vswap.wire.errors import (
    AlreadyExists,
    OutOfTiers,
    Refused,
    TierUnavailable,
    UnknownTier,
)

DRAIN = MoveKind.DRAIN


@pytest.fixture
def world() -> World:
    world = World()
    world.add_tier("a", rank=10)
    world.add_tier("b", rank=20)
    return world


@pytest.fixture
def node(world: World) -> Node:
    node = world.node("n1")
    node.fill("a", 30 * MIB)
    return node


def test_a_drain_from_start_to_end(world: World, node: Node) -> None:
    job = world.start(DRAIN, "a")
    assert world.state.tier("a").state is TierState.DRAINING
    assert state_of(job) is JobState.RUNNING
    assert job.bytes_total == 30 * MIB
    assert node.generation == job.generation
    world.now_s += 1
    node.work(job.id, 20 * MIB, to="b")
    shown = views.job(world.state, job, Now(world.now_s, 1e9))
    assert (shown.bytes_moved, shown.bytes_left) == (20 * MIB, 10 * MIB)
    assert shown.rate_bytes_s == 20 * MIB
    assert shown.eta_s == 0.5
    world.now_s += 1
    assert world.asked == []
    node.work(job.id, 10 * MIB, to="b", state="done")
    assert node.grants["a"] == 0
    [asked] = world.asked
    assert isinstance(asked, ListBackend)
    assert asked.prefix == f"vswap/{CLUSTER}/"
    assert state_of(job) is JobState.RUNNING
    world.answer()
    assert state_of(job) is JobState.DONE
    assert world.state.tiers["a"].state is TierState.DRAINED
    assert node.directives == {}
    assert job.bytes_total == 30 * MIB


def test_nothing_counts_as_empty_before_the_acknowledgement(world: World, node: Node) -> None:
    world.step(StartJob("d", DRAIN, "a"))
    node.pages["a"] = (0, 0)
    node.report()
    assert world.asked == []
    assert node.directives == {}
    node.read(1)
    assert world.asked == []
    node.report()
    assert [type(a) for a in world.asked] == [ListBackend]


def test_segments_still_being_deleted_hold_a_drain_open(world: World, node: Node) -> None:
    job = world.start(DRAIN, "a")
    node.deleting["a"] = 1
    node.work(job.id, 30 * MIB, to="b", state="done")
    assert world.asked == []
    node.deleting["a"] = 0
    node.report()
    assert world.asked


def test_no_grant_is_given_while_a_tier_drains(world: World, node: Node) -> None:
    world.start(DRAIN, "a")
    assert node.ask("a", 40 * MIB) == 30 * MIB
    other = world.node("n2")
    assert other.ask("a", MIB) == 0


def test_refused_up_front_with_the_figures(world: World, node: Node) -> None:
    other = world.node("n2")
    other.fill("b", 75 * MIB)
    before = dict(world.disk)
    with pytest.raises(OutOfTiers) as caught:
        world.start(DRAIN, "a")
    assert "30.0 MiB" in str(caught.value)
    assert "b 23.0 MiB" in str(caught.value)
    assert caught.value.fields["need"] == 30 * MIB
    assert caught.value.fields["room"] == {"b": 23 * MIB}
    assert world.disk == before
    assert world.state.tiers["a"].state is TierState.ACTIVE


def test_a_nodes_own_tiers_count_for_its_own_pages_only(world: World) -> None:
    node = world.node("n1", ram=50 * MIB)
    world.node("n2", ram=500 * MIB)
    node.fill("a", 60 * MIB)
    world.node("n3").fill("b", 90 * MIB)
    with pytest.raises(OutOfTiers):
        world.start(DRAIN, "a")
    node.fill("a", 52 * MIB)
    job = world.start(DRAIN, "a")
    assert job.room_bytes == {"ram": 45 * MIB, "b": 8 * MIB}


def test_an_uncompressed_tier_has_less_room_than_it_seems(world: World) -> None:
    world.add_tier("raw", capacity=60 * MIB, rank=5, codec="none")
    node = world.node("n1")
    node.fill("a", 30 * MIB)
    world.node("n2").fill("b", 97 * MIB)
    with pytest.raises(OutOfTiers):
        world.start(DRAIN, "a")


def test_the_nodes_own_reserve_is_no_room(world: World, node: Node) -> None:
    spec = TierSpec(name="o", url="file:///o", capacity_bytes=64 * MIB, rank=30)
    world.step(AddTier(spec))
    node.settle()
    world.node("n2").fill("b", 100 * MIB)
    assert world.start(DRAIN, "a").room_bytes == {"b": 0, "o": 48 * MIB}


def test_unused_grants_are_room(world: World, node: Node) -> None:
    other = world.node("n2")
    assert other.ask("b", 90 * MIB) == 90 * MIB
    other.report()
    assert world.start(DRAIN, "a").room_bytes == {"b": 98 * MIB}


def test_two_drains_do_not_count_on_the_same_room(world: World, node: Node) -> None:
    world.add_tier("c", capacity=60 * MIB, rank=30)
    node.fill("a", 60 * MIB)
    node.fill("c", 50 * MIB)
    world.start(DRAIN, "a")
    with pytest.raises(OutOfTiers, match="shared with the drain of a"):
        world.start(DRAIN, "c")
    node.fill("c", 30 * MIB)
    world.start(DRAIN, "c")


def test_a_drain_keeps_its_room_from_others(world: World, node: Node) -> None:
    node.fill("a", 60 * MIB)
    world.start(DRAIN, "a")
    other = world.node("n2")
    assert other.ask("b", 100 * MIB) == 40 * MIB
    assert node.ask("b", 100 * MIB) == 60 * MIB


def test_a_dry_run_changes_nothing(world: World, node: Node) -> None:
    disk, generation = dict(world.disk), world.state.generation
    job = assess.plan(world.state, StartJob("d", DRAIN, "a"))
    assert state_of(job) is JobState.PLANNED
    assert job.room_bytes == {"b": 98 * MIB}
    assert job.bytes_total == 30 * MIB
    assert (world.disk, world.state.generation) == (disk, generation)
    assert world.state.jobs == {}


def test_a_dry_run_tells_what_would_move(world: World, node: Node) -> None:
    other = world.node("n2")
    other.fill("a", 10 * MIB)
    plan = assess.plan(world.state, StartJob("d", DRAIN, "a"))
    shown = views.job(world.state, plan, Now(0.0, 0.0))
    assert (shown.bytes_left, shown.bytes_total) == (40 * MIB, 40 * MIB)
    assert shown.pages_left == 40 * MIB // 4096
    assert {n.node: (n.bytes_left, n.pages_left) for n in shown.nodes} == {
        "n1": (30 * MIB, 30 * MIB // 4096),
        "n2": (10 * MIB, 10 * MIB // 4096),
    }


def test_what_cannot_be_drained(world: World, node: Node) -> None:
    with pytest.raises(UnknownTier, match="it has: a, b"):
        world.start(DRAIN, "x")
    world.node("n2", own=MIB)
    with pytest.raises(UnknownTier, match="node's own"):
        world.start(DRAIN, "own")
    job = world.start(DRAIN, "a")
    with pytest.raises(AlreadyExists, match=job.id):
        world.start(DRAIN, "a")
    node.work(job.id, 30 * MIB, to="b", state="done")
    world.answer()
    with pytest.raises(Refused, match="drained already"):
        world.start(DRAIN, "a")


def test_cancel_leaves_the_tier_active(world: World, node: Node) -> None:
    job = world.start(DRAIN, "a")
    node.work(job.id, 10 * MIB, to="b")
    generation = world.state.generation
    world.step(CancelJob(job.id))
    assert state_of(job) is JobState.CANCELLED
    assert world.state.tiers["a"].state is TierState.ACTIVE
    assert world.state.generation == generation + 1
    node.settle()
    assert node.directives == {}
    assert node.ask("a", 50 * MIB) == 50 * MIB
    with pytest.raises(Refused, match="has ended already: cancelled"):
        world.step(CancelJob(job.id))


def test_a_failure_leaves_the_tier_active(world: World, node: Node) -> None:
    job = world.start(DRAIN, "a")
    node.progress[job.id].reason = "the tier is haunted"
    node.work(job.id, 0, state="failed")
    assert state_of(job) is JobState.FAILED
    assert "n1: the tier is haunted" in job.reason
    assert world.state.tiers["a"].state is TierState.ACTIVE


def test_an_absent_node_keeps_the_job_open_and_is_named(world: World, node: Node) -> None:
    other = world.node("n2")
    other.fill("a", 5 * MIB)
    other.disconnect()
    job = world.start(DRAIN, "a")
    assert state_of(job) is JobState.RUNNING
    assert "n2 is absent" in job.reason
    node.work(job.id, 30 * MIB, to="b", state="done")
    assert state_of(job) is JobState.BLOCKED
    assert "n2 is absent" in job.reason
    assert world.asked == []
    shown = views.job(world.state, job, Now(world.now_s, 1e9))
    assert {part.node: part.state for part in shown.nodes} == {"n1": "done", "n2": "absent"}
    other.connect()
    assert state_of(job) is JobState.RUNNING
    other.work(job.id, 5 * MIB, to="b", state="done")
    world.answer()
    assert state_of(job) is JobState.DONE


def test_an_absent_node_with_nothing_there_is_not_in_the_way(world: World, node: Node) -> None:
    world.node("n2").disconnect()
    job = world.start(DRAIN, "a")
    node.work(job.id, 30 * MIB, to="b", state="done")
    world.answer()
    assert state_of(job) is JobState.DONE


def test_forgetting_the_absent_node_lets_the_drain_end(world: World, node: Node) -> None:
    other = world.node("n2")
    other.fill("a", 5 * MIB)
    other.disconnect()
    job = world.start(DRAIN, "a")
    node.work(job.id, 30 * MIB, to="b", state="done")
    world.step(ForgetNode("n2"))
    assert state_of(job) is JobState.BLOCKED
    assert "forgotten n2" in job.reason
    assert len(world.asked) == 2
    world.answer()
    world.answer()
    world.answer()
    assert state_of(job) is JobState.DONE


def test_a_waiting_node_blocks_with_its_reason(world: World, node: Node) -> None:
    job = world.start(DRAIN, "a")
    node.progress[job.id].reason = "no other tier has room"
    node.work(job.id, 0, state="waiting")
    assert state_of(job) is JobState.BLOCKED
    assert job.reason == "n1 waits: no other tier has room"
    node.progress[job.id].reason = ""
    node.work(job.id, MIB, to="b")
    assert state_of(job) is JobState.RUNNING
    assert job.reason == ""


def test_leftovers_on_the_backend_block_and_make_the_node_look_again(
    world: World, node: Node
) -> None:
    job = world.start(DRAIN, "a")
    node.work(job.id, 30 * MIB, to="b", state="done")
    world.answer(Found(f"vswap/{CLUSTER}/{node.uuid}/", 2, 99))
    assert state_of(job) is JobState.BLOCKED
    assert "2 segments of n1" in job.reason
    assert node.progress[job.id].state == "running"
    world.tick(3)
    world.answer(Found(f"vswap/{CLUSTER}/00000000-0000-0000-0000-00000000000b/", 1, 9))
    assert "vswap node forget 00000000-0000-0000-0000-00000000000b" in job.reason
    world.tick(3)
    world.answer()
    assert state_of(job) is JobState.DONE
    assert job.bytes_total == 30 * MIB


def test_an_unreachable_backend_blocks_and_is_asked_again(world: World, node: Node) -> None:
    job = world.start(DRAIN, "a")
    node.work(job.id, 30 * MIB, to="b", state="done")
    world.answer(error=TierUnavailable("connection refused"))
    assert state_of(job) is JobState.BLOCKED
    assert "cannot list a: connection refused" in job.reason
    assert world.asked == []
    world.tick(2)
    world.answer()
    assert state_of(job) is JobState.DONE


def test_a_restart_of_the_coordinator_resumes(world: World, node: Node) -> None:
    other = world.node("n2")
    other.fill("a", 5 * MIB)
    job_id = world.start(DRAIN, "a").id
    world.tick(3)
    node.work(job_id, 10 * MIB, to="b")
    other.work(job_id, 5 * MIB, to="b", state="done")
    world.restart()
    job = world.state.jobs[job_id]
    assert not job.state.ended
    world.tick()
    assert "n1 is absent" in job.reason
    assert "n2" not in job.reason
    node.connect()
    node.work(job_id, 20 * MIB, to="b", state="done")
    world.answer()
    assert state_of(job) is JobState.DONE
    shown = views.job(world.state, job, Now(world.now_s, 1e9))
    assert shown.bytes_moved == 35 * MIB


def test_a_restarted_node_counts_on(world: World, node: Node) -> None:
    job = world.start(DRAIN, "a")
    node.work(job.id, 10 * MIB, to="b")
    node.restart()
    assert node.directives[job.id].tier == "a"
    node.work(job.id, 20 * MIB, to="b", state="done")
    world.answer()
    assert views.job(world.state, job, Now(world.now_s, 1e9)).bytes_moved == 30 * MIB


def test_a_job_that_ended_while_the_node_was_away_is_stopped_there(
    world: World, node: Node
) -> None:
    job = world.start(DRAIN, "a")
    node.disconnect()
    world.step(CancelJob(job.id))
    assert job.id in node.directives
    node.connect()
    assert node.directives == {}


def test_a_drained_tier_can_be_activated_or_removed(world: World, node: Node) -> None:
    with pytest.raises(Refused, match="vswap drain a"):
        world.step(RemoveTier("a"))
    job = world.start(DRAIN, "a")
    with pytest.raises(Refused, match=f"vswap job cancel {job.id}"):
        world.step(ActivateTier("a"))
    with pytest.raises(Refused, match="being drained"):
        world.step(RemoveTier("a"))
    node.work(job.id, 30 * MIB, to="b", state="done")
    world.answer()
    world.step(ActivateTier("a"))
    node.settle()
    assert node.ask("a", 10 * MIB) == 10 * MIB
    node.ask("a", 0)
    node.report()
    job = world.start(DRAIN, "a")
    world.answer()
    generation = world.state.generation
    world.step(RemoveTier("a"))
    assert "a" not in world.state.tiers
    assert world.state.generation == generation + 1
    world.restart()
    assert list(world.state.tiers) == ["b"]


def test_the_rate_is_split_over_those_that_work(world: World, node: Node) -> None:
    other = world.node("n2")
    other.fill("a", 5 * MIB)
    job = world.start(DRAIN, "a", rate_bytes_s=10 * MIB)
    assert other.directives[job.id].rate_bytes_s == 5 * MIB
    assert node.directives[job.id].rate_bytes_s == 5 * MIB
    other.work(job.id, 5 * MIB, to="b", state="done")
    node.settle()
    assert node.directives[job.id].rate_bytes_s == 10 * MIB


def test_a_drain_of_an_empty_tier_ends_at_once(world: World) -> None:
    job = world.start(DRAIN, "b")
    world.answer()
    assert state_of(job) is JobState.DONE
