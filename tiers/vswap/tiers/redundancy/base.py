"""What mirrors and codes share: one segment on several servers, any ``need`` of which are enough.

A member is up or down. It goes down with the first call that fails, is left out from then on, and
comes back only by :meth:`Redundant.restore`: whoever holds the backend opens it again, looks up
what it missed or lost, and only then lets it serve. Until somebody found that it does not answer,
such a member is *doubtful*: asked where there is no other way. That is safe, since segments never
change and every reader checks what it gets; so a burst of timeouts under load fails nothing.

A write succeeds once ``need`` members have it, and reads go on while ``need`` members are up. Every
member that is to have a part of a segment and has none is told to ``on_damage``, for a write before
``put`` returns: so the caller can note it before it relies on the segment.
"""

from __future__ import annotations

import abc
import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass

from vswap.tiers.backend import Backend, Buffer, Listed, Read, SegmentName, Usage
from vswap.wire.errors import (
    BackendRefused,
    OutcomeUnknown,
    PageLost,
    SegmentExists,
    TierUnavailable,
    VswapError,
)


@dataclass(slots=True)
class Member:
    """One server of a redundant tier. ``label`` is its URL without secrets."""

    label: str
    backend: Backend
    up: bool = False
    error: str = ""
    """Why it is down; for people."""
    doubtful: bool = False
    """It went down, and whether it answers has not been tried since."""


