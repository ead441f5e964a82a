"""Runs a load in one or more processes of its own and adds up what they measured.

One process drives some tens of thousands of pages a second; where the nodes do more, several are
needed to load them. Clients are dealt out to the processes in turn, phases begin together.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import uvloop
from numpy.typing import NDArray

from vswap.loadgen.meter import Meter
from vswap.loadgen.run import LoadRun, LoadSpec
from vswap.wire.errors import InternalError, VswapError

_TICK_S = 0.5


@dataclass(frozen=True, slots=True)
class Phase:
    """What one phase came to, over all processes. ``failures`` are the first of each client."""

    meter: Meter
    held_pages: int
    failures: list[VswapError]


class Fleet:
    """Load processes. Use as a context manager; one phase at a time."""

    def __init__(
        self,
        processes: int,
        addresses: Sequence[str],
        space: str,
        spec: LoadSpec,
        base: NDArray[np.uint8],
        report: Callable[[str], None],
    ) -> None:
        self._processes = max(1, min(processes, spec.clients))
        self._task = (list(addresses), space, spec)
        self._base = base
        self._report = report
        self._workers: list[tuple[SpawnProcess, Connection]] = []

    def __enter__(self) -> Fleet:
        context = multiprocessing.get_context("spawn")
        with tempfile.TemporaryDirectory(prefix="vswap-load-") as directory:
            path = Path(directory) / "base.npy"
            np.save(path, self._base)
            try:
                for index in range(self._processes):
                    ours, theirs = context.Pipe()
                    only = range(index, self._task[2].clients, self._processes)
                    process = context.Process(
                        target=_work, args=(theirs, path, *self._task, list(only)), daemon=True
                    )
                    process.start()
                    theirs.close()
                    self._workers.append((process, ours))
                self._gather(lambda pages, seconds: None)
            except BaseException:
                self._stop()
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def phase(
        self,
        name: str,
        tick: Callable[[Meter, float], None] = lambda so_far, seconds: None,
        **bounds: Any,
    ) -> Phase:
        """Run a phase of `LoadRun` everywhere; ``tick`` hears of it a few times a second."""
        for _, pipe in self._workers:
            pipe.send((name, bounds))
        return self._gather(tick)

    def _gather(self, tick: Callable[[Meter, float], None]) -> Phase:
        """Collect one "done" of every worker; the first error of any ends all."""
        begin_s = time.monotonic()
        total, held, failures = Meter(), 0, list[VswapError]()
        so_far: dict[Connection, Meter] = {}
        waiting = [pipe for _, pipe in self._workers]
        while waiting:
            for pipe in wait(waiting, timeout=_TICK_S):
                assert isinstance(pipe, Connection)
                try:
                    kind, value = pipe.recv()
                except EOFError:
                    raise InternalError("a load process ended before its work") from None
                if kind == "line":
                    self._report(value)
                elif kind == "now":
                    so_far[pipe] = value
                elif kind == "error":
                    raise value
                else:
                    waiting.remove(pipe)
                    total.merge(value["meter"])
                    held += value["held_pages"]
                    failures += value["failures"]
            tick(_sum(so_far.values()), time.monotonic() - begin_s)
        return Phase(total, held, failures)

    def _stop(self) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.terminate()
        for process, _ in self._workers:
            process.join(timeout=5)
        self._workers.clear()


def _sum(meters: Any) -> Meter:
    total = Meter()
    for meter in meters:
        for name in Meter.COUNTERS:
            setattr(total, name, getattr(total, name) + meter[name])
    return total


# ------------------------------------------------------------------ in the load process


def _work(
    pipe: Connection,
    path: Path,
    addresses: list[str],
    space: str,
    spec: LoadSpec,
    only: list[int],
) -> None:
    # Ctrl-C goes to the whole group; the parent ends its load processes itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError, BrokenPipeError):
        try:
            uvloop.run(
                _serve(
                    pipe,
                    LoadRun(
                        addresses,
                        space,
                        spec,
                        np.load(path),
                        report=lambda line: pipe.send(("line", line)),
                        only=only,
                    ),
                )
            )
        except VswapError as error:
            pipe.send(("error", error))


async def _serve(pipe: Connection, run: LoadRun) -> None:
    async with run:
        pipe.send(("done", _result(Meter(), run)))
        while True:
            name, bounds = await asyncio.to_thread(pipe.recv)
            ticking = asyncio.create_task(_tick(pipe, run))
            try:
                meter = await getattr(run, name)(**bounds)
            finally:
                ticking.cancel()
            pipe.send(("done", _result(meter, run)))


async def _tick(pipe: Connection, run: LoadRun) -> None:
    while True:
        await asyncio.sleep(_TICK_S)
        now = run.now
        pipe.send(("now", {name: getattr(now, name) for name in Meter.COUNTERS}))


def _result(meter: Meter, run: LoadRun) -> dict[str, Any]:
    failures = run.failures
    return {"meter": meter.encode(), "held_pages": run.held_pages(), "failures": failures}
