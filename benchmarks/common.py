"""What the benchmarks share: real pages, shards, and a table of results with floors and aims."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vswap.node.seams import Seams
from vswap.node.shard import Shard
from vswap.node.spaces import Space
from vswap.tiers.spec import TierSpec

MIB = 2**20
PAGE_BYTES = 4096
LOAD_PAGES, LOAD_EVERY_S = 16, 0.002
Pages = NDArray[np.uint8]

_WORKER = """
import ast, collections, decimal, json, random, sys, time
rng = random.Random(1)
keep = [{f"user-{i}": {"id": i, "score": rng.random(), "tags": [str(rng.random())] * 3}} for i in range(60000)]
keep.append(ast.parse(open(ast.__file__).read()))
keep.append(collections.OrderedDict((i, decimal.Decimal(i) / 7) for i in range(30000)))
keep.append(json.dumps(keep[:20000]))
print("ready", flush=True)
time.sleep(600)
"""  # noqa: E501


def real_pages(count: int) -> Pages:
    """``count`` pages of the memory of a running Python program that holds data; shuffled.

    All-zero pages are left out: they would be fill pages, which cost nothing.
    """
    process = subprocess.Popen([sys.executable, "-c", _WORKER], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        process.stdout.readline()
        found = _read_memory(process.pid)
    finally:
        process.kill()
        process.wait()
    order = np.random.default_rng(0).permutation(len(found))
    return np.ascontiguousarray(found[np.resize(order, count)])


def _read_memory(pid: int) -> Pages:
    parts = []
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in maps:
            fields = line.split()
            if "rw" not in fields[1] or (len(fields) > 5 and fields[5].startswith("[v")):
                continue
            start, end = (int(part, 16) for part in fields[0].split("-"))
            memory.seek(start)
            try:
                data = memory.read(min(end - start, 64 * MIB))
            except OSError:
                continue
            usable = data[: len(data) // PAGE_BYTES * PAGE_BYTES]
            parts.append(np.frombuffer(usable, np.uint8).reshape(-1, PAGE_BYTES))
    pages = np.concatenate(parts)
    return pages[pages.any(axis=1)]


def ram_tier(name: str, mib: int, codec: str, rank: int = 0) -> TierSpec:
    return TierSpec(name=name, url="ram://", codec=codec, capacity_bytes=mib * MIB, rank=rank)


@asynccontextmanager
async def open_shard(*tiers: TierSpec, seams: Seams | None = None) -> AsyncIterator[Shard]:
    """A shard in shared memory, gone afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="vswap-bench-", dir="/dev/shm"))
    try:
        shard = await Shard.open(directory, tiers, seams=seams)
        try:
            yield shard
        finally:
            await shard.close()
    finally:
        await asyncio.to_thread(shutil.rmtree, directory)


@dataclass(frozen=True, slots=True)
class Result:
    """One measured ratio or figure. ``up`` tells that more is better."""

    what: str
    value: float
    unit: str = "x"
    floor: float | None = None
    aim: float | None = None
    up: bool = False
    note: str = ""

    def holds(self, bound: float | None) -> bool:
        if bound is None:
            return True
        return self.value >= bound if self.up else self.value <= bound

    @property
    def verdict(self) -> str:
        if not self.holds(self.floor):
            return "BELOW FLOOR"
        return "ok" if self.holds(self.aim) else "floor"

    def as_dict(self) -> dict[str, Any]:
        return {
            "what": self.what, "value": round(self.value, 4), "unit": self.unit,
            "floor": self.floor, "aim": self.aim, "verdict": self.verdict, "note": self.note,
        }  # fmt: skip


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Median of the ratios of rounds that ran side by side: the machine's mood cancels out."""
    return float(np.median(np.array(ours) / np.array(theirs)))


def p99_result(
    what: str, during: list[float], without: list[float], floor: float, aim: float, beside: str
) -> Result:
    """What :func:`loads_p99_s` found in rounds that ran in turn."""
    return Result(
        what, ratio(during, without), floor=floor, aim=aim,
        note=f"{np.median(during) * 1e3:.2f} ms vs {np.median(without) * 1e3:.2f} ms, loads of "
        f"{LOAD_PAGES} pages every {LOAD_EVERY_S * 1e3:.0f} ms, {beside}",
    )  # fmt: skip


async def loads_p99_s(shard: Shard, space: Space, slots: int, seconds: float) -> float:
    """The p99, in seconds, of loads of 16 of the space's first slots every 2 ms, each counted from
    when it was due."""
    rng = np.random.default_rng(2)
    took = []
    due = time.perf_counter()
    end = due + seconds
    while due < end:
        await asyncio.sleep(max(due - time.perf_counter(), 0))
        await shard.pager.load(space, rng.integers(0, slots, LOAD_PAGES).astype(np.uint64))
        took.append(time.perf_counter() - due)
        due += LOAD_EVERY_S
    return float(np.percentile(took, 99))
