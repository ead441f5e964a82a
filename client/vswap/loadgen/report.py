"""What a load run came to: the figures that tools read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vswap.client import Client
from vswap.loadgen.meter import Meter
from vswap.v1 import node_pb2


def tier_shares(nodes: Sequence[node_pb2.NodeStatus], page_bytes: int) -> dict[str, dict[str, int]]:
    """Pages and bytes per tier over all nodes, fastest first, and the fill pages as "fill"."""
    tiers: dict[str, dict[str, int]] = {}
    usages = [usage for node in nodes for usage in node.tiers]
    for usage in sorted(usages, key=lambda usage: (usage.rank, usage.tier)):
        total = tiers.setdefault(
            usage.tier, {"pages": 0, "logical_bytes": 0, "stored_bytes": 0, "live_bytes": 0}
        )
        total["pages"] += usage.pages
        total["logical_bytes"] += usage.logical_bytes
        total["stored_bytes"] += usage.stored_bytes
        total["live_bytes"] += usage.live_bytes
    fill = sum(node.fill_pages for node in nodes)
    tiers["fill"] = {
        "pages": fill,
        "logical_bytes": fill * page_bytes,
        "stored_bytes": 0,
        "live_bytes": 0,
    }
    return tiers


def node_statuses(addresses: Sequence[str]) -> list[node_pb2.NodeStatus]:
    """GetNode of every node."""
    statuses = []
    for address in addresses:
        with Client(address) as client:
            statuses.append(client.status())
    return statuses


def as_json(
    total: Meter,
    measured: Meter,
    seconds: float,
    logical_bytes: int,
    tiers: dict[str, dict[str, int]],
) -> dict[str, Any]:
    """``total`` counts everything; latencies and throughput are of the ``measured`` phase.

    ``latency_us`` is per batch. ``logical_bytes`` is the size of all pages held at once.
    """
    return {
        "pages_stored": total.pages_stored,
        "pages_loaded": total.pages_loaded,
        "pages_freed": total.pages_freed,
        "wrong_pages": total.wrong_pages,
        "lost_pages": total.lost_pages,
        "failed_ops": total.failed_ops,
        "logical_bytes": logical_bytes,
        "seconds": round(seconds, 3),
        "latency_us": measured.latency_us(),
        "throughput_pages_s": round(measured.pages / seconds, 1) if seconds > 0 else 0.0,
        "tiers": tiers,
    }
