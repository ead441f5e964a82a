"""Shards for tests: a real one in a temporary directory, and pages that tell who they are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vswap.node.seams import Seams
from vswap.node.shard import Shard
from vswap.tiers.spec import TierSpec

MIB = 2**20


def ram(name: str = "ram", *, mib: float = 8, codec: str = "none", rank: int = 0) -> TierSpec:
    return TierSpec(name=name, url="ram://", codec=codec, capacity_bytes=int(mib * MIB), rank=rank)


def objects(path: Path, name: str = "objects", *, mib: float = 256, **more: Any) -> TierSpec:
    return TierSpec(
        name=name, url=f"file://{path}", capacity_bytes=int(mib * MIB), rank=more.pop("rank", 50),
        **more,
    )  # fmt: skip


@asynccontextmanager
async def open_shard(
    directory: Path, *tiers: TierSpec, seams: Seams | None = None, **more: Any
) -> AsyncIterator[Shard]:
    """Its tiers have been opened, or found not to let themselves be opened."""
    directory.mkdir(exist_ok=True)
    shard = await Shard.open(directory, tiers, seams=seams, **more)
    try:
        for tier in shard.tiers:
            await asyncio.wait([tier.tried])
        yield shard
    finally:
        await shard.close()


def slots(*numbers: int) -> NDArray[np.uint64]:
    return np.array(numbers, np.uint64)


def page(slot: int, version: int, page_bytes: int = 4096) -> NDArray[np.uint8]:
    """A page that compresses to about a third and tells its slot and version."""
    rng = np.random.default_rng([slot, version])
    out = np.zeros(page_bytes, np.uint8)
    out[: page_bytes // 3] = rng.integers(0, 256, page_bytes // 3)
    return out


def pages(where: NDArray[np.uint64], version: int, page_bytes: int = 4096) -> NDArray[np.uint8]:
    return np.stack([page(slot, version, page_bytes) for slot in where.tolist()])
