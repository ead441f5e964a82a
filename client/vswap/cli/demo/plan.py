"""How large the demo's cluster is: tiers sized so that its pages need all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vswap.wire.errors import InvalidRequest

PAGE_BYTES = 4096
PAGES = 320_000
LEAST_PAGES = 60_000
FILL = 0.2
CODEC = "zstd:1"

RAM, ZRAM, REDIS_A, REDIS_B, OBJECTS = "ram", "zram", "redis-a", "redis-b", "objects"

# Shares of the pages that are no fill pages; what is left goes to the objects.
SHARES: Mapping[str, float] = {RAM: 0.08, ZRAM: 0.16, REDIS_A: 0.24, REDIS_B: 0.26}
HIGH, LOW = 0.95, 0.90

_RECORD_BYTES = 48
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Plan:
    """Capacities in bytes; those of the RAM tiers are per node."""

    nodes: int
    pages: int
    record_bytes: float
    capacity_bytes: Mapping[str, int]

    @property
    def logical_bytes(self) -> int:
        return self.pages * PAGE_BYTES

    @property
    def shm_bytes(self) -> int:
        """Shared memory that the nodes' state will take: arenas, staging, tables."""
        arenas = self.capacity_bytes[RAM] + self.capacity_bytes[ZRAM]
        return self.nodes * (arenas + 64 * _MIB)

    @property
    def ram_bytes(self) -> int:
        """Memory that all processes together will take, shared memory included."""
        redis = self.capacity_bytes[REDIS_A] + self.capacity_bytes[REDIS_B]
        processes = (self.nodes + 2) * 150 * _MIB
        return self.shm_bytes + round(1.1 * redis) + processes

    @property
    def disk_bytes(self) -> int:
        return self.capacity_bytes[OBJECTS]


def make(nodes: int, pages: int, base: NDArray[np.uint8]) -> Plan:
    """A plan for so many pages of such content; what a page compresses to is measured."""
    if not 1 <= nodes <= 8:
        raise InvalidRequest(f"the demo runs 1 to 8 nodes, not {nodes}")
    if pages < LEAST_PAGES:
        raise InvalidRequest(f"{pages} pages do not fill every tier; at least {LEAST_PAGES}")
    import zstandard

    compress = zstandard.ZstdCompressor(level=1).compress
    sample = base[:1024]
    record_bytes = sum(len(compress(row.tobytes())) for row in sample) / len(sample) + _RECORD_BYTES
    stored = pages * (1 - FILL)
    capacity = {
        RAM: _whole(stored * SHARES[RAM] * (PAGE_BYTES + _RECORD_BYTES) / nodes / HIGH),
        ZRAM: _whole(stored * SHARES[ZRAM] * record_bytes / nodes / HIGH),
        REDIS_A: _whole(stored * SHARES[REDIS_A] * record_bytes / HIGH),
        REDIS_B: _whole(stored * SHARES[REDIS_B] * record_bytes / HIGH),
        OBJECTS: _whole(2 * stored * record_bytes),
    }
    return Plan(nodes, pages, record_bytes, capacity)


def coordinator_toml(plan: Plan, directory: Path, redis_urls: Mapping[str, str]) -> str:
    """The coordinator's configuration."""
    shared = [
        _tier(name, url, CODEC, plan.capacity_bytes[name], rank)
        for name, url, rank in (
            (REDIS_A, redis_urls[REDIS_A], 20),
            (REDIS_B, redis_urls[REDIS_B], 30),
            (OBJECTS, f"file://{directory}/objects", 40),
        )
    ]
    settings = {
        "listen": "127.0.0.1:0",
        "state_dir": str(directory / "coordinator"),
        "lease_s": 3.0,
    }
    # The demo compacts on stage; nobody should have done it before.
    return _toml(settings, {"tiers": shared}, {"compaction": {"enabled": False}})


def node_toml(plan: Plan, name: str, state: Path, coordinator: str) -> str:
    """A node's configuration."""
    settings = {
        "name": name,
        "listen": "127.0.0.1:0",
        "coordinator": coordinator,
        "state_dir": str(state / name),
    }
    tiers = [
        _tier(RAM, "ram://", "none", plan.capacity_bytes[RAM], 0),
        _tier(ZRAM, "ram://", CODEC, plan.capacity_bytes[ZRAM], 10),
    ]
    spaces = [{"name": "default", "page_bytes": PAGE_BYTES}]
    return _toml(settings, {"tiers": tiers, "spaces": spaces}, {})


def _tier(name: str, url: str, codec: str, capacity_bytes: int, rank: int) -> dict[str, Any]:
    return {
        "name": name,
        "url": url,
        "codec": codec,
        "capacity_bytes": capacity_bytes,
        "rank": rank,
        "high": HIGH,
        "low": LOW,
    }


def _whole(size_bytes: float) -> int:
    return max(8, round(size_bytes / _MIB)) * _MIB


def _toml(
    settings: Mapping[str, Any],
    arrays: Mapping[str, Sequence[Mapping[str, Any]]],
    tables: Mapping[str, Mapping[str, Any]],
) -> str:
    """TOML of plain values (a JSON string, number or boolean is one of TOML as well)."""

    def lines(values: Mapping[str, Any]) -> list[str]:
        return [f"{key} = {json.dumps(value)}" for key, value in values.items()]

    blocks = ["\n".join(lines(settings))]
    for name, items in arrays.items():
        blocks += ["\n".join([f"[[{name}]]", *lines(item)]) for item in items]
    blocks += ["\n".join([f"[{name}]", *lines(values)]) for name, values in tables.items()]
    return "\n\n".join(blocks) + "\n"
