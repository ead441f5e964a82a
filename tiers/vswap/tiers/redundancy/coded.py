"""Reed-Solomon: a segment is cut into K stripes, and any K of its K + M fragments give it back.

The code is systematic: a stripe is stored as it is. So a read of one record is one ranged read from
one server, and only where that has no answer K ranged reads from others, decoded for that range
alone. Fragment i of a segment lies on server (i + serial) mod (K + M), so that parity is spread.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations, islice
from random import Random

import zfec

from vswap.tiers.backend import Buffer, Read, SegmentName
from vswap.tiers.redundancy.base import Member, Redundant
from vswap.tiers.redundancy.fragment import HEADER_BYTES, Shape, pack, read_header, stripe_of
from vswap.wire.errors import PageLost, TierUnavailable, VswapError

_MOST_BYTES = 4 * 2**20
_SLACK_BYTES = 8192
"""For what is left free at the end of stripes, lest a record lie across a cut."""
_TURN_BYTES = 32 * 1024
"""Bytes of each fragment that are coded in one turn of the loop: some 0.1 ms."""
_SUBSETS = 256
"""So many sets of fragments are tried for a range of which too few are known to be right. Of
rs:10+5 with all 15 damaged, three of them in that very range, they find it in 299 of 300 cases. All
3003 sets would cost the node a second for each page that is lost."""


def segment_bytes(member_bytes: int, k: int) -> int:
    """Best size of a segment whose fragments are best of ``member_bytes``."""
    return min(_MOST_BYTES, k * (member_bytes - HEADER_BYTES - _SLACK_BYTES))


@dataclass(slots=True)
class _Piece:
    """A range of one stripe on its way: ``offset`` counts from the stripe's beginning."""

    name: SegmentName
    shape: Shape
    index: int
    offset: int
    length: int
    have: dict[int, Buffer] = field(default_factory=dict)
    """The same range of fragments, by index."""
    asked: int = 0
    """Indices of fragments that were asked for, as bits."""
    missed: int = 0
    """Places of members that have no such fragment, as bits."""


