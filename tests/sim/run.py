"""One run of one seed."""

from __future__ import annotations

import asyncio
import gc
import random
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import structlog
from sim.disk import DiskClient
from sim.history import Wrong
from sim.life import Client, Misfortune, Operator
from sim.loop import Process, VirtualLoop
from sim.verify import check_at_rest, check_now
from sim.world import World


@dataclass
class Outcome:
    """What became of a seed; ``problem`` is empty where every promise was kept."""

    seed: int
    scenario: str = ""
    problem: str = ""
    virtual_s: float = 0.0
    trace: int = 0
    """A number that two runs of the same seed share."""
    counts: Counter[str] = field(default_factory=Counter)


_FROZEN_S = 60
"""Of the processor's time: no seed takes nearly as much."""

gc.freeze()
# Tasks that a kill kept from ever beginning.
warnings.filterwarnings("ignore", "coroutine .* was never awaited")


def run_seed(seed: int, *, verbose: bool = False) -> Outcome:
    """Runs a seed in this thread. Never raises for what it finds."""
    outcome = Outcome(seed)
    rng = random.Random(seed)
    root = Path(tempfile.mkdtemp(prefix="vswap-sim-", dir="/dev/shm"))
    loop = VirtualLoop(random.Random(rng.getrandbits(64)))
    _listen(loop, verbose)
    # A collection in the midst of a run would depend on the runs before it.
    gc.disable()
    signal.signal(signal.SIGPROF, _frozen)
    signal.setitimer(signal.ITIMER_PROF, _FROZEN_S)
    # Tasks of the dead end here, and must not be heard.
    sys.unraisablehook = lambda _: None
    try:
        asyncio.set_event_loop(loop)
        people = Process("people")
        loop.run_until_complete(loop.start(people, _run(loop, rng, root, outcome)))
    except Exception as error:
        outcome.problem = f"{type(error).__name__}: {error}"
        if verbose and not isinstance(error, Wrong):
            raise
    finally:
        outcome.virtual_s = loop.time() - 1000
        outcome.trace = hash((loop.turns, loop.tasks_made, loop.time())) & (1 << 64) - 1
        for task in asyncio.all_tasks(loop):
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        structlog.configure(processors=[_drop])
        loop.close()
        asyncio.set_event_loop(None)
        shutil.rmtree(root)
        gc.collect()
        signal.setitimer(signal.ITIMER_PROF, 0)
    return outcome


async def _run(loop: VirtualLoop, rng: random.Random, root: Path, outcome: Outcome) -> None:
    world = World(loop, rng, root)
    scenario = world.scenario
    outcome.scenario = str(scenario)
    for machine in world.machines:
        machine.start()
    misfortune = Misfortune(world, rng.getrandbits(64))
    operator = Operator(world, rng.getrandbits(64))
    until_s = loop.time() + 1 + scenario.busy_s
    clients: list[Client] = []
    for node in world.nodes:
        kinds = [Client] * scenario.clients + [DiskClient] * scenario.disk_clients
        for kind in kinds:
            clients.append(kind(world, node, rng.getrandbits(64)))
            clients[-1].begin(until_s)
    fate = [
        loop.start(world.people, work)
        for work in (
            misfortune.run(),
            misfortune.lose(),
            misfortune.keep_starting(),
            operator.run(),
        )
    ]
    working = [client.task for client in clients if client.task is not None]
    while not all(task.done() for task in working):
        await asyncio.sleep(0.25)
        check_now(world)
    await asyncio.gather(*working)
    leaving = None
    if scenario.leaves and len(world.members) > 1:
        node = world.members[-1]
        its = [client for client in clients if client.node is node]
        leaving = loop.start(world.people, operator.dismiss(node, its))
        await asyncio.wait([leaving], timeout=5.0)
    for task in fate:
        task.cancel()
    await asyncio.gather(*fate, return_exceptions=True)
    await check_at_rest(world, leaving, operator.bury)
    counts = outcome.counts
    histories = [*world.histories.values(), *world.disks.values()]
    counts["reads checked"] = sum(history.checked for history in histories)
    counts["reads of disks checked"] = sum(history.checked for history in world.disks.values())
    counts["commands"] = operator.commands
    counts["commands accepted"] = operator.accepted
    counts["lives"] = sum(machine.lives for machine in world.machines)
    counts["nodes retired"] = len(world.nodes) - len(world.members)
    counts["pages missed"] = sum(history.missing for history in histories)
    for machine in (world.coordinator, *world.nodes):
        counts.update(f"killed in {where}" for where in machine.killed_at)
    assert world.coordinator.runner is not None
    for job in world.coordinator.runner.state.jobs.values():
        counts[f"jobs {job.kind.word} {job.state.word}"] += 1
    for server in world.servers.values():
        counts.update({f"injected {name}": n for name, n in server.injected.items()})
    for node in world.nodes:
        if node.ready is not None:
            counts.update(node.ready.counters())


def _frozen(number: int, frame: FrameType | None) -> None:
    """Virtual time stands still: some loop awaits nothing, or nothing that takes time."""
    raise Wrong("frozen at " + "".join(traceback.format_stack(frame, 3)))


def _drop(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    raise structlog.DropEvent


def _listen(loop: VirtualLoop, verbose: bool) -> None:
    """Defects that production code logs and survives are failures here."""

    def note(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        info = event.get("exc_info")
        if info:
            error = info if isinstance(info, BaseException) else sys.exc_info()[1]
            loop.unexpected.append(f"{event['event']}: {error!r}")
        if not verbose:
            raise structlog.DropEvent
        event["at"] = round(loop.time() - 1000, 4)
        event["who"] = Process.current().name
        return event

    structlog.configure(
        processors=[note, structlog.processors.format_exc_info,
                    structlog.processors.KeyValueRenderer(key_order=["at", "who", "event"])],
        wrapper_class=structlog.make_filtering_bound_logger(20 if verbose else 40),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )  # fmt: skip
