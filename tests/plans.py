"""A coordinator's plan and some nodes, all pure: what tests of the planning feed and look at."""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID, uuid5

from vswap.coordinator import plan
from vswap.coordinator.balance import Policy
from vswap.coordinator.documents import restore
from vswap.coordinator.events import (
    Action,
    AddTier,
    CloseStream,
    DeleteSegments,
    Event,
    ListBackend,
    Listed,
    NodeConnected,
    NodeDisconnected,
    NodeSaid,
    Now,
    Persist,
    Send,
    StartJob,
    Swept,
    Tick,
)
from vswap.coordinator.state import Found, Job, JobState, MoveKind, State
from vswap.tiers.spec import TierSpec
from vswap.v1 import common_pb2, coordinator_pb2
from vswap.wire.errors import VswapError

CLUSTER = str(UUID(int=7))
MIB = 2**20


def state_of(job: Job) -> JobState:
    """The job's state now; a plain attribute would be taken for unchanged by the type checker."""
    return job.state


class World:
    """Runs events through ``plan.step`` and keeps what it asked for.

    Persisted documents go to ``disk`` (as JSON, so that they must survive it); sends go to the
    nodes; listings and deletions wait in ``asked`` until a test answers them.
    """

    def __init__(self, policy: Policy | None = None) -> None:
        self.policy = policy or Policy(balance=False, compact=False)
        self.disk: dict[tuple[str, ...], str] = {
            ("cluster",): json.dumps({"uuid": CLUSTER}),
            ("generation",): json.dumps({"generation": 1}),
        }
        self.now_s = 100.0
        self.nodes: dict[str, Node] = {}
        self.asked: list[ListBackend | DeleteSegments] = []
        self._ids = 0
        self.state = self._restore()

    def step(self, event: Event) -> list[Action]:
        _, actions = plan.step(self.state, event, Now(self.now_s, 1e9), self.policy)
        for index, action in enumerate(actions):
            match action:
                case Persist():
                    assert index == 0, "what is sent must be on disk before"
                    for key, body in action.documents:
                        if body is None:
                            self.disk.pop(key, None)
                        else:
                            self.disk[key] = json.dumps(body)
                case Send():
                    node = self._node(action.shard)
                    if node.stream == action.stream:
                        node.inbox.append(action.message)
                case CloseStream():
                    node = self._node(action.shard)
                    if node.stream == action.stream:
                        node.stream, node.closed_with = "", action.error
                case ListBackend() | DeleteSegments():
                    self.asked.append(action)
        return actions

    def restart(self) -> None:
        """The coordinator is killed and comes back with what is on disk."""
        self.state = self._restore()
        self.asked.clear()
        for node in self.nodes.values():
            node.stream = ""
            node.inbox.clear()

    def _restore(self) -> State:
        return restore(((k, json.loads(v)) for k, v in self.disk.items()), "disk")

    def tick(self, seconds: float = 1.0) -> list[Action]:
        self.now_s += seconds
        self._ids += 1
        return self.step(Tick(f"spare{self._ids}"))

    def add_tier(self, name: str, capacity: int = 100 * MIB, rank: int = 10, **more: Any) -> None:
        url = "" if "urls" in more else f"redis://{name}"
        spec = TierSpec(name=name, url=url, capacity_bytes=capacity, rank=rank, **more)
        self.step(AddTier(spec))
        self.asked.clear()

    def node(self, name: str, **local: int) -> Node:
        """A node of that name with tiers of its own (bytes each), connected and settled."""
        node = Node(self, name, local)
        self.nodes[name] = node
        node.connect()
        return node

    def start(self, kind: MoveKind, tier: str, **more: Any) -> Job:
        self._ids += 1
        job_id = f"{kind.word}-{self._ids}"
        self.step(StartJob(job_id, kind, tier, **more))
        for node in self.nodes.values():
            node.settle()
        return self.state.jobs[job_id]

    def answer(self, *found: Found, error: VswapError | None = None) -> None:
        """Answers the oldest question to a backend; the nodes take in what follows from it."""
        self.answer_only(*found, error=error)
        for node in self.nodes.values():
            node.settle()

    def answer_only(self, *found: Found, error: VswapError | None = None) -> None:
        asked = self.asked.pop(0)
        if isinstance(asked, ListBackend):
            self.step(Listed(asked.tier, asked.job, found, error))
        else:
            self.step(Swept(asked.shard, asked.tier, error))

    def _node(self, uuid: str) -> Node:
        return next(node for node in self.nodes.values() if node.uuid == uuid)


