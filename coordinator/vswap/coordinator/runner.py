"""The thin edge of the plan: feeds it events, carries out what it wants.

Everything here runs on one event loop; between two awaits the state is consistent. An event that
fails unexpectedly, or whose changes cannot be written, is undone by reading the state back from the
store: what memory says beyond that is discarded and rebuilt from the nodes' next hellos, exactly as
after a restart.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import structlog

from vswap.coordinator import plan
from vswap.coordinator.backends import Backends
from vswap.coordinator.balance import Policy
from vswap.coordinator.events import (
    Action,
    CloseStream,
    DeleteSegments,
    Event,
    ListBackend,
    Listed,
    NodeConnected,
    NodeDisconnected,
    NodeSaid,
    Notify,
    Now,
    Persist,
    Send,
    Swept,
    Tick,
)
from vswap.coordinator.state import JobState, State
from vswap.coordinator.store import Store
from vswap.v1 import coordinator_pb2
from vswap.wire.errors import InternalError, StateInvalid, Unreachable, VswapError

T = TypeVar("T")

_MOST_QUEUED = 1000

_log = structlog.get_logger("vswap.coordinator")


class Link:
    """One node's stream, as far as the plan can write to it."""

    def __init__(self, stream: str, shard: str) -> None:
        self.stream = stream
        self.shard = shard
        self._queue: asyncio.Queue[coordinator_pb2.CoordinatorMessage | None] = asyncio.Queue()
        self._error: VswapError | None = None
        self._closed = False

    def put(self, message: coordinator_pb2.CoordinatorMessage) -> None:
        """Queues it. A node that does not take what it is told is cut off: it comes back, and is
        told what counts by then."""
        if self._closed:
            return
        if self._queue.qsize() >= _MOST_QUEUED:
            self._queue = asyncio.Queue()
            self.close(Unreachable(f"{_MOST_QUEUED} messages were not taken"))
            return
        self._queue.put_nowait(message)

    def close(self, error: VswapError | None) -> None:
        """Ends the stream after what is queued."""
        if not self._closed:
            self._closed, self._error = True, error
            self._queue.put_nowait(None)

    async def get(self) -> coordinator_pb2.CoordinatorMessage | None:
        """The next message; None at a good end. Raises the error that ends the stream."""
        message = await self._queue.get()
        if message is None and self._error is not None:
            raise self._error
        return message


