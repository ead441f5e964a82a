"""Mirrors: every server has the whole segment.

A read goes to one server, another one for each segment in turn, and to the next one where that has
no answer.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from vswap.tiers.backend import Buffer, Read, SegmentName
from vswap.tiers.redundancy.base import Member, Redundant
from vswap.tiers.segment import parse
from vswap.wire.errors import PageCorrupt, PageLost, TierUnavailable, VswapError


class Mirrored(Redundant):
    """``mirror:N``. Survives the loss of all servers but one."""

    def __init__(self, members: Sequence[Member], *, verify_writes: bool = False) -> None:
        super().__init__(members, 1, verify_writes=verify_writes)
        self.segment_bytes = min(member.backend.segment_bytes for member in members)

    async def _split(self, name: SegmentName, data: Buffer) -> list[Buffer]:
        return [data] * len(self.members)

    def part_bytes(self, name: SegmentName, place: int, whole: int) -> int:
        return whole

    def _whole(self, name: SegmentName, sizes: dict[int, int]) -> int:
        return max(sizes.values())

    async def get(self, reads: Sequence[Read]) -> list[Buffer | VswapError]:
        results: list[Buffer | VswapError] = [PageLost("not read")] * len(reads)
        tried, missed = [0] * len(reads), [0] * len(reads)
        pending = list(range(len(reads)))
        count = len(self.members)
        while pending:
            # Segments are spread over the servers that are up.
            orders = [self._asked_in_order(first) for first in range(count)]
            by_place: dict[int, list[int]] = {}
            for i in pending:
                order = orders[reads[i].name.serial % count]
                place = next((place for place in order if not tried[i] >> place & 1), None)
                if place is not None:
                    by_place.setdefault(place, []).append(i)
                    continue
                if missed[i]:
                    self.on_damage(reads[i].name, missed[i])
                if missed[i].bit_count() < count:
                    results[i] = TierUnavailable(f"{reads[i].name.key}: {self._too_few(0)}")
            answers = await self._get_parts(
                {place: [reads[i] for i in some] for place, some in by_place.items()}
            )
            pending = []
            for (place, some), found in zip(by_place.items(), answers, strict=True):
                for i, answer in zip(some, found, strict=True):
                    results[i] = answer
                    if isinstance(answer, VswapError):
                        tried[i] |= 1 << place
                        missed[i] |= isinstance(answer, PageLost) << place
                        pending.append(i)
                    elif missed[i]:
                        self.on_damage(reads[i].name, missed[i])
        return results

    async def verify(self, name: SegmentName, whole: int) -> int:
        bad = 0
        for place in self._up():
            [answer] = await self._get_part(place, [Read(name, 0, whole, whole)])
            if isinstance(answer, PageLost) or (
                not isinstance(answer, VswapError) and not _is_whole(answer, name)
            ):
                bad |= 1 << place
        if bad:
            self.on_damage(name, bad)
        return bad

    async def alternatives(self, read: Read) -> AsyncIterator[Buffer]:
        for place in self._asked_in_order():
            [answer] = await self._get_part(place, [read])
            if not isinstance(answer, VswapError):
                yield answer


def _is_whole(data: Buffer, name: SegmentName) -> bool:
    try:
        parse(data, name)
    except PageCorrupt:
        return False
    return True