class Node:
    """What a node keeps of the control plane. It does what it is told, when a test says so."""

    def __init__(self, world: World, name: str, local: dict[str, int]) -> None:
        self.world = world
        self.name = name
        self.uuid = str(uuid5(UUID(CLUSTER), name))
        self.incarnation = 1
        self.generation = 0
        self.closed: set[str] = set()
        """Tiers that its configuration does not let it write."""
        self.cluster = ""
        self.grants: dict[str, int] = {}
        self.pages: dict[str, tuple[int, int]] = {}
        """tier -> (live, stored) bytes, own and cluster's."""
        self.deleting: dict[str, int] = {}
        self.errors: dict[str, str] = {}
        """Why tiers are not available to it."""
        self.redundant: dict[str, dict[str, Any]] = {}
        """tier -> what it tells of degraded segments and servers."""
        self.local = local
        self.ages: list[tuple[str, int, int]] = []
        self.directives: dict[str, coordinator_pb2.Directive] = {}
        self.progress: dict[str, coordinator_pb2.DirectiveProgress] = {}
        self.inbox: list[coordinator_pb2.CoordinatorMessage] = []
        self.stream = ""
        self.closed_with: VswapError | None = None

    # -------------------------------------------------------------- its stream

    def connect(self, *, settle: bool = True, **fields: Any) -> None:
        stream = f"{self.name}-{self.incarnation}-{self.world.now_s}-{id(object())}"
        old, self.stream, self.inbox = self.stream, stream, []
        hello = coordinator_pb2.Hello(
            **{
                "node": self.name,
                "shard_uuid": self.uuid,
                "incarnation": self.incarnation,
                "cluster_uuid": self.cluster,
                "generation": self.generation,
                "grants": self._grants(),
                "tiers": self._usage(),
                **fields,
            }
        )
        try:
            self.world.step(NodeConnected(stream, hello))
        except VswapError:
            self.stream = old
            raise
        if settle:
            self.settle()

    def disconnect(self) -> None:
        stream, self.stream, self.inbox = self.stream, "", []
        self.world.step(NodeDisconnected(self.uuid, stream))

    def restart(self) -> None:
        """kill -9 and back: pages stay, directives and their counters do not."""
        if self.stream:
            self.disconnect()
        self.incarnation += 1
        self.directives.clear()
        self.progress.clear()
        self.connect()

    def say(self, **message: Any) -> None:
        said = coordinator_pb2.NodeMessage(**message)
        self.world.step(NodeSaid(self.uuid, self.stream, said))

    # -------------------------------------------------------------- what it does with messages

    def read(self, count: int | None = None) -> None:
        """Takes in what it was sent (the first ``count``), acknowledging configurations."""
        messages, self.inbox = self.inbox[:count], self.inbox[len(self.inbox[:count]) :]
        for message in messages:
            match message.WhichOneof("message"):
                case "welcome":
                    self.cluster = message.welcome.cluster_uuid
                case "configuration":
                    self.generation = message.configuration.generation
                    self.closed = {
                        tier.spec.name
                        for tier in message.configuration.tiers
                        if tier.state != common_pb2.TIER_STATE_ACTIVE
                    }
                    ack = coordinator_pb2.GenerationAck(generation=self.generation)
                    self.say(generation_ack=ack)
                case "grant":
                    self.grants[message.grant.tier] = message.grant.total_bytes
                case "directive":
                    self.directives[message.directive.job_id] = message.directive
                    self.progress.setdefault(
                        message.directive.job_id,
                        coordinator_pb2.DirectiveProgress(
                            job_id=message.directive.job_id, state="running"
                        ),
                    )
                case "stop_directive":
                    self.directives.pop(message.stop_directive.job_id, None)
                    self.progress.pop(message.stop_directive.job_id, None)

    def report(self) -> None:
        report = coordinator_pb2.Report(
            tiers=self._usage(),
            grants=self._grants(),
            directives=list(self.progress.values()),
            ages=[
                coordinator_pb2.AgeBucket(tier=tier, older_than_s=age, live_bytes=live)
                for tier, age, live in self.ages
            ],
        )
        self.say(report=report)

    def settle(self) -> None:
        """Reads, acknowledges and reports until nothing more comes."""
        while self.stream:
            self.read()
            self.report()
            if not self.inbox:
                return

    def ask(self, tier: str, total_bytes: int) -> int:
        """Asks for a grant in total; gives back if it is less than now. Returns what it has."""
        if total_bytes < self.grants.get(tier, 0):
            self.grants[tier] = total_bytes
        self.say(grant_request=coordinator_pb2.GrantRequest(tier=tier, total_bytes=total_bytes))
        self.read()
        return self.grants.get(tier, 0)

    def fill(self, tier: str, live: int, stored: int | None = None) -> None:
        """Puts that many bytes there, with a grant for them."""
        stored = live if stored is None else stored
        if tier not in self.local and self.grants.get(tier, 0) < stored:
            assert self.ask(tier, stored) >= stored
        self.pages[tier] = (live, stored)
        self.report()

    def work(self, job_id: str, moved: int, *, state: str = "running", to: str = "") -> None:
        """Moves bytes out of the directive's tier and reports it."""
        directive = self.directives[job_id]
        progress = self.progress[job_id]
        live, stored = self.pages.get(directive.tier, (0, 0))
        self.pages[directive.tier] = (live - moved, stored - moved)
        target = directive.destination or to
        if target:
            live, stored = self.pages.get(target, (0, 0))
            self.pages[target] = (live + moved, stored + moved)
        progress.bytes_moved += moved
        progress.pages_moved += moved // 4096
        progress.bytes_left = self.pages[directive.tier][0]
        progress.state = state
        self.report()
        self.read()

    # -------------------------------------------------------------- its words

    def _grants(self) -> list[coordinator_pb2.Grant]:
        return [coordinator_pb2.Grant(tier=t, total_bytes=b) for t, b in self.grants.items()]

    def _usage(self) -> list[common_pb2.TierUsage]:
        names = {*self.local, *self.pages, *self.grants}
        usages = []
        for name in sorted(names):
            live, stored = self.pages.get(name, (0, 0))
            usages.append(
                common_pb2.TierUsage(
                    tier=name,
                    pages=live // 4096,
                    logical_bytes=live * 3,
                    live_bytes=live,
                    stored_bytes=stored,
                    limit_bytes=self.local.get(name, self.grants.get(name, 0)),
                    deleting=self.deleting.get(name, 0),
                    local=name in self.local,
                    state=common_pb2.TIER_STATE_ACTIVE,
                    available=name not in self.errors,
                    error=self.errors.get(name, ""),
                    **self.redundant.get(name, {}),
                )
            )
        return usages
