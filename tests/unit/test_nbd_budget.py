"""What the requests of all NBD clients may hold: who finds it spent is not read from."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, cast

from vswap.node.frontends.nbd.budget import Budget
from vswap.node.frontends.nbd.connection import Connection


class Wire:
    """A transport that notes whether it is read from."""

    def __init__(self) -> None:
        self.reading = True

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


def connected(budget: Budget) -> tuple[Connection, Wire]:
    unused: Any = None
    connection, wire = Connection(unused, unused, budget, Counter(), unused), Wire()
    connection._transport = cast(asyncio.Transport, wire)
    return connection, wire


async def turns() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def test_who_holds_the_budget_is_not_read_from_and_cannot_stop_the_others() -> None:
    budget, gate = Budget(100), asyncio.Event()
    greedy, wire = connected(budget)
    modest, other_wire = connected(budget)

    async def work() -> None:
        await gate.wait()

    greedy.spawn(work(), 60)
    greedy.pump()
    assert wire.reading
    greedy.spawn(work(), 60)
    greedy.pump()
    modest.pump()
    # Who has nothing under way may go on, with one request at a time.
    assert (wire.reading, other_wire.reading) == (False, True)
    modest.spawn(work(), 10)
    modest.pump()
    assert not other_wire.reading
    assert budget.held_bytes == 130
    gate.set()
    await turns()
    assert budget.held_bytes == 0
    assert wire.reading
    assert other_wire.reading


async def test_who_does_not_take_replies_is_not_read_from() -> None:
    connection, wire = connected(Budget(100))
    connection.pause_writing()
    assert not wire.reading
    connection.resume_writing()
    assert wire.reading
