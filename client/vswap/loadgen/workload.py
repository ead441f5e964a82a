"""Which slots a client touches next, and how.

Every workload yields distinct candidate slots of one client's stripe; the client then reads or
frees those that hold a page and writes where there is none (as a process touches its memory).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vswap.wire.errors import InvalidRequest

KINDS = ("uniform", "zipf", "sequential", "scan")
OPS = ("read", "write", "free")

_REVISIT_WITHIN_BATCHES = 16


@dataclass(frozen=True, slots=True)
class Mix:
    """Shares of reads, writes and frees; they sum to 1."""

    read: float
    write: float
    free: float

    @classmethod
    def parse(cls, text: str) -> Mix:
        """``read:write:free`` as weights, such as "70:25:5". Raises ValueError."""
        parts = text.split(":")
        try:
            weights = [float(part) for part in parts]
        except ValueError:
            weights = []
        if len(weights) != 3 or min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(f"not a mix: {text!r} (read:write:free, like 70:25:5)")
        read, write, free = (weight / sum(weights) for weight in weights)
        return cls(read, write, free)

    def choose(self, rng: np.random.Generator) -> str:
        point = rng.random()
        if point < self.read:
            return "read"
        return "write" if point < self.read + self.write else "free"


def batches(
    kind: str, first: int, count: int, batch: int, skew: float, rng: np.random.Generator
) -> Iterator[NDArray[np.uint64]]:
    """Endless batches of 1 to ``batch`` distinct slots of [first, first + count)."""
    makers: dict[str, Callable[[], Iterator[NDArray[np.int64]]]] = {
        "uniform": lambda: _uniform(count, batch, rng),
        "zipf": lambda: _zipf(count, batch, skew, rng),
        "sequential": lambda: _sequential(count, batch),
        "scan": lambda: _scan(count, batch, rng),
    }
    if kind not in makers:
        raise InvalidRequest(f"unknown workload {kind!r} (one of {', '.join(KINDS)})")
    for offsets in makers[kind]():
        yield (offsets + first).astype(np.uint64)


def _uniform(count: int, batch: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    while True:
        yield np.unique(rng.integers(0, count, batch))


def _zipf(
    count: int, batch: int, skew: float, rng: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """The k-th hottest slot is touched k**-skew times as often as the hottest; 0 is uniform."""
    if skew < 0:
        raise InvalidRequest(f"the skew must not be negative, got {skew}")
    shares = np.cumsum(np.arange(1, count + 1, dtype=np.float64) ** -skew)
    shares /= shares[-1]
    scattered = rng.permutation(count)
    while True:
        ranks = np.searchsorted(shares, rng.random(batch))
        yield np.unique(scattered[np.minimum(ranks, count - 1)])


def _sequential(count: int, batch: int) -> Iterator[NDArray[np.int64]]:
    while True:
        for start in range(0, count, batch):
            yield np.arange(start, min(start + batch, count))


def _scan(count: int, batch: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """A scan of the stripe that looks back at a batch it has passed after each step."""
    while True:
        for step, start in enumerate(range(0, count, batch)):
            yield np.arange(start, min(start + batch, count))
            if step:
                back = int(rng.integers(1, min(step, _REVISIT_WITHIN_BATCHES) + 1))
                yield np.arange(start - back * batch, start - (back - 1) * batch)
