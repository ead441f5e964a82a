"""An ordinary client beside the load: it keeps a list of slot numbers and nothing else.

It uses the synchronous SDK as any program would, and remembers of each page only its digest.
"""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from vswap.cli.demo.plan import PAGE_BYTES
from vswap.client import Client
from vswap.wire.errors import SlotNotFound

_BATCH = 128


class Sample:
    """Blocking; to be called from a thread. ``noted`` maps slot numbers to digests of pages."""

    def __init__(self, address: str, base: NDArray[np.uint8], first_slot: int, pages: int) -> None:
        self._client = Client(address)
        self._space = self._client.space("default")
        self._base = base
        self._rng = np.random.default_rng(7)
        spread = self._rng.permutation(20 * pages)[:pages]
        self._slots: list[int] = [int(slot) + first_slot for slot in spread]
        self._freed: list[int] = []
        self._versions = 0
        self.noted: dict[int, bytes] = {}
        self.stored = self.loaded = self.wrong = 0

    def close(self) -> None:
        self._client.close()

    def store_more(self, count: int) -> None:
        """Store pages in the next slots of its list."""
        self._store(self._slots[len(self.noted) : len(self.noted) + count])

    def change(self, overwrite: int, free: int) -> None:
        """Overwrite some of its pages and free others."""
        chosen = [int(slot) for slot in self._rng.permutation(list(self.noted))]
        self._store(chosen[:overwrite])
        gone = chosen[overwrite : overwrite + free]
        self._space.free(gone)
        for slot in gone:
            del self.noted[slot]
        self._freed += gone

    def check(self) -> int:
        """Load every page by the number noted for it, and look for freed ones; how many are wrong.

        Freed slots must hold nothing.
        """
        wrong = 0
        slots = list(self.noted)
        for start in range(0, len(slots), _BATCH):
            part = slots[start : start + _BATCH]
            for slot, page in zip(part, self._space.load(part), strict=True):
                wrong += _digest(page) != self.noted[slot]
            self.loaded += len(part)
        for slot in self._freed[:_BATCH]:
            try:
                self._space.load(slot)
            except SlotNotFound:
                continue
            wrong += 1
        self.wrong += wrong
        return wrong

    def places(self) -> Counter[str]:
        """How many of its pages lie where."""
        return Counter(self._space.locate(list(self.noted)))

    def _store(self, slots: list[int]) -> None:
        for start in range(0, len(slots), _BATCH):
            part = slots[start : start + _BATCH]
            pages = self._base[self._rng.integers(0, len(self._base), len(part))]
            self._versions += 1
            words = pages.view(np.uint64)
            words[:, 0], words[:, 1] = part, self._versions
            assert pages.shape == (len(part), PAGE_BYTES)
            self._space.store(part, pages)
            self.noted |= {s: _digest(page) for s, page in zip(part, pages, strict=True)}
            self.stored += len(part)


def _digest(page: NDArray[np.uint8]) -> bytes:
    return hashlib.blake2b(page.tobytes(), digest_size=16).digest()
