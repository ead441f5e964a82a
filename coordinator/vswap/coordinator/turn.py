"""One turn of the plan: the state, the time, and what is to be done afterwards."""

from __future__ import annotations

from vswap.coordinator import documents
from vswap.coordinator.events import Action, CloseStream, Notify, Now, Persist, Send
from vswap.coordinator.state import Hold, Job, Key, Session, State
from vswap.v1 import common_pb2, coordinator_pb2
from vswap.wire.errors import VswapError


class Turn:
    """Handed from function to function while one event is worked through."""

    def __init__(self, state: State, now: Now) -> None:
        self.state = state
        self.now_s = now.mono_s
        self.wall_s = now.wall_s
        self._actions: list[Action] = []
        self._dirty: dict[Key, None] = {}
        self._jobs: dict[str, None] = {}

    def finish(self) -> list[Action]:
        """All actions, with what must be on disk before them in front."""
        actions = [*self._actions, *map(Notify, self._jobs)]
        if not self._dirty:
            return actions
        bodies = tuple((key, documents.document(self.state, key)) for key in self._dirty)
        return [Persist(bodies), *actions]

    def save(self, *key: str) -> None:
        """Marks a document as changed."""
        self._dirty[key] = None

    def do(self, action: Action) -> None:
        self._actions.append(action)

    def send(self, uuid: str, message: coordinator_pb2.CoordinatorMessage) -> None:
        """Dropped where the shard has no stream: everything is said again at its next hello."""
        session = self.state.sessions.get(uuid)
        if session is not None and session.open:
            self.do(Send(uuid, session.stream, message))

    def send_grant(self, uuid: str, tier: str) -> None:
        grant = grant_message(tier, self.state.hold(uuid, tier).granted)
        self.send(uuid, coordinator_pb2.CoordinatorMessage(grant=grant))

    def set_hold(self, uuid: str, tier: str, granted: int, held: int) -> None:
        """Changes a hold; ``held`` is at least ``granted``."""
        new = Hold(granted, max(held, granted))
        if new == self.state.hold(uuid, tier):
            return
        if new == Hold():
            del self.state.holds[uuid, tier]
        else:
            self.state.holds[uuid, tier] = new
            record = self.state.tiers.get(tier)
            if record is not None and not record.used:
                record.used = True
                self.save("tier", tier)
        self.save("hold", uuid, tier)

    def hang_up(self, uuid: str, session: Session, error: VswapError | None) -> None:
        """Ends a stream from this side."""
        if session.open:
            session.open = False
            self.do(CloseStream(uuid, session.stream, error))

    def new_generation(self) -> int:
        """The tiers changed: tells every node. Call it after the change."""
        self.state.generation += 1
        self.save("generation")
        for uuid in self.state.sessions:
            self.send(uuid, configuration(self.state))
        return self.state.generation

    def notify(self, job: Job) -> None:
        """Wakes those who watch the job, once this turn is over."""
        self._jobs[job.id] = None

    def save_job(self, job: Job) -> None:
        self.save("job", job.id)
        self.notify(job)


def grant_message(tier: str, total_bytes: int) -> coordinator_pb2.Grant:
    return coordinator_pb2.Grant(tier=tier, total_bytes=total_bytes)


def configuration(state: State) -> coordinator_pb2.CoordinatorMessage:
    """The cluster's tiers, whole."""
    tiers = [
        common_pb2.Tier(spec=tier.spec.to_proto(), state=tier.state) for tier in state.ranked()
    ]
    message = coordinator_pb2.Configuration(generation=state.generation, tiers=tiers)
    return coordinator_pb2.CoordinatorMessage(configuration=message)
