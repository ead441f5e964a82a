"""An event loop on a virtual clock, and the processes that are simulated on it.

Time stands still while anything can run, and jumps to the next timer when nothing can. Everything
that is drawn comes from one seeded source, so that a seed replays exactly.

A process is a context: all that it starts inherits it. To kill a process is to run nothing of its
context any more; not even a ``finally``. Within a process callbacks keep asyncio's order; which
process runs first in a turn is drawn.
"""

from __future__ import annotations

import asyncio
import heapq
import random
import sys
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context, ContextVar, copy_context
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

_TURN_S = 2e-5
_SPIN_TURNS, _SPIN_S = 200, 1e-3
"""Who polls without pause for so many turns sees time go by faster: a processor has a clock too."""

_process: ContextVar[Process] = ContextVar("process")


class Killed(BaseException):
    """Unwinds what ran when its process was killed between two lines. Nobody sees it."""


class Process:
    """What can be killed and paused as one. Its memory dies with it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.paused = False
        self.context: Context = copy_context()
        self.context.run(_process.set, self)
        self.on_end: list[Callable[[], None]] = []
        """Called when it ends: what others notice of it."""
        self.fuse: Fuse | None = None
        self.backlog: deque[asyncio.Handle] = deque()
        self.grave: list[object] = []
        """Tasks that will never go on: kept, lest their clean-up runs."""

    def __repr__(self) -> str:
        return f"<process {self.name}{'' if self.alive else ' (dead)'}>"

    @staticmethod
    def current() -> Process:
        return _process.get()

    def kill(self) -> None:
        """At once. What it was about to run will not run."""
        if not self.alive:
            return
        self.alive = False
        loop = asyncio.get_running_loop()
        self.grave += [
            task for task in asyncio.all_tasks(loop)
            if isinstance(task, SimTask) and task.process is self
        ]  # fmt: skip
        for notice in list(self.on_end):
            notice()


class Fuse:
    """Kills a process between two lines of its own code: the n-th that it runs from now on."""

    def __init__(self, process: Process, lines: int, paths: tuple[str, ...]) -> None:
        # The collector does not see what traced frames refer to: worlds would never go.
        self._process = weakref.ref(process)
        self._lines = lines
        self._paths = paths
        self.where = ""

    def run(self, handle: asyncio.Handle) -> None:
        before = sys.gettrace()
        sys.settrace(self._call)
        try:
            handle._run()
        finally:
            sys.settrace(before)

    def _call(self, frame: FrameType, event: str, arg: object) -> Any:
        return self._line if frame.f_code.co_filename.startswith(self._paths) else None

    def _line(self, frame: FrameType, event: str, arg: object) -> Any:
        process = self._process()
        if event == "line" and process is not None and process.alive:
            self._lines -= 1
            if self._lines < 0:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                process.kill()
                raise Killed
        return self._line


class SimTask(asyncio.Task[Any]):
    """A task whose hash is its number: sets of tasks have the same order in every run."""

    def __init__(self, coro: Generator[Any, None, Any], loop: VirtualLoop, **more: Any) -> None:
        loop.tasks_made += 1
        self._number = loop.tasks_made
        context = more.get("context")
        self.process = _process.get(None) if context is None else context.get(_process)
        super().__init__(coro, loop=loop, **more)

    def __hash__(self) -> int:
        return self._number


class VirtualLoop(asyncio.BaseEventLoop):
    """Runs on its own; ``time`` is virtual seconds."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self._rng = rng
        self._now = 1000.0
        self._spins = 0
        self.tasks_made = 0
        self.turns = 0
        self.unexpected: list[str] = []
        """Defects that nobody awaited."""
        self._ready: deque[asyncio.Handle]
        self._scheduled: list[asyncio.TimerHandle]
        self.set_task_factory(lambda loop, coro, **more: SimTask(coro, self, **more))
        self.set_exception_handler(self._note)

    def time(self) -> float:
        return self._now

    def start(self, process: Process, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Runs it as a task of the process."""
        return self.create_task(work, context=process.context.copy())

    def resume(self, process: Process) -> None:
        process.paused = False
        self._ready.extend(process.backlog)
        process.backlog.clear()

    def _note(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, Killed):
            self.unexpected.append(f"{context.get('message')}: {error!r}")

    def _run_once(self) -> None:
        """One turn: everything that is ready now."""
        self.turns += 1
        scheduled = self._scheduled
        if self._ready:
            self._spins += 1
            self._now += _TURN_S if self._spins < _SPIN_TURNS else _SPIN_S
        else:
            while scheduled and scheduled[0].cancelled():
                heapq.heappop(scheduled)
            if not scheduled:
                raise RuntimeError("nothing can ever happen any more")
            self._now = max(self._now, scheduled[0].when())
        while scheduled and scheduled[0].when() <= self._now:
            self._spins = 0
            self._ready.append(heapq.heappop(scheduled))
        turn = list(self._ready)
        self._ready.clear()
        if len(turn) > 1 and self._rng.random() < 0.5:
            first: dict[Process | None, float] = {}
            turn.sort(
                key=lambda h: first.setdefault(h._context.get(_process), self._rng.random())  # type: ignore[attr-defined]
            )
        for handle in turn:
            if handle.cancelled():
                continue
            process: Process | None = handle._context.get(_process)  # type: ignore[attr-defined]
            if process is None:
                handle._run()
            elif not process.alive:
                process.grave.append(handle)
            elif process.paused:
                process.backlog.append(handle)
            elif process.fuse is not None:
                process.fuse.run(handle)
            else:
                handle._run()

    def _process_events(self, events: object) -> None:
        """There is nothing outside."""

    def _check_closed(self) -> None:
        """What still unwinds when all is over may do as if it were not."""
