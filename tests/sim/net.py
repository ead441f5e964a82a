"""The network: messages take time, get lost, and do not pass between two who are cut off.

A call is like one of gRPC: it is refused where nobody listens, ends as unknown where the reply is
lost, late, or the other side dies, and is cancelled over there when its deadline has passed.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from sim.loop import Process, VirtualLoop

from vswap.wire.errors import InternalError, OutcomeUnknown, Unreachable, VswapError

T = TypeVar("T")


@dataclass(slots=True)
class Weather:
    """How the network is; changed while it runs."""

    loss: float = 0.0
    """Of calls: the request or the reply is lost."""
    slow: float = 0.0
    """Of messages: takes a hundred times as long."""


class Net:
    """Who talks to whom, by name of process."""

    def __init__(self, loop: VirtualLoop, rng: random.Random) -> None:
        self.loop = loop
        self.rng = rng
        self.weather = Weather()
        self._cut: set[frozenset[str]] = set()

    def cut(self, one: str, other: str) -> None:
        self._cut.add(frozenset((one, other)))

    def mend(self, one: str, other: str) -> None:
        self._cut.discard(frozenset((one, other)))

    def mend_all(self) -> None:
        self._cut.clear()

    def is_cut(self, one: Process, other: Process) -> bool:
        return bool(self._cut) and frozenset((one.name, other.name)) in self._cut

    def delay_s(self) -> float:
        delay = 0.0001 + self.rng.expovariate(2000)
        return delay * 100 if self.rng.random() < self.weather.slow else delay

    def later(self, process: Process, delay_s: float, what: Callable[..., Any], *args: Any) -> None:
        """Calls it in a process, unless that is dead by then."""
        self.loop.call_at(self.loop.time() + delay_s, what, *args, context=process.context)

    async def call(
        self, to: Process, work: Callable[[], Awaitable[T]], *, timeout_s: float,
        on_settled: Callable[[], None] = lambda: None,
    ) -> T:  # fmt: skip
        """Runs ``work`` over there. Raises what it raises, Unreachable, or OutcomeUnknown.

        ``on_settled`` is called, once, when nothing of the call can happen any more.
        """
        answer: T = await Call(self, to, work, on_settled).result(timeout_s)
        return answer


class Call:
    """One call under way."""

    def __init__(
        self, net: Net, to: Process, work: Callable[[], Awaitable[Any]],
        on_settled: Callable[[], None],
    ) -> None:  # fmt: skip
        self._net = net
        self._from = Process.current()
        self._to = to
        self._work = work
        self._on_settled = on_settled
        self._settled = False
        self._given_up = False
        self._task: asyncio.Task[Any] | None = None
        self._answer: asyncio.Future[Any] = net.loop.create_future()

    async def result(self, timeout_s: float) -> Any:
        net = self._net
        lost = net.rng.random() < net.weather.loss / 2
        if lost or net.is_cut(self._from, self._to):
            self._settle()
        elif self._to.alive:
            net.later(self._to, net.delay_s(), self._arrive)
            self._to.on_end.append(self._died)
        else:
            self._settle()
            net.later(self._from, net.delay_s(), self._fail, Unreachable("nobody listens"))
        try:
            async with asyncio.timeout(timeout_s):
                return await self._answer
        except TimeoutError:
            raise OutcomeUnknown("no answer in time") from None
        finally:
            self._given_up = True
            if not self._settled and self._to.alive:
                net.later(self._to, net.delay_s(), self._cancel)

    def _arrive(self) -> None:
        if self._given_up:
            self._settle()
            return
        self._task = self._net.loop.create_task(self._serve())
        self._task.add_done_callback(lambda _: self._settle())

    async def _serve(self) -> None:
        outcome: Any = None
        error: VswapError | None = None
        try:
            outcome = await self._work()
        except VswapError as raised:
            error = raised
        except Exception as raised:
            self._net.loop.unexpected.append(f"a call failed: {raised!r}")
            error = InternalError(repr(raised))
        self._settle()
        net = self._net
        if net.rng.random() < net.weather.loss / 2 or net.is_cut(self._from, self._to):
            return
        if error is not None:
            net.later(self._from, net.delay_s(), self._fail, error)
        else:
            net.later(self._from, net.delay_s(), self._succeed, outcome)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()
        else:
            self._settle()

    def _died(self) -> None:
        """The other side is dead: its system says so, if it can be heard."""
        self._settle()
        if not self._answer.done() and not self._net.is_cut(self._from, self._to):
            error = OutcomeUnknown("the connection broke")
            self._net.later(self._from, self._net.delay_s(), self._fail, error)

    def _settle(self) -> None:
        if not self._settled:
            self._settled = True
            if self._died in self._to.on_end:
                self._to.on_end.remove(self._died)
            self._on_settled()

    def _succeed(self, outcome: Any) -> None:
        if not self._answer.done():
            self._answer.set_result(outcome)

    def _fail(self, error: VswapError) -> None:
        if not self._answer.done():
            self._answer.set_exception(error)
