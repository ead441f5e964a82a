"""What clients did to each slot, and whether what they saw can be true.

Every attempt to store has a page of its own, also when it repeats an earlier one, so that a page
that is read tells which attempt put it there. An attempt whose reply was lost may have happened,
at any moment until nothing of it was left in the system.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

PAGE_BYTES = 4096
_POOL = np.random.default_rng(1).integers(0, 256, 1 << 16, np.uint8)


@dataclass(slots=True)
class Write:
    """One attempt to store (``version`` > 0) or free (0) slots."""

    version: int
    begun: int
    ended: float = math.inf
    """When the caller was told that it happened, or when it could not happen any more."""
    admitted: float = math.inf
    """When the node took it on: what begins later and is acknowledged wins over it."""
    happened: bool = False
    """The caller was told so."""
    void: bool = False
    """The caller was told that nothing happened."""
    whole: bool = True
    """It happens to every slot, if at all: no confirmation that spares what was stored since."""
    seen: bool = False

    @property
    def latest(self) -> float:
        """What is sure and begins later comes after it."""
        return min(self.ended, self.admitted)


class Wrong(AssertionError):
    """A promise was broken."""


@dataclass
class History:
    """Of one space. Moments are the numbers of what happens, in order."""

    where: str
    _moments: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    _versions: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    writes: defaultdict[int, list[Write]] = field(default_factory=lambda: defaultdict(list))
    reads: defaultdict[tuple[int, int], list[tuple[int, int]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    """By slot and version: when reads that returned it began and ended."""
    checked: int = 0
    """Reads of a slot that were held against it."""

    missing: int = 0
    """Pages that were found to be lost."""

    def now(self) -> int:
        return next(self._moments)

    def begin_store(self, slots: list[int]) -> Write:
        return self._begin(slots, next(self._versions))

    def begin_free(self, slots: list[int], *, whole: bool = True) -> Write:
        write = self._begin(slots, 0)
        write.whole = whole
        return write

    def untouched(self, slots: list[int], since: int) -> list[int]:
        """Slots without an acknowledged store or free that began after that moment."""
        return [
            slot for slot in slots
            if not any(self._sure(w) and w.begun > since for w in self.writes[slot])
        ]  # fmt: skip

    def _begin(self, slots: list[int], version: int) -> Write:
        write = Write(version, self.now())
        for slot in slots:
            self.writes[slot].append(write)
        return write

    def admit(self, write: Write) -> None:
        """The node takes it on in this turn."""
        write.admitted = self.now()

    def acknowledge(self, write: Write) -> None:
        write.happened = True
        write.ended = self.now()

    def refuse(self, write: Write) -> None:
        """The caller was told that nothing happened. Raises Wrong where somebody has read it."""
        if write.seen:
            raise Wrong(f"{self.where}: version {write.version} was refused, and had been read")
        write.void = True
        write.ended = self.now()

    def settle(self, write: Write) -> None:
        """From here on it cannot happen any more, if it has not."""
        write.ended = min(write.ended, self.now())

    # ---------------------------------------------------------------- reads

    def saw(self, slot: int, version: int, begun: int) -> None:
        """A read that began then returned this version (0: no page). Raises Wrong."""
        self.checked += 1
        writes = self.writes[slot]
        mine = [w for w in writes if w.version == version and not w.void]
        if not version and not any(w.happened and w.whole for w in writes if w.ended < begun):
            return  # Nothing was ever sure to be there.
        # Over once another one began after it, and ended well before the read began.
        last = max((w.begun for w in writes if self._sure(w) and w.ended < begun), default=0)
        for write in mine:
            if write.latest >= last:
                write.seen = True
                if version:
                    self.reads[slot, version].append((begun, self.now()))
                return
        raise Wrong(
            f"{self.where}: slot {slot} holds {_name(version)} at {begun}; writes: "
            + "; ".join(map(str, writes[-12:]))
        )

    def missed(self, slot: int, begun: int) -> None:
        """A read that began then said that the page is lost. Raises Wrong where there was none.

        Whether it can be lost is for the servers to tell: :meth:`World.judge`.
        """
        writes = self.writes[slot]
        last = max((w.begun for w in writes if self._sure(w) and w.ended < begun), default=0)
        if not any(w.version and not w.void and w.latest >= last for w in writes):
            raise Wrong(f"{self.where}: slot {slot} is lost, and held none; writes: {writes[-12:]}")
        self.missing += 1

    def check_order(self) -> None:
        """Whether one order explains what everybody saw of each slot. Raises Wrong.

        As every version is stored by one attempt only, it is enough to look at zones (Gibbons and
        Korach, *Testing shared memories*): from the end of the first operation on a version to the
        beginning of the last one the slot must hold it, so no two such zones may overlap, and
        no other version's whole life may lie within one.
        """
        for slot, writes in self.writes.items():
            firm: list[tuple[float, float, Write]] = []
            brief: list[tuple[float, float, Write]] = []
            for write in writes:
                reads = self.reads.get((slot, write.version), ()) if write.version else ()
                if write.void or not (reads or self._sure(write)):
                    continue
                first_end = min([write.ended, *(end for _, end in reads)])
                last_begin = max([write.begun, *(begin for begin, _ in reads)])
                if first_end < last_begin:
                    firm.append((first_end, last_begin, write))
                else:
                    brief.append((last_begin, first_end, write))
            firm.sort(key=lambda zone: zone[0])
            for (_, end, one), (start, _, other) in itertools.pairwise(firm):
                if start < end:
                    raise Wrong(f"{self.where}: slot {slot} went back and forth: {one}, {other}")
            for start, end, write in brief:
                if any(a < start and end < b for a, b, _ in firm):
                    raise Wrong(f"{self.where}: slot {slot} ignored {write}")

    def _sure(self, write: Write) -> bool:
        return write.happened and write.whole


def _name(version: int) -> str:
    return f"version {version}" if version else "no page"


# -------------------------------------------------------------------- pages


def page(slot: int, version: int, whole: int = PAGE_BYTES) -> NDArray[np.uint8]:
    """Tells its slot and version. One in eight is a fill page; some compress, others do not."""
    kind = (slot * 5 + version) % 8
    if kind == 0:
        return np.full(whole // 4, slot << 22 | version, "<u4").view(np.uint8)
    out = np.zeros(whole, np.uint8)
    start = (slot * 131 + version * 977) % (len(_POOL) - whole)
    size = whole if kind < 4 else whole // (2 * kind - 6)
    out[:size] = _POOL[start : start + size]
    out[:16].view("<u8")[:] = slot, version
    return out


def pages(slots: list[int], version: int) -> NDArray[np.uint8]:
    return np.stack([page(slot, version) for slot in slots])


def version_of(slot: int, content: NDArray[np.uint8]) -> int:
    """Which version of the slot it is. Raises Wrong where it is none."""
    words = content.view("<u4")
    version = int(content[8:16].view("<u8")[0])
    if (words == words[0]).all():
        version = int(words[0]) & (1 << 22) - 1
    if version >= 1 << 22 or not np.array_equal(content, page(slot, version, len(content))):
        raise Wrong(f"slot {slot} returned the wrong bytes: {content[:32].tobytes().hex()}")
    return version
