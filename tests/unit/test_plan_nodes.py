"""Planning: joining, leases, fencing, generations, forgetting."""

from __future__ import annotations

import pytest
from plans import CLUSTER, MIB, World

from vswap.coordinator import views
from vswap.coordinator.events import (
    DeleteSegments,
    ForgetNode,
    ListBackend,
    Listed,
    SetTier,
)
from vswap.coordinator.state import Found
from vswap.v1 import coordinator_pb2
from vswap.wire.errors import (
    AlreadyExists,
    InvalidRequest,
    Refused,
    StaleIncarnation,
    TierUnavailable,
    UnknownNode,
)


@pytest.fixture
def world() -> World:
    world = World()
    world.add_tier("a")
    return world


def test_a_new_node_is_welcomed_configured_and_acknowledges(world: World) -> None:
    node = world.node("n1")
    assert node.cluster == CLUSTER
    assert node.generation == world.state.generation == 2
    assert world.state.connected(node.uuid)
    assert world.state.shards[node.uuid].generation == 2


def test_a_tier_tells_which_nodes_cannot_use_it_and_why(world: World) -> None:
    node, other = world.node("n1"), world.node("n2")
    other.fill("a", MIB)
    assert views.usage(world.state, world.state.tiers["a"]).available
    node.fill("a", MIB)
    node.errors["a"] = "environment variable X is not set"
    node.report()
    usage = views.usage(world.state, world.state.tiers["a"])
    assert (usage.available, usage.error) == (False, "n1: environment variable X is not set")
    node.disconnect()
    assert views.usage(world.state, world.state.tiers["a"]).available


def test_nodes_of_another_cluster_and_without_identity_are_refused(world: World) -> None:
    node = world.node("n1")
    node.disconnect()
    with pytest.raises(Refused, match="belongs to cluster other"):
        node.connect(cluster_uuid="other")
    with pytest.raises(InvalidRequest):
        node.connect(shard_uuid="7")
    with pytest.raises(InvalidRequest):
        node.connect(node="")
    assert not world.state.connected(node.uuid)


def test_an_older_life_is_fenced_and_a_newer_one_takes_over(world: World) -> None:
    node = world.node("n1")
    first = node.stream
    for incarnation in (0, 1):
        with pytest.raises(StaleIncarnation):
            node.connect(incarnation=incarnation)
    assert node.stream == first
    node.incarnation = 2
    node.connect()
    assert world.state.sessions[node.uuid].stream == node.stream != first
    node.disconnect()
    with pytest.raises(StaleIncarnation) as caught:
        node.connect(incarnation=1)
    assert caught.value.fields["incarnation"] == 2
    node.connect()


def test_the_same_life_reconnects_once_its_old_stream_fell_silent(world: World) -> None:
    node = world.node("n1")
    world.tick(world.state.lease_s + 1)
    node.connect()
    assert world.state.connected(node.uuid)


def test_a_lost_lease_means_absent_and_a_report_undoes_it(world: World) -> None:
    node = world.node("n1")
    node.fill("a", 10 * MIB)
    before = dict(world.disk)
    actions = world.tick(world.state.lease_s + 0.1)
    assert not world.state.connected(node.uuid)
    assert actions == []
    assert world.disk == before
    node.report()
    assert world.state.connected(node.uuid)


def test_messages_of_an_old_stream_are_ignored(world: World) -> None:
    node = world.node("n1")
    old = node.stream
    node.incarnation = 2
    node.connect()
    new, node.stream = node.stream, old
    node.ask("a", MIB)
    node.stream = new
    assert world.state.hold(node.uuid, "a").granted == 0


def test_a_name_belongs_to_one_shard_until_it_is_forgotten(world: World) -> None:
    node = world.node("n1")
    other = world.node("n2")
    other.disconnect()
    with pytest.raises(AlreadyExists, match="is connected"):
        other.connect(node="n1")
    node.disconnect()
    with pytest.raises(AlreadyExists, match="vswap node forget n1"):
        other.connect(node="n1")
    world.step(ForgetNode("n1"))
    other.connect(node="n1")
    assert world.state.connected(other.uuid)


def test_a_local_tier_may_not_bear_a_cluster_tiers_name(world: World) -> None:
    with pytest.raises(AlreadyExists, match="tier of its own"):
        world.node("n1", a=MIB)


