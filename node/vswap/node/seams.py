"""What a shard is handed instead of reaching for it: clock, chance, threads, backends, memory.

A whole cluster can thus run in one process on a virtual clock.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID, uuid4

from vswap.node.faults import Faults
from vswap.node.pacer import Pacer, make_pacer
from vswap.node.reaper import LATE_S
from vswap.tiers.backend import Backend
from vswap.tiers.factory import make_backend
from vswap.tiers.region import Region
from vswap.tiers.spec import TierSpec


def _threads() -> int:
    return max(1, min(len(os.sched_getaffinity(0)), 8))


@dataclass(slots=True)
class Seams:
    """The defaults are production's."""

    clock: Callable[[], float] = time.monotonic
    """Seconds, never back, the same for every process of this boot."""
    rng: random.Random = field(default_factory=random.Random)
    new_uuid: Callable[[], UUID] = uuid4
    threads: int = field(default_factory=_threads)
    executor: Executor | None = None
    make_backend: Callable[[TierSpec], Backend] = make_backend
    make_region: Callable[[Path], Region] = Region
    make_pacer: Callable[[int], Pacer] = make_pacer
    late_s: float = LATE_S
    faults: Faults | None = None
    """None: tiers cannot be made to misbehave."""

    def worker_threads(self) -> Executor:
        if self.executor is None:
            self.executor = ThreadPoolExecutor(self.threads, thread_name_prefix="codec")
        return self.executor
