"""How the demo tells what happens: acts and lines, and a table that lives while something runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vswap.cli import output, units
from vswap.cli.demo.plan import OBJECTS, RAM, REDIS_A, REDIS_B, ZRAM

T = TypeVar("T")
Tiers = dict[str, dict[str, int]]

WHERE = {
    RAM: "memory of the nodes, as it is",
    ZRAM: "memory of the nodes, compressed",
    REDIS_A: "a Redis server",
    REDIS_B: "another Redis server",
    OBJECTS: "files on disk",
    "fill": "nowhere: the slot says it all",
}

_BAR = 24
_WIDE = 110
_LINE_EVERY_S = 3.0
_LIVE_EVERY_S = 0.25


class Story:
    """Tells on one console; without a terminal it is plain lines."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._begin_s = time.monotonic()
        self._acts = 0

    def act(self, title: str) -> None:
        self._acts += 1
        at = units.duration(time.monotonic() - self._begin_s)
        self._console.print()
        self._console.print(Text(f"{self._acts}. {title}", style="bold"), Text(f"({at})", "dim"))

    def line(self, text: str, style: str = "") -> None:
        self._console.print(Text(f"   {text}", style=style))

    def table(self, tiers: Tiers) -> None:
        self._console.print(self._table(tiers))

    def _table(self, tiers: Tiers) -> Table:
        return _indented(tier_table(tiers, where=self._console.width >= _WIDE))

    async def during(
        self, work: Awaitable[T], look: Callable[[], Awaitable[tuple[str, Tiers]]]
    ) -> T:
        """Await ``work`` and meanwhile show what ``look`` sees: a line and the tiers."""
        task = asyncio.ensure_future(work)
        try:
            if self._console.is_terminal:
                await self._live(task, look)
            else:
                await self._lines(task, look)
            return await task
        finally:
            task.cancel()

    async def _live(
        self,
        task: asyncio.Future[T],
        look: Callable[[], Awaitable[tuple[str, Tiers]]],
    ) -> None:
        with Live(console=self._console, transient=True, auto_refresh=False) as live:
            while not await _ended(task, _LIVE_EVERY_S):
                line, tiers = await look()
                live.update(Group(Text(f"   {line}"), self._table(tiers)), refresh=True)

    async def _lines(
        self,
        task: asyncio.Future[T],
        look: Callable[[], Awaitable[tuple[str, Tiers]]],
    ) -> None:
        while not await _ended(task, _LINE_EVERY_S):
            line, tiers = await look()
            shares = ", ".join(
                f"{name} {units.percent(share)}" for name, share in page_shares(tiers).items()
            )
            self.line(f"{line} ({shares})")


def page_shares(tiers: Tiers) -> dict[str, float]:
    """Share of all pages per tier."""
    pages = sum(tier["pages"] for tier in tiers.values())
    return {name: tier["pages"] / max(1, pages) for name, tier in tiers.items()}


def tier_table(tiers: Tiers, *, where: bool) -> Table:
    """One row per tier with a bar for its share of the pages; ``where`` it is, if there is room."""
    shares = page_shares(tiers)
    rows = [
        (
            name,
            units.count(tier["pages"]),
            "█" * round(_BAR * shares[name]) + "·" * (_BAR - round(_BAR * shares[name])),
            units.percent(shares[name]),
            units.size(tier["logical_bytes"]),
            units.size(tier["stored_bytes"]),
            *([WHERE.get(name, "")] if where else []),
        )
        for name, tier in tiers.items()
    ]
    columns = ["TIER", ">PAGES", "", ">", ">PAGE BYTES", ">STORED AS"]
    return output.table([*columns, "WHERE"] if where else columns, rows)


def _indented(table: Table) -> Table:
    frame = Table.grid(padding=(0, 0, 0, 3))
    frame.add_column(width=0)
    frame.add_column()
    frame.add_row("", table)
    return frame


async def _ended(task: asyncio.Future[T], within_s: float) -> bool:
    done, _ = await asyncio.wait([task], timeout=within_s)
    return bool(done)