class Coded(Redundant):
    """``rs:K+M``. Survives the loss of any M servers."""

    def __init__(self, members: Sequence[Member], k: int, *, verify_writes: bool = False) -> None:
        super().__init__(members, k, verify_writes=verify_writes)
        self.k, self.m = k, len(members) - k
        self.stripes = k
        self.segment_bytes = segment_bytes(
            min(member.backend.segment_bytes for member in members), k
        )
        self._encoder = zfec.Encoder(k, len(members))
        self._decoder = zfec.Decoder(k, len(members))

    def _askable(self, name: SegmentName) -> list[int]:
        """Fragments that may be asked for, those of members that are up first."""
        return [(place - name.serial) % len(self.members) for place in self._asked_in_order()]

    def _place(self, name: SegmentName, index: int) -> int:
        return (index + name.serial) % len(self.members)

    # ---------------------------------------------------------------- writing

    async def _split(self, name: SegmentName, data: Buffer) -> list[Buffer]:
        shape = Shape(len(data), self.k)
        view, stripe = memoryview(data), shape.stripe
        if len(data) < self.k * stripe:
            view = memoryview(bytes(data).ljust(self.k * stripe, b"\0"))
        blocks = [view[i * stripe : (i + 1) * stripe] for i in range(self.k)]
        parity: list[list[bytes]] = [[] for _ in range(self.m)]
        indices = list(range(self.k, self.k + self.m))
        for start in range(0, stripe, _TURN_BYTES):
            turn = [block[start : start + _TURN_BYTES] for block in blocks]
            for column, coded in zip(parity, self._encoder.encode(turn, indices), strict=True):
                column.append(coded)
            await asyncio.sleep(0)
        stripes: list[Buffer] = [block[: shape.size(i)] for i, block in enumerate(blocks)]
        stripes += map(b"".join, parity)
        parts: list[Buffer] = [b""] * len(stripes)
        for index, part in enumerate(stripes):
            parts[self._place(name, index)] = pack(name, shape, self.m, index, part)
        return parts

    def part_bytes(self, name: SegmentName, place: int, whole: int) -> int:
        index = (place - name.serial) % len(self.members)
        return HEADER_BYTES + Shape(whole, self.k).size(index)

    def _whole(self, name: SegmentName, sizes: dict[int, int]) -> int:
        """Exact where all stripes are listed, else rounded up to whole ones."""
        # Torn ones, and what others left under such a name, may be shorter than their header.
        stripes = {place: max(size - HEADER_BYTES, 0) for place, size in sizes.items()}
        data = [stripes.get(self._place(name, index)) for index in range(self.k)]
        if None in data:
            return self.k * max(stripes.values())
        return sum(size for size in data if size is not None)

    # ---------------------------------------------------------------- reading

    async def get(self, reads: Sequence[Read]) -> list[Buffer | VswapError]:
        results: list[Buffer | VswapError] = [PageLost("not read")] * len(reads)
        asks: dict[int, list[Read]] = {}
        asked: dict[int, list[int]] = {}
        for i, read in enumerate(reads):
            place = self._direct(read)
            if place is not None:
                offset = HEADER_BYTES + read.offset % Shape(read.whole, self.k).stripe
                asks.setdefault(place, []).append(Read(read.name, offset, read.length))
                asked.setdefault(place, []).append(i)
        for some, found in zip(asked.values(), await self._get_parts(asks), strict=True):
            for i, answer in zip(some, found, strict=True):
                results[i] = answer
        rest = [i for i, result in enumerate(results) if isinstance(result, VswapError)]
        if rest:
            for i, result in zip(
                rest, await self._get_pieces([reads[i] for i in rest]), strict=True
            ):
                results[i] = result
        return results

    def _direct(self, read: Read) -> int | None:
        """The server that has the whole range as it is and is up: the case that matters."""
        if not read.whole or read.offset + read.length > read.whole:
            return None
        stripe = Shape(read.whole, self.k).stripe
        index = read.offset // stripe
        place = self._place(read.name, index)
        inside = read.offset + read.length <= (index + 1) * stripe
        return place if inside and self.members[place].up else None

    async def _get_pieces(self, reads: Sequence[Read]) -> list[Buffer | VswapError]:
        """Of ranges that lie on several servers, or on one that does not have or give them."""
        shapes = await self._shapes(reads)
        pieces = [
            list(self._cut(read, shape)) if isinstance(shape, Shape) else []
            for read, shape in zip(reads, shapes, strict=True)
        ]
        found = iter(await self._fetch([piece for some in pieces for piece in some]))
        results: list[Buffer | VswapError] = []
        for read, shape, some in zip(reads, shapes, pieces, strict=True):
            if isinstance(shape, VswapError):
                results.append(shape)
                continue
            parts = list(islice(found, len(some)))
            bad = next((part for part in parts if isinstance(part, VswapError)), None)
            if read.offset + read.length > shape.whole:
                bad = PageLost(f"{read.name.key} is too short")
            good = [part for part in parts if not isinstance(part, VswapError)]
            results.append(bad or (good[0] if len(good) == 1 else b"".join(good)))
        return results

    async def _shapes(self, reads: Sequence[Read]) -> list[Shape | VswapError]:
        """How each segment is cut; asks for headers where the reader does not know its length."""
        unknown = {read.name for read in reads if not read.whole}
        asked = dict(zip(unknown, await asyncio.gather(*map(self._ask, unknown)), strict=True))
        return [Shape(r.whole, self.k) if r.whole else asked[r.name] for r in reads]

    async def _ask(self, name: SegmentName) -> Shape | VswapError:
        try:
            up = self._up()
        except TierUnavailable as error:
            return error
        read = Read(name, 0, HEADER_BYTES)
        answers = await asyncio.gather(*(self._get_part(place, [read]) for place in up))
        for [answer] in answers:
            header = None if isinstance(answer, VswapError) else read_header(answer, name)
            if header is not None:
                return Shape(header.whole, self.k)
        missed = sum(isinstance(answer, PageLost) for [answer] in answers)
        if missed > self.m:
            return PageLost(f"{name.key} is missing on {missed} servers")
        return TierUnavailable(f"{name.key}: {self._too_few(len(up) - missed)}")

    def _cut(self, read: Read, shape: Shape) -> Iterable[_Piece]:
        start, end = read.offset, min(read.offset + read.length, shape.whole)
        while start < end:
            index, offset = divmod(start, shape.stripe)
            length = min(end - start, shape.stripe - offset)
            yield _Piece(read.name, shape, index, offset, length)
            start += length

    async def _fetch(self, pieces: Sequence[_Piece]) -> list[Buffer | VswapError]:
        """Each piece from where it lies, else decoded from what others have."""
        results: list[Buffer | VswapError] = [b""] * len(pieces)
        pending = list(range(len(pieces)))
        while pending:
            asks: list[tuple[_Piece, int]] = []
            waiting = []
            for i in pending:
                piece = pieces[i]
                indices = self._next(piece)
                if piece.index in piece.have or len(piece.have) >= self.k:
                    results[i] = await self._decode(piece)
                    if piece.missed:
                        self.on_damage(piece.name, piece.missed)
                elif not indices:
                    results[i] = self._lost(piece)
                else:
                    asks += [(piece, index) for index in indices]
                    waiting.append(i)
            await self._ask_for(asks)
            pending = waiting
        return results

    def _next(self, piece: _Piece) -> Sequence[int]:
        """The fragments to ask for now: the one itself, else as many others as it takes."""
        own = piece.index
        if not piece.asked and self.members[self._place(piece.name, own)].up:
            return [own]
        piece.have |= _zeros(piece, self.k)
        missing = self.k - len(piece.have)
        others = [
            index for index in self._askable(piece.name)
            if index not in piece.have and not piece.asked >> index & 1
        ]  # fmt: skip
        return others[:missing] if len(others) >= missing else []

    async def _ask_for(self, asks: Sequence[tuple[_Piece, int]]) -> None:
        by_place: dict[int, list[tuple[_Piece, int]]] = {}
        for piece, index in asks:
            piece.asked |= 1 << index
            by_place.setdefault(self._place(piece.name, index), []).append((piece, index))
        answers = await self._get_parts(
            {
                place: [_range(piece, index) for piece, index in some]
                for place, some in by_place.items()
            }
        )
        for (place, some), found in zip(by_place.items(), answers, strict=True):
            for (piece, index), answer in zip(some, found, strict=True):
                if not isinstance(answer, VswapError):
                    short = piece.length - len(answer)
                    piece.have[index] = (
                        bytes(answer).ljust(piece.length, b"\0") if short else answer
                    )
                elif isinstance(answer, PageLost):
                    piece.missed |= 1 << place

    def _lost(self, piece: _Piece) -> VswapError:
        if piece.missed:
            self.on_damage(piece.name, piece.missed)
        if piece.missed.bit_count() > self.m:
            return PageLost(f"{piece.name.key}: {piece.missed.bit_count()} fragments are missing")
        return TierUnavailable(f"{piece.name.key}: {self._too_few(len(piece.have))}")

    async def _decode(self, piece: _Piece) -> Buffer:
        if piece.index in piece.have:
            return piece.have[piece.index]
        indices = sorted(piece.have)[: self.k]
        blocks = [memoryview(piece.have[index]) for index in indices]
        parts = []
        for start in range(0, piece.length, _TURN_BYTES):
            turn = [block[start : start + _TURN_BYTES] for block in blocks]
            parts.append(self._decoder.decode(turn, indices)[piece.index])
            if start:
                await asyncio.sleep(0)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    # ---------------------------------------------------------------- bad bytes

    async def alternatives(self, read: Read) -> AsyncIterator[Buffer]:
        """First from fragments whose own hash is right; then whatever K others say."""
        [shape] = await self._shapes([read])
        if isinstance(shape, VswapError):
            return
        good, _ = await self._good(read.name, shape)
        if len(good) >= self.k:
            # These are what was written: nothing else can be any better.
            yield await self._from_good(read, shape, good)
            return
        pieces = list(self._cut(read, shape))
        if len(pieces) == 1:
            async for other in self._from_any(pieces[0], good):
                yield other

    async def verify(self, name: SegmentName, whole: int) -> int:
        return (await self._good(name, Shape(whole, self.k)))[1]

    async def _good(self, name: SegmentName, shape: Shape) -> tuple[dict[int, Buffer], int]:
        """Reads whole fragments: stripes (as long as the first one) that are as they were written,
        by index, and the members that answered and have none, as bits."""
        piece = _Piece(name, shape, 0, -HEADER_BYTES, shape.stripe + HEADER_BYTES)
        await self._ask_for([(piece, index) for index in self._askable(name)])
        good: dict[int, Buffer] = {}
        bad = piece.missed
        for index, data in piece.have.items():
            size = HEADER_BYTES + shape.size(index)
            stripe = stripe_of(memoryview(data)[:size], name, shape, self.m, index)
            if stripe is None:
                bad |= 1 << self._place(name, index)
            else:
                good[index] = bytes(stripe).ljust(shape.stripe, b"\0")
        if bad:
            self.on_damage(name, bad)
        return good, bad

    async def _from_good(self, read: Read, shape: Shape, good: dict[int, Buffer]) -> Buffer:
        stripes = [
            await self._decode(_Piece(read.name, shape, index, 0, shape.stripe, dict(good)))
            for index in range(self.k)
        ]
        return b"".join(stripes)[read.offset : read.offset + read.length]

    async def _from_any(self, piece: _Piece, good: dict[int, Buffer]) -> AsyncIterator[Buffer]:
        """What the range may be: as it is stored, then by what is known to be right together with
        sets of what may be: a fragment that is bad somewhere is mostly right here."""
        end = piece.offset + piece.length
        known: dict[int, Buffer] = {
            index: memoryview(stripe)[piece.offset : end] for index, stripe in good.items()
        }
        known |= _zeros(piece, self.k)
        if piece.index in known:
            yield known[piece.index]
            return
        some = [index for index in self._askable(piece.name) if index not in known]
        await self._ask_for([(piece, index) for index in some])
        if piece.index in piece.have:
            yield piece.have.pop(piece.index)
        for subset in _some_sets(sorted(piece.have), max(self.k - len(known), 0)):
            chosen = known | {index: piece.have[index] for index in subset}
            again = _Piece(piece.name, piece.shape, piece.index, piece.offset, piece.length, chosen)
            yield await self._decode(again)


def _zeros(piece: _Piece, k: int) -> dict[int, Buffer]:
    """Of a short segment: the end of the last stripes is nothing but zeros."""
    ended = [index for index in range(k) if piece.shape.size(index) <= piece.offset]
    return {index: bytes(piece.length) for index in ended}


def _some_sets(items: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """Sets of ``count`` items, drawn: in their own order the first ones all begin alike."""
    every = list(combinations(items, count))
    Random(0).shuffle(every)
    return every[:_SUBSETS]


def _range(piece: _Piece, index: int) -> Read:
    """The piece's range in another fragment, as far as that goes."""
    length = min(piece.length, piece.shape.size(index) - piece.offset)
    return Read(piece.name, HEADER_BYTES + piece.offset, length)
