"""What the demo measured, what it claims, and its JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vswap.cli import units
from vswap.cli.demo.plan import OBJECTS, RAM, REDIS_A, REDIS_B, ZRAM
from vswap.cli.demo.story import Tiers, page_shares
from vswap.loadgen import report
from vswap.loadgen.meter import Meter

STANDARD_BYTES = 1 << 30
DRAIN_BYTES = 50 << 20
DRAIN_OPS = 10_000
COMPACTED_UTILISATION = 0.85


@dataclass(frozen=True, slots=True)
class Claim:
    """Something the demo says it has shown. ``integrity``: it is about pages being right."""

    text: str
    holds: bool
    integrity: bool = False


@dataclass
class Result:
    """Filled in act by act."""

    logical_bytes: int = 0
    tiers: Tiers = field(default_factory=dict)
    tiers_at_end: Tiers = field(default_factory=dict)
    before: Meter = field(default_factory=Meter)
    before_s: float = 0
    during: Meter = field(default_factory=Meter)
    total: Meter = field(default_factory=Meter)
    drain: dict[str, Any] = field(default_factory=dict)
    compaction: dict[str, Any] = field(default_factory=dict)
    migration: dict[str, Any] = field(default_factory=dict)
    sample: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0

    def backends_used(self) -> list[str]:
        """Tiers that held pages once everything was stored; "fill" is one."""
        return [name for name, tier in self.tiers.items() if tier["pages"]]

    def node_memory_bytes(self) -> int:
        """Memory of the nodes that pages took once everything was stored."""
        return sum(self.tiers[name]["stored_bytes"] for name in (RAM, ZRAM))

    def stored_bytes(self) -> int:
        return sum(tier["stored_bytes"] for tier in self.tiers.values())

    def claims(self) -> list[Claim]:
        """Every claim, held or not. Amounts are claimed of a demo of standard size only."""
        shares = page_shares(self.tiers)
        redis = shares[REDIS_A] + shares[REDIS_B]
        drain, compaction, sample = self.drain, self.compaction, self.sample
        standard = self.logical_bytes >= STANDARD_BYTES
        return [
            Claim(
                f"{units.size(self.logical_bytes)} of pages in {len(self.backends_used())} kinds "
                f"of places; Redis {units.percent(redis)}, objects "
                f"{units.percent(shares[OBJECTS])}, fill {units.percent(shares['fill'])}",
                all(share > 0 for share in shares.values())
                and (
                    not standard
                    or (redis >= 0.1 and shares[OBJECTS] >= 0.1 and shares["fill"] <= 0.3)
                ),
            ),
            Claim(
                f"{drain['tier']} drained under load: {units.size(drain['bytes_moved'])} moved in "
                f"{units.duration(drain['seconds'])} during {units.count(drain['ops_meanwhile'])} "
                "checked page operations",
                not standard
                or (drain["bytes_moved"] >= DRAIN_BYTES and drain["ops_meanwhile"] >= DRAIN_OPS),
            ),
            Claim(
                f"the drained server itself lists {units.count(drain['keys_before'])} keys before, "
                f"{drain['keys_left']} after",
                drain["keys_before"] > 0 and drain["keys_left"] == 0,
            ),
            Claim(
                f"{compaction['tier']} compacted: {units.percent(compaction['utilisation_before'])}"
                f" of its bytes were in use, now {units.percent(compaction['utilisation_after'])}; "
                f"the server lists {units.size(compaction['backend_bytes_before'])}, now "
                f"{units.size(compaction['backend_bytes_after'])}",
                compaction["utilisation_after"] >= COMPACTED_UTILISATION
                and compaction["backend_bytes_after"] < compaction["backend_bytes_before"],
            ),
            Claim(
                f"a client found its {units.count(sample['pages'])} pages under the slot numbers "
                f"it had noted, overwritten and freed ones included; {sample['wrong_pages']} wrong",
                sample["wrong_pages"] == 0,
                integrity=True,
            ),
            Claim(
                f"{units.count(self.total.pages_loaded)} pages loaded and checked, "
                f"{self.total.wrong_pages} wrong, {self.total.lost_pages} lost, "
                f"{self.total.failed_ops} failed requests",
                not (self.total.wrong_pages or self.total.lost_pages or self.total.failed_ops),
                integrity=True,
            ),
        ]

    def as_json(self) -> dict[str, Any]:
        """The load generator's keys (latencies are those before the drain) and the demo's."""
        load = report.as_json(
            self.total, self.before, self.before_s, self.logical_bytes, self.tiers
        )
        return {
            **load,
            "wrong_pages": self.total.wrong_pages + self.sample["wrong_pages"],
            "seconds": round(self.seconds, 3),
            "backends_used": self.backends_used(),
            "drain": self.drain,
            "compaction": self.compaction,
            "latency_us_during_drain": self.during.latency_us(),
            "migration": self.migration,
            "sample": self.sample,
            "node_memory_bytes": self.node_memory_bytes(),
            "tiers_at_end": self.tiers_at_end,
            "claims": [{"text": claim.text, "holds": claim.holds} for claim in self.claims()],
        }
