"""Planning: grants. The sum of what shards may hold never exceeds the capacity."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from plans import MIB, Node, World

from vswap.coordinator.events import (
    ActivateTier,
    CancelJob,
    DeleteSegments,
    ForgetNode,
    SetTier,
    StartJob,
)
from vswap.coordinator.state import Found, MoveKind, TierState
from vswap.v1 import coordinator_pb2
from vswap.wire.errors import VswapError


@pytest.fixture
def world() -> World:
    world = World()
    world.add_tier("a", capacity=100)
    return world


def test_a_request_gets_what_is_free(world: World) -> None:
    one, two = world.node("n1"), world.node("n2")
    assert one.ask("a", 70) == 70
    assert two.ask("a", 70) == 30
    assert two.ask("a", 80) == 30


def test_every_request_is_answered_also_nonsense(world: World) -> None:
    node = world.node("n1")
    node.ask("a", 10)
    assert node.ask("a", 10) == 10
    node.ask("nonesuch", 10)
    assert node.grants["nonesuch"] == 0


def test_what_is_given_back_is_free_once_a_report_confirms_it(world: World) -> None:
    one, two = world.node("n1"), world.node("n2")
    one.ask("a", 100)
    one.ask("a", 40)
    assert two.ask("a", 60) == 0
    one.report()
    assert two.ask("a", 60) == 60


def test_nothing_below_what_is_stored_is_given_back(world: World) -> None:
    node = world.node("n1")
    node.fill("a", 50)
    assert node.ask("a", 20) == 50


def test_a_raise_is_remembered_even_if_the_node_never_saw_it(world: World) -> None:
    one = world.node("n1")
    one.say(grant_request=_request(80))
    world.restart()
    two = world.node("n2")
    assert two.ask("a", 50) == 20
    one.connect()
    assert one.grants["a"] == 80


def test_what_a_node_holds_beyond_our_books_counts(world: World) -> None:
    node = world.node("n1")
    node.disconnect()
    node.grants["a"], node.pages["a"] = 60, (50, 50)
    node.connect(settle=False)
    assert world.state.held_bytes("a") == 60
    node.settle()
    assert node.grants["a"] == 50
    assert world.state.held_bytes("a") == 50


def test_a_lowering_counts_only_when_the_node_shows_it(world: World) -> None:
    one, two = world.node("n1"), world.node("n2")
    one.disconnect()
    one.grants["a"] = 60
    one.connect(settle=False)
    one.report()
    assert two.ask("a", 100) == 40
    one.settle()
    assert one.grants["a"] == 0
    assert two.ask("a", 100) == 100


def test_an_absent_node_keeps_its_grant(world: World) -> None:
    one, two = world.node("n1"), world.node("n2")
    one.ask("a", 70)
    one.disconnect()
    world.tick(1000)
    assert two.ask("a", 100) == 30


def test_a_smaller_capacity_stops_grants_and_breaks_nothing(world: World) -> None:
    one, two = world.node("n1"), world.node("n2")
    one.fill("a", 70)
    world.step(SetTier("a", capacity_bytes=50))
    one.settle()
    assert one.grants["a"] == 70
    assert two.ask("a", 1) == 0
    one.pages["a"] = (20, 20)
    one.report()
    assert one.ask("a", 20) == 20
    one.report()
    assert two.ask("a", 100) == 30


def _request(total: int) -> coordinator_pb2.GrantRequest:
    return coordinator_pb2.GrantRequest(tier="a", total_bytes=total)


class Grants(RuleBasedStateMachine):
    """Nodes that write only what they believe they may, and everything that can come between."""

    CAPACITY = 1000

    @initialize()
    def begin(self) -> None:
        self.world = World()
        self.world.add_tier("a", capacity=self.CAPACITY, rank=10)
        self.world.add_tier("b", capacity=10 * self.CAPACITY * MIB, rank=20)
        self.nodes = [Node(self.world, f"n{i}", {}) for i in range(3)]
        self.world.nodes = {node.name: node for node in self.nodes}
        self.forgotten: set[str] = set()
        self.jobs = 0

    nodes_ = st.integers(0, 2)

    @rule(index=nodes_)
    def connect(self, index: int) -> None:
        node = self.nodes[index]
        if not node.stream and node.name not in self.forgotten:
            node.connect(settle=False)

    @rule(index=nodes_)
    def disconnect(self, index: int) -> None:
        if self.nodes[index].stream:
            self.nodes[index].disconnect()

    @rule(index=nodes_, forgets_grants=st.booleans())
    def kill_node(self, index: int, forgets_grants: bool) -> None:
        node = self.nodes[index]
        if node.stream:
            node.disconnect()
        node.incarnation += 1
        node.directives.clear()
        node.progress.clear()
        if forgets_grants:
            node.grants.clear()

    @rule()
    def kill_coordinator(self) -> None:
        self.world.restart()

    @rule(index=nodes_, count=st.integers(1, 4))
    def read(self, index: int, count: int) -> None:
        if self.nodes[index].stream:
            self.nodes[index].read(count)

    @rule(index=nodes_)
    def report(self, index: int) -> None:
        if self.nodes[index].stream:
            self.nodes[index].report()

    @rule(index=nodes_, total=st.integers(0, CAPACITY + 100))
    def ask(self, index: int, total: int) -> None:
        """As a node does: more at any time; less only when no answer is outstanding."""
        node = self.nodes[index]
        if not node.stream:
            return
        if total < node.grants.get("a", 0):
            if node.inbox:
                return
            node.grants["a"] = max(total, node.pages.get("a", (0, 0))[1])
            total = node.grants["a"]
        node.say(grant_request=_request(total))

    @rule(index=nodes_, share=st.floats(0, 1))
    def write(self, index: int, share: float) -> None:
        node = self.nodes[index]
        if node.name not in self.forgotten and "a" not in node.closed:
            stored = int(node.grants.get("a", 0) * share)
            if stored >= node.pages.get("a", (0, 0))[1]:
                node.pages["a"] = (stored, stored)

    @rule(index=nodes_, share=st.floats(0, 1))
    def free(self, index: int, share: float) -> None:
        node = self.nodes[index]
        stored = int(node.pages.get("a", (0, 0))[1] * share)
        node.pages["a"] = (stored, stored)

    @rule(seconds=st.floats(0.1, 30))
    def time(self, seconds: float) -> None:
        self.world.tick(seconds)

    @rule()
    def drain(self) -> None:
        self.jobs += 1
        try:
            self.world.step(StartJob(f"d{self.jobs}", MoveKind.DRAIN, "a"))
        except VswapError:
            return

    @rule()
    def cancel(self) -> None:
        for job in self.world.state.running():
            self.world.step(CancelJob(job.id))
        self.world.step(ActivateTier("a"))

    @rule()
    def answer(self) -> None:
        if not self.world.asked:
            return
        asked = self.world.asked[0]
        if isinstance(asked, DeleteSegments):
            for node in self.nodes:
                if node.uuid == asked.shard:
                    node.pages.pop(asked.tier, None)
            self.world.answer_only()
            return
        found = [
            Found(f"vswap/{self.world.state.cluster}/{node.uuid}/", 1, node.pages["a"][1])
            for node in self.nodes
            if asked.tier == "a" and node.pages.get("a", (0, 0))[1]
        ]
        self.world.answer_only(*found)

    @precondition(lambda self: len(self.forgotten) < 1)
    @rule(index=nodes_)
    def forget(self, index: int) -> None:
        node = self.nodes[index]
        known = node.uuid in self.world.state.shards
        if known and not node.stream and not self.world.state.connected(node.uuid):
            self.world.step(ForgetNode(node.uuid))
            self.forgotten.add(node.name)
            node.grants.clear()

    @invariant()
    def the_sum_fits(self) -> None:
        assert self.world.state.held_bytes("a") <= self.CAPACITY

    @invariant()
    def so_do_the_beliefs_of_the_nodes(self) -> None:
        assert sum(node.grants.get("a", 0) for node in self.nodes) <= self.CAPACITY
        assert sum(node.pages.get("a", (0, 0))[1] for node in self.nodes) <= self.CAPACITY

    @invariant()
    def a_drained_tier_is_empty(self) -> None:
        if self.world.state.tiers["a"].state is TierState.DRAINED:
            assert all(not node.pages.get("a", (0, 0))[1] for node in self.nodes)


Grants.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestGrants = Grants.TestCase