class Redundant(Backend):
    """A backend over several. ``members`` keep their place for the life of the tier."""

    def __init__(self, members: Sequence[Member], need: int, *, verify_writes: bool) -> None:
        self.members = list(members)
        self.need = need
        self._verify_writes = verify_writes
        self._putting: dict[SegmentName, asyncio.Event] = {}
        self.gap_bytes = min(member.backend.gap_bytes for member in members)
        self.on_damage: Callable[[SegmentName, int], None] = lambda name, places: None
        """Told of a segment and, as bits, of the members that should have a part of it and have
        none, or a bad one. May be told again and again."""
        self.outages = 0
        """How often a member did not answer: who compares two readings knows whether all did."""

    # ---------------------------------------------------------------- what subclasses are about

    @abc.abstractmethod
    async def _split(self, name: SegmentName, data: Buffer) -> list[Buffer]:
        """What each member is to store."""

    @abc.abstractmethod
    def part_bytes(self, name: SegmentName, place: int, whole: int) -> int:
        """How much a member stores of a segment of ``whole`` bytes."""

    @abc.abstractmethod
    async def verify(self, name: SegmentName, whole: int) -> int:
        """Reads every part of a segment of ``whole`` bytes; the members, as bits, that have none or
        a bad one. They are told to ``on_damage`` as well. Members that are down are not asked."""

    @abc.abstractmethod
    def _whole(self, name: SegmentName, sizes: dict[int, int]) -> int:
        """The segment's length from what members store of it, by place."""

    # ---------------------------------------------------------------- members

    @property
    def down(self) -> int:
        """The members that are down, as bits."""
        return sum(1 << place for place, member in enumerate(self.members) if not member.up)

    @property
    def usable(self) -> bool:
        """Enough members are up to read and write."""
        return len(self.members) - self.down.bit_count() >= self.need

    def check_all_up(self) -> None:
        """For whom the least thing left on a server would be too much. Raises TierUnavailable."""
        for member in self.members:
            if not member.up:
                raise TierUnavailable(f"{member.label}: {member.error}")

    def failed(self, place: int, error: VswapError) -> None:
        """Leaves a member out until it is restored."""
        self.outages += 1
        member = self.members[place]
        if member.up:
            member.up, member.doubtful = False, True
        member.error = error.message

    def given_up(self, place: int, error: VswapError) -> None:
        """A member that was down could not be opened again: nobody asks it from now on."""
        member = self.members[place]
        member.up, member.doubtful, member.error = False, False, error.message

    def restore(self, place: int) -> None:
        """Lets a member serve again: its backend is open, and what it lacks is known."""
        member = self.members[place]
        member.up, member.doubtful, member.error = True, False, ""

    def replace(self, place: int, label: str, backend: Backend) -> None:
        """Another server in the place of one; down until it is restored. Close the old one."""
        self.members[place] = Member(label, backend, error="is new here")

    def _up(self) -> list[int]:
        """Places of the members that are up, of doubtful ones as well if these are too few.

        Raises TierUnavailable if that is not enough.
        """
        up = self._asked_in_order()
        sure = sum(self.members[place].up for place in up)
        if len(up) < self.need:
            raise TierUnavailable(self._too_few(sure))
        return up[: max(sure, self.need)]

    def _asked_in_order(self, first: int = 0) -> list[int]:
        """Members that may be asked: those that are up, from ``first`` on; then doubtful ones."""
        count = len(self.members)
        turn = [place % count for place in range(first, first + count)]
        up = [place for place in turn if self.members[place].up]
        return up + [place for place in turn if self.members[place].doubtful]

    def _too_few(self, count: int) -> str:
        errors = "; ".join(f"{m.label}: {m.error}" for m in self.members if not m.up)
        return f"{count} of {len(self.members)} servers are up, {self.need} are needed ({errors})"

    async def open(self) -> None:
        """Opens all members at once. Those that cannot be opened are down, if enough others can."""

        async def attempt(place: int, member: Member) -> VswapError | None:
            try:
                await member.backend.open()
            except VswapError as error:
                self.given_up(place, error)
                return error
            self.restore(place)
            return None

        errors = await asyncio.gather(*(attempt(*each) for each in enumerate(self.members)))
        failures = [error for error in errors if error is not None]
        if len(errors) - len(failures) < self.need:
            refused = [error for error in failures if isinstance(error, BackendRefused)]
            raise (refused or failures)[0]

    async def check(self) -> None:
        """Leaves out members that became unfit, as long as there are enough others."""
        for place in [place for place, member in enumerate(self.members) if member.up]:
            try:
                await self.members[place].backend.check()
            except BackendRefused as error:
                if len(self.members) - self.down.bit_count() <= self.need:
                    raise
                self.failed(place, error)
            except VswapError as error:
                self.failed(place, error)

    async def close(self) -> None:
        await asyncio.gather(*(member.backend.close() for member in self.members))

    # ---------------------------------------------------------------- segments

    async def put(self, name: SegmentName, data: Buffer) -> None:
        # Two writers of one name must not each win on some members.
        while (other := self._putting.get(name)) is not None:
            await other.wait()
        self._putting[name] = asyncio.Event()
        try:
            await self._put(name, data)
        finally:
            self._putting.pop(name).set()

    async def _put(self, name: SegmentName, data: Buffer) -> None:
        up = self._up()
        parts = await self._split(name, data)
        outcomes = await asyncio.gather(*(self._put_part(p, name, parts[p]) for p in up))
        errors = [error for error in outcomes if error is not None]
        kept = [place for place, error in zip(up, outcomes, strict=True) if error is None]
        exists = next((error for error in errors if isinstance(error, SegmentExists)), None)
        if exists is not None:
            # Those who had it have another segment of that name: ours must not mix with it.
            await asyncio.gather(*(self._delete_part(place, [name]) for place in kept))
            raise exists
        if len(kept) < self.need:
            if not kept and all(isinstance(error, TierUnavailable) for error in errors):
                raise errors[0]
            raise OutcomeUnknown(f"{name.key}: {self._too_few(len(kept))}")
        lacking = (1 << len(self.members)) - 1
        for place in kept:
            lacking &= ~(1 << place)
        if lacking:
            self.on_damage(name, lacking)

    async def _put_part(self, place: int, name: SegmentName, part: Buffer) -> VswapError | None:
        backend = self.members[place].backend
        try:
            await backend.put(name, part)
            if self._verify_writes:
                [got] = await backend.get([Read(name, 0, len(part))])
                if isinstance(got, VswapError) or got != part:
                    raise OutcomeUnknown(f"{name.key} is not what was written")
        except SegmentExists as error:
            return error
        except VswapError as error:
            self.failed(place, error)
            return error
        return None

    async def delete(self, names: Sequence[SegmentName]) -> None:
        """Returns once every member that is up has deleted them. What others still have is theirs
        to lose before they are restored."""
        outcomes = await asyncio.gather(*(self._delete_part(place, names) for place in self._up()))
        if all(outcomes) and outcomes[0] is not None:
            raise outcomes[0]

    async def _delete_part(self, place: int, names: Sequence[SegmentName]) -> VswapError | None:
        try:
            await self.members[place].backend.delete(names)
        except VswapError as error:
            self.failed(place, error)
            return error
        return None

    async def _get_parts(
        self, by_place: Mapping[int, Sequence[Read]]
    ) -> Sequence[Sequence[Buffer | VswapError]]:
        """Reads of several members, side by side; of one alone without the cost of a task."""
        calls = [self._get_part(place, reads) for place, reads in by_place.items()]
        return [await calls[0]] if len(calls) == 1 else await asyncio.gather(*calls)

    async def _get_part(self, place: int, reads: Sequence[Read]) -> Sequence[Buffer | VswapError]:
        answers = await self.members[place].backend.get(reads)
        for answer in answers:
            if isinstance(answer, VswapError) and not isinstance(answer, PageLost):
                self.failed(place, answer)
                break
        return answers

    # ---------------------------------------------------------------- as a whole

    async def list(self, prefix: str) -> AsyncIterator[Listed]:
        """What any member that is up lists: strays on a single one as well."""
        sizes: dict[str, dict[int, int]] = {}

        async def look(place: int) -> VswapError | None:
            try:
                async for listed in self.members[place].backend.list(prefix):
                    sizes.setdefault(listed.key, {})[place] = listed.bytes
            except VswapError as error:
                self.failed(place, error)
                return error
            return None

        outcomes = await asyncio.gather(*map(look, self._up()))
        if outcomes.count(None) < self.need:
            raise TierUnavailable(self._too_few(outcomes.count(None)))
        for key, by_place in sizes.items():
            name = SegmentName.parse(key)
            if name is not None:
                yield Listed(key, self._whole(name, by_place))

    async def usage(self) -> Usage:
        """As if of one server: what its members hold and may hold of whole segments."""
        data, members = self.need, len(self.members)

        async def ask(place: int) -> Usage | None:
            try:
                return await self.members[place].backend.usage()
            except VswapError as error:
                self.failed(place, error)
                return None

        told = [usage for usage in await asyncio.gather(*map(ask, self._up())) if usage is not None]
        if len(told) < data:
            raise TierUnavailable(self._too_few(len(told)))
        used = [usage.used_bytes for usage in told if usage.used_bytes is not None]
        limits = [usage.limit_bytes for usage in told if usage.limit_bytes is not None]
        return Usage(
            sum(used) * data // len(used) if len(used) == len(told) else None,
            min(limits) * data if len(limits) == members else None,
        )
