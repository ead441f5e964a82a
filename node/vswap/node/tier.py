"""A tier as the node runs it: its backend, its segments, how much room it has, how it fares."""

from __future__ import annotations

import asyncio
import enum
import random
from collections.abc import Callable
from uuid import UUID

from vswap.node.handles import Handles
from vswap.tiers.backend import Backend, SegmentName
from vswap.tiers.codec import Codec
from vswap.tiers.ram import RamBackend
from vswap.tiers.redundancy.base import Redundant
from vswap.tiers.segment import TRAILER_BYTES
from vswap.tiers.spec import TierSpec
from vswap.tiers.wrappers.base import Wrapper
from vswap.wire.errors import TierUnavailable

_BACKOFF_FIRST_S = 0.2
_BACKOFF_MOST_S = 10.0
_RESERVE_SHARE = 0.02
NO_CLUSTER = UUID(int=0)


class TierState(enum.IntEnum):
    """Values as in ``common.proto``."""

    ACTIVE = 1
    DRAINING = 2
    DRAINED = 3


class Tier:
    """One tier of a shard. Event loop only.

    Invariants: ``stored_bytes`` is the sum of ``stored`` over the handles in ``segments``, plus
    nothing; ``segments`` holds every handle of the tier that is not FREE, oldest first.
    """

    def __init__(
        self,
        spec: TierSpec,
        tag: int,
        backend: Backend,
        handles: Handles,
        *,
        local: bool,
        clock: Callable[[], float],
        rng: random.Random,
    ) -> None:
        self.spec = spec
        self.tag = tag
        self.backend = backend
        self.codec = Codec.parse(spec.codec)
        self.local = local
        self.state = TierState.ACTIVE
        self.segments: dict[int, None] = {}
        self.stored_bytes = 0
        self.limit_bytes = spec.capacity_bytes if local else 0
        """What the node may store here: its own capacity, or its grant (see :meth:`grant`)."""
        self.writing = 0
        """Segments being written right now."""
        self.opened = False
        self.fenced = False
        """What lies here may be of a newer life of this shard: nothing is deleted."""
        self.tried: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done once it was tried to open the backend: whoever needs it waits so long, no longer."""
        self.quarantined = 0
        self.missing: dict[int, int] = {}
        """Segments (handle -> word of the row) that the last listing of the backend lacked."""
        self.suspect = False
        """The backend failed, or had not what it should have, since it was last listed."""
        self.sweep_due = False
        """It is time to list it; kept until somebody does."""
        self.room_changed = asyncio.Event()
        """Set whenever room may have appeared; waiters clear it."""
        self.on_pressure: Callable[[], None] = lambda: None
        """Called when a charge took the tier above its high watermark, and for blocks of RAM."""
        self._handles = handles
        self._clock = clock
        self._rng = rng
        self._failures = 0
        self._sick_until = 0.0
        self.error: str = ""
        """For people, without the tier's name: why it is passed over, or smaller than it should be.

        Empty where all is well."""
        self.unfit = ""
        """Why nothing may be written there, though it answers: it could be lost."""

    def __repr__(self) -> str:
        return f"<tier {self.name} tag {self.tag}>"

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def ram(self) -> RamBackend | None:
        """The arena, where the tier is RAM."""
        return self.backend if isinstance(self.backend, RamBackend) else None

    @property
    def redundant(self) -> Redundant | None:
        """What spreads the tier's segments over several servers, where it does."""
        backend = self.backend
        while isinstance(backend, Wrapper):
            backend = backend.inner
        return backend if isinstance(backend, Redundant) else None

    def segment_name(self, handle: int) -> SegmentName:
        """Segments of the node's own tiers belong to no cluster."""
        cluster = NO_CLUSTER if self.local else self._handles.cluster
        return SegmentName(cluster, self._handles.shard, self._handles.serial(handle))

    # ---------------------------------------------------------------- room

    @property
    def segment_bytes(self) -> int:
        """Bytes a segment has for records and their rows."""
        return self.backend.segment_bytes - (0 if self.ram else TRAILER_BYTES)

    @property
    def reserve_bytes(self) -> int:
        """Room that only compaction may use, so that a full tier can be cleaned: 2 %, at least
        two segments."""
        return max(int(self.limit_bytes * _RESERVE_SHARE), 2 * self.backend.segment_bytes)

    def room(self, *, compacting: bool = False) -> int:
        """Bytes that may still be stored (RAM: in whole blocks)."""
        reserve = 0 if compacting else self.reserve_bytes
        return max(self.limit_bytes - self.stored_bytes - reserve, 0)

    @property
    def fullness(self) -> float:
        """Share of the limit in use."""
        return self.stored_bytes / self.limit_bytes if self.limit_bytes else 1.0

    def grant(self, total_bytes: int) -> None:
        """What the coordinator lets the node hold in a tier of the cluster, also after a restart.

        On file in this turn: no report tells of less than what a restart will believe.
        """
        self._handles.granted[self.tag] = total_bytes
        self.limit_bytes = total_bytes
        self.room_changed.set()

    def charge(self, stored_bytes: int) -> None:
        self.stored_bytes += stored_bytes
        if self.fullness > self.spec.high or self.ram is not None:
            self.on_pressure()

    def credit(self, stored_bytes: int) -> None:
        self.stored_bytes -= stored_bytes
        self.room_changed.set()

    # ---------------------------------------------------------------- health

    @property
    def writable(self) -> bool:
        """Takes new segments: active, opened, fit, and not passed over because of errors."""
        well = self.opened and not self.unfit and self._clock() >= self._sick_until
        return well and self.state is TierState.ACTIVE

    @property
    def available(self) -> bool:
        return self.opened and not self.unfit and self._failures == 0

    def succeeded(self) -> None:
        self._failures = 0
        self._sick_until = 0.0
        self.error = self.unfit

    def failed(self, error: BaseException) -> None:
        """Passes the tier over for a while: exponential, with jitter."""
        if isinstance(error, TierUnavailable) and "retry_after_s" in error.fields:
            # Nobody asked the server: the wait must not grow with every request.
            wait_until = self._clock() + error.fields["retry_after_s"]
            self._sick_until = max(self._sick_until, wait_until)
            return
        self._failures += 1
        self.suspect = True
        backoff = min(_BACKOFF_FIRST_S * 2 ** min(self._failures - 1, 10), _BACKOFF_MOST_S)
        self._sick_until = self._clock() + backoff * self._rng.uniform(0.5, 1.0)
        self.error = str(error).removeprefix(f"tier {self.name}: ")

    @property
    def sick_for_s(self) -> float:
        return max(self._sick_until - self._clock(), 0.0)
