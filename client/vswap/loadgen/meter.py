"""Counters and latencies of a run. Mergeable, so that several processes make one result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hdrh.histogram import HdrHistogram

_LONGEST_US = 3_600_000_000
_DIGITS = 3


class Latencies:
    """Latencies in microseconds, to three digits (HDR histogram)."""

    def __init__(self) -> None:
        self._histogram = HdrHistogram(1, _LONGEST_US, _DIGITS)

    def record(self, seconds: float) -> None:
        self._histogram.record_value(min(max(1, round(seconds * 1e6)), _LONGEST_US))

    def __len__(self) -> int:
        return int(self._histogram.get_total_count())

    def percentile(self, percent: float) -> int:
        """Microseconds that ``percent`` of all stay within; 0 if there is nothing."""
        return int(self._histogram.get_value_at_percentile(percent)) if len(self) else 0

    def summary(self) -> dict[str, int]:
        """p50, p90, p99, p999 and max in microseconds."""
        return {
            "p50": self.percentile(50),
            "p90": self.percentile(90),
            "p99": self.percentile(99),
            "p999": self.percentile(99.9),
            "max": self.percentile(100),
        }

    def encode(self) -> bytes:
        return bytes(self._histogram.encode())

    def merge(self, encoded: bytes) -> None:
        self._histogram.decode_and_add(encoded)


@dataclass
class Meter:
    """What happened in one phase. Latencies are per batch, from when it was due to its reply."""

    pages_stored: int = 0
    pages_loaded: int = 0
    pages_freed: int = 0
    wrong_pages: int = 0
    lost_pages: int = 0
    failed_ops: int = 0
    ops: int = 0
    store: Latencies = field(default_factory=Latencies)
    load: Latencies = field(default_factory=Latencies)

    COUNTERS = (
        "pages_stored",
        "pages_loaded",
        "pages_freed",
        "wrong_pages",
        "lost_pages",
        "failed_ops",
        "ops",
    )

    @property
    def pages(self) -> int:
        """Page operations that succeeded."""
        return self.pages_stored + self.pages_loaded + self.pages_freed

    def latency_us(self) -> dict[str, dict[str, int]]:
        return {"store": self.store.summary(), "load": self.load.summary()}

    def add(self, other: Meter) -> None:
        self.merge(other.encode())

    def encode(self) -> dict[str, Any]:
        """As plain values, for another process."""
        counters = {name: getattr(self, name) for name in self.COUNTERS}
        return {**counters, "store": self.store.encode(), "load": self.load.encode()}

    def merge(self, encoded: dict[str, Any]) -> None:
        for name in self.COUNTERS:
            setattr(self, name, getattr(self, name) + encoded[name])
        self.store.merge(encoded["store"])
        self.load.merge(encoded["load"])