class Runner:
    """``clock`` and ``new_id`` (short, unique) are handed in, so that a test can run on its own."""

    def __init__(
        self,
        store: Store,
        backends: Backends,
        *,
        clock: Callable[[], Now],
        new_id: Callable[[], str],
        lease_s: float,
        policy: Policy,
    ) -> None:
        self._store = store
        self._policy = policy
        self._lease_s = lease_s
        self.backends = backends
        self.clock = clock
        self.new_id = new_id
        self.state = self._load()
        self._links: dict[str, Link] = {}
        self._streams = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._sweeps: dict[str, set[asyncio.Task[tuple[int, int] | None]]] = {}
        self._told: dict[str, JobState] = {}
        self._changed = asyncio.Event()

    # -------------------------------------------------------------- events

    def apply(self, event: Event) -> None:
        """Works an event in. Raises what the plan raises: then nothing changed."""
        now = self.clock()
        try:
            _, actions = plan.step(self.state, event, now, self._policy)
            for action in actions:
                self._perform(action)
        except VswapError as error:
            if isinstance(error, StateInvalid):
                self._start_over(error)
            raise
        except Exception as error:
            self._start_over(error)
            raise InternalError(
                f"{type(event).__name__} failed: {type(error).__name__}: {error}"
            ) from error

    def connect(self, hello: coordinator_pb2.Hello) -> Link:
        """A node's stream begins. Raises why it may not."""
        self._streams += 1
        link = Link(str(self._streams), hello.shard_uuid)
        self._links[link.stream] = link
        try:
            self.apply(NodeConnected(link.stream, hello))
        except BaseException:
            del self._links[link.stream]
            raise
        _log.info("node connected", node=hello.node, incarnation=hello.incarnation)
        return link

    def receive(self, link: Link, message: coordinator_pb2.NodeMessage) -> None:
        if link.stream in self._links:
            self.apply(NodeSaid(link.shard, link.stream, message))
            if message.HasField("goodbye"):
                _log.info("node left for good", node=self.state.name(link.shard))

    def disconnect(self, link: Link) -> None:
        if self._links.pop(link.stream, None) is not None:
            self.apply(NodeDisconnected(link.shard, link.stream))
            _log.info("node disconnected", node=self.state.name(link.shard))

    async def run(self) -> None:
        """Lets time pass, for ever."""
        period_s = min(1.0, self._lease_s / 4)
        while True:
            await asyncio.sleep(period_s)
            try:
                self.apply(Tick(self.new_id()))
            except VswapError as error:
                _log.error("the plan stumbled", reason=error.message)

    async def changed(self, timeout_s: float) -> None:
        """Returns when some job changed, at the latest after ``timeout_s``."""
        event = self._changed
        try:
            async with asyncio.timeout(timeout_s):
                await event.wait()
        except TimeoutError:
            return

    async def swept(self, shard: str, timeout_s: float) -> tuple[int, int]:
        """(segments, bytes) that the sweeps now under way for a shard delete within that time."""
        tasks = set(self._sweeps.get(shard, ()))
        segments = size = 0
        if tasks:
            done, _ = await asyncio.wait(tasks, timeout=timeout_s)
            for task in done:
                result = task.result()
                if result is not None:
                    segments, size = segments + result[0], size + result[1]
        return segments, size

    async def close(self) -> None:
        """Ends all streams and work; the store stays open."""
        for link in self._links.values():
            link.close(None)
        tasks = [*self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.backends.close()

    # -------------------------------------------------------------- actions

    def _perform(self, action: Action) -> None:
        match action:
            case Persist():
                self._store.write(action.documents)
            case Send():
                link = self._links.get(action.stream)
                if link is not None:
                    link.put(action.message)
            case CloseStream():
                link = self._links.pop(action.stream, None)
                if link is not None:
                    link.close(action.error)
            case ListBackend():
                self._spawn(self._list(action))
            case DeleteSegments():
                task = self._spawn(self._sweep(action))
                running = self._sweeps.setdefault(action.shard, set())
                running.add(task)
                task.add_done_callback(running.discard)
            case Notify():
                self._tell(action.job)
                self._changed.set()
                self._changed = asyncio.Event()

    async def _list(self, action: ListBackend) -> None:
        tier = self.state.tiers.get(action.tier)
        if tier is None:
            return
        try:
            # A drain asks, after which nobody looks at the tier again.
            found = await self.backends.list(
                tier.spec, action.prefix, every_server=bool(action.job)
            )
        except VswapError as error:
            _log.warning("cannot list a tier", tier=action.tier, reason=error.message)
            self.apply(Listed(action.tier, action.job, (), error))
        else:
            self.apply(Listed(action.tier, action.job, found))

    async def _sweep(self, action: DeleteSegments) -> tuple[int, int] | None:
        tier = self.state.tiers.get(action.tier)
        if tier is None:
            return None
        prefix = f"vswap/{self.state.cluster}/{action.shard}/"
        name = self.state.name(action.shard)
        try:
            segments, size = await self.backends.delete(tier.spec, prefix)
        except VswapError as error:
            _log.warning(
                "cannot delete a forgotten node's segments yet",
                tier=action.tier,
                node=name,
                reason=error.message,
            )
            self.apply(Swept(action.shard, action.tier, error))
            return None
        _log.info("swept", tier=action.tier, node=name, segments=segments, bytes=size)
        self.apply(Swept(action.shard, action.tier))
        return segments, size

    # -------------------------------------------------------------- inside

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.error("a task failed unexpectedly", exc_info=task.exception())

    def _tell(self, job_id: str) -> None:
        """Logs a job's state where it is another than before."""
        job = self.state.jobs.get(job_id)
        if job is None or self._told.get(job_id) == job.state:
            return
        self._told[job_id] = job.state
        if job.state.ended:
            del self._told[job_id]
        _log.info("job", job=job.title, state=job.state.word, reason=job.reason)

    def _start_over(self, error: Exception) -> None:
        _log.error("reading the state back from disk", exc_info=error)
        links = list(self._links.values())
        self._links.clear()
        self.state = self._load()
        for link in links:
            link.close(None)

    def _load(self) -> State:
        state = self._store.load()
        state.lease_s = self._lease_s
        return state