def test_every_change_of_the_tiers_reaches_every_node(world: World) -> None:
    node, other = world.node("n1"), world.node("n2")
    world.step(SetTier("a", rank=3))
    for each in (node, other):
        assert [m.configuration.tiers[0].spec.rank for m in each.inbox] == [3]
        each.settle()
        assert world.state.shards[each.uuid].generation == world.state.generation


def test_a_generation_that_was_never_sent_cannot_be_acknowledged(world: World) -> None:
    node = world.node("n1")
    with pytest.raises(InvalidRequest):
        node.say(generation_ack=coordinator_pb2.GenerationAck(generation=99))


def test_a_node_that_knows_a_newer_generation_lifts_ours(world: World) -> None:
    node = world.node("n1")
    node.disconnect()
    node.generation = 40
    node.connect(settle=False)
    assert world.state.generation == 41
    node.settle()
    assert node.generation == 41
    world.restart()
    assert world.state.generation == 41


def test_forgetting_is_refused_while_connected_and_for_unknown_names(world: World) -> None:
    node = world.node("n1")
    with pytest.raises(Refused, match="is connected"):
        world.step(ForgetNode("n1"))
    with pytest.raises(UnknownNode, match="there are: n1"):
        world.step(ForgetNode("n9"))
    assert world.state.connected(node.uuid)


def test_forgetting_sweeps_every_tier_and_then_frees_the_grant(world: World) -> None:
    world.add_tier("b")
    node = world.node("n1")
    node.fill("a", 10 * MIB)
    node.disconnect()
    world.step(ForgetNode(node.uuid))
    assert {(a.tier, a.shard) for a in world.asked if isinstance(a, DeleteSegments)} == {
        ("a", node.uuid),
        ("b", node.uuid),
    }
    assert world.state.held_bytes("a") == 10 * MIB
    world.answer()
    world.answer()
    assert world.state.held_bytes("a") == 0
    assert not world.state.sweeps
    with pytest.raises(Refused, match="--fresh"):
        node.connect()


def test_a_sweep_that_fails_is_tried_again_also_after_a_restart(world: World) -> None:
    node = world.node("n1")
    node.fill("a", 10 * MIB)
    node.disconnect()
    world.step(ForgetNode("n1"))
    world.answer(error=TierUnavailable("away"))
    assert world.asked == []
    world.tick(5)
    assert world.asked == []
    world.tick(20)
    assert [type(a) for a in world.asked] == [DeleteSegments]
    world.restart()
    assert world.state.sweeps == {(node.uuid, "a")}
    world.tick()
    world.answer()
    assert world.state.held_bytes("a") == 0
    world.restart()
    assert not world.state.sweeps


def test_a_goodbye_is_a_tombstone(world: World) -> None:
    node = world.node("n1")
    node.fill("a", MIB)
    node.say(goodbye=coordinator_pb2.Goodbye())
    assert [message.WhichOneof("message") for message in node.inbox] == ["farewell"]
    assert node.stream == ""
    assert [a.shard for a in world.asked if isinstance(a, DeleteSegments)] == [node.uuid]
    assert list(world.state.members()) == []
    # Its farewell may get lost: the refusal of its next hello says the same.
    with pytest.raises(Refused) as refused:
        node.connect()
    assert refused.value.fields["forgotten"]


def test_strangers_are_shown_and_never_deleted(world: World) -> None:
    node = world.node("n1")
    node.disconnect()
    ours = f"vswap/{CLUSTER}/"
    unknown = "00000000-0000-0000-0000-00000000000b"
    found = [
        Found(f"{ours}{node.uuid}/", 3, 30),
        Found(f"{ours}{unknown}/", 4, 40),
        Found("vswap/another/shard/", 5, 50),
    ]
    world.step(Listed("a", "", found))
    assert world.state.strangers["a"] == found[1:]
    assert world.asked == []
    world.step(ForgetNode(unknown))
    assert [(type(a), a.tier) for a in world.asked] == [(DeleteSegments, "a")]


def test_what_a_forgotten_shard_writes_later_is_swept_again(world: World) -> None:
    node = world.node("n1")
    node.disconnect()
    world.step(ForgetNode("n1"))
    world.answer()
    world.step(Listed("a", "", [Found(f"vswap/{CLUSTER}/{node.uuid}/", 1, 10)]))
    assert [type(a) for a in world.asked] == [DeleteSegments]


def test_strangers_are_looked_for_once_an_hour(world: World) -> None:
    world.tick()
    assert world.asked == []
    world.tick(3700)
    assert [type(a) for a in world.asked] == [ListBackend]
    world.asked.clear()
    world.tick()
    assert world.asked == []
