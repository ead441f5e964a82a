"""A flood of stores and loads, in a process of its own: far more at once than a node takes."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from vswap.client import AsyncClient
from vswap.wire.errors import VswapError

PAGES = 2048
"""In one batch: as large as may be."""


def launch(
    address: str, space: str, first_slot: int, workers: int, seconds: float
) -> subprocess.Popen[str]:
    """Prints what :func:`_flood` finds."""
    return subprocess.Popen(
        [sys.executable, __file__, address, space, str(first_slot), str(workers), str(seconds)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def pages_of(slot: int, turn: int) -> NDArray[np.uint8]:
    """A batch that tells its place and time in every page, half of it incompressible."""
    pages = np.random.default_rng([slot, turn]).integers(0, 256, (PAGES, 4096), np.uint8)
    pages[:, 2048:] = 0
    return pages


async def _worker(
    client: AsyncClient, space_name: str, slot: int, until_s: float, seen: Counter[str]
) -> None:
    space = await client.space(space_name)
    slots = np.arange(slot, slot + PAGES, dtype=np.uint64)
    turn, may_be = 0, list[int]()
    while time.monotonic() < until_s or not may_be:
        turn += 1
        try:
            await space.store(slots, pages_of(slot, turn))
            may_be = [turn]
            seen["stored"] += 1
            found = await space.load(slots)
        except VswapError as error:
            seen[type(error).__name__] += 1
            may_be.append(turn)
            continue
        seen["loaded"] += 1
        if not np.array_equal(found, pages_of(slot, turn)):
            seen["wrong"] += 1
    found = await space.load(slots)
    if not any(np.array_equal(found, pages_of(slot, turn)) for turn in may_be):
        seen["wrong"] += 1


async def _flood(address: str, space: str, first: int, workers: int, seconds: float) -> None:
    clients = [AsyncClient(address, deadline_s=60, retry_s=60) for _ in range(2)]
    until_s = time.monotonic() + seconds
    seen: Counter[str] = Counter()
    await asyncio.gather(
        *(_worker(clients[n % 2], space, first + n * PAGES, until_s, seen) for n in range(workers))
    )
    for client in clients:
        await client.close()
    print(json.dumps(seen))


if __name__ == "__main__":
    where, space_name, first_slot, workers, seconds = sys.argv[1:]
    asyncio.run(_flood(where, space_name, int(first_slot), int(workers), float(seconds)))
