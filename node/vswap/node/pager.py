"""The pager: store, load, exclusive load and free, in batches.

Every batch is atomic: an operation that raises has changed nothing. Between two awaits everything
is atomic too, since the event loop is the only writer; what an operation saw before an await is
checked again after it.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np
from xxhash import xxh3_64_intdigest

from vswap.node import entry
from vswap.node.codecs import Codecs
from vswap.node.fill import find_fills
from vswap.node.grants import Grants
from vswap.node.handles import Handles
from vswap.node.ledger import Ledger
from vswap.node.log import STORES, Placed
from vswap.node.reader import READS, Found, Reader
from vswap.node.reaper import Reaper
from vswap.node.resident import Resident
from vswap.node.spaces import MAX_PAGE_BYTES, Space
from vswap.node.tickets import Tickets
from vswap.node.tier import Tier, TierState
from vswap.node.tiers import Tiers
from vswap.tiers.backend import Buffer
from vswap.tiers.record import (
    HEADER_BYTES,
    I64,
    ROW_BYTES,
    U8,
    U64,
    Mask,
    Records,
    identity,
    raw_meta,
)
from vswap.wire.errors import (
    OutcomeUnknown,
    OutOfTiers,
    PageCorrupt,
    PageLost,
    SlotNotFound,
    SlotOutOfRange,
    SpaceFull,
    StaleIncarnation,
    TierUnavailable,
    UnknownSpace,
    VswapError,
)

_ZERO_PAGE = memoryview(bytes(MAX_PAGE_BYTES))
_WARM_EVERY = 4
"""Of so many batches that are peeked at in RAM one counts as warmth: a sample tells as much."""
_INLINE_PAGES = 64
"""Pages that are encoded in the turn in which they arrive, as many as a socket holds: 0.7 ms."""
_MAX_TOKENS = 4096
_RECLAIM_DEADLINE_S = 10.0
_RECLAIM_TRIES = 64


@dataclass(slots=True)
class _Exclusive:
    """An exclusive load that waits for its confirmation."""

    space: Space
    slots: U64
    seen: list[int]
    """The newest ticket of each slot at load time: any other now means it was stored since."""
    expires_at: float


class _Overtaken(Exception):
    """A slot was stored or freed since it was read."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a batch that lies in a tier, not yet in the table."""

    tier: Tier
    placed: Placed
    of: slice
    """Which of the batch's pages that are no fill pages."""
    cost: int
    """Bytes of its records, as limits count them."""


class Pager:
    """The data plane of a shard. All methods run on the event loop, concurrently.

    Arrays: slots are uint64 (n,), pages uint8 (n, page_bytes), C-contiguous and not changed by the
    caller until the call returns.
    """

    def __init__(
        self,
        handles: Handles,
        ledger: Ledger,
        tiers: Tiers,
        codecs: Codecs,
        reader: Reader,
        reaper: Reaper,
        *,
        clock: Callable[[], float],
        make_room: Callable[[list[tuple[Tier, int]]], Awaitable[bool]],
        grants: Grants,
        exclusive_timeout_s: float,
    ) -> None:
        self._handles = handles
        self._ledger = ledger
        self._tiers = tiers
        self._codecs = codecs
        self._reader = reader
        self._resident = Resident(handles)
        self._peeks = 0
        self._reaper = reaper
        self._clock = clock
        self._make_room = make_room
        self._grants = grants
        self._exclusive_timeout_s = exclusive_timeout_s
        self._tickets = Tickets()
        self._staged: Counter[tuple[int, int]] = Counter()
        """By space number and tag; see :meth:`_stage`."""
        self._tokens: OrderedDict[int, _Exclusive] = OrderedDict()
        self._confirmed: OrderedDict[int, int] = OrderedDict()
        self.counters: Counter[str] = Counter()
        self.on_hot: Callable[[Space, U64, U64, Found], None] | None = None
        """Told of repeatedly loaded pages outside RAM: the promoter's ear."""

    # ---------------------------------------------------------------- store

    async def store(self, space: Space, slots: U64, pages: U8) -> None:
        """Stores pages; returns once every one of them is where a load finds it.

        A slot that occurs twice takes the last page. Raises SlotOutOfRange, SpaceFull (quota),
        OutOfTiers (nothing has room), TierUnavailable (room may come back), UnknownSpace (deleted
        meanwhile).
        """
        self._check(space, slots)
        if not len(slots):
            return
        slots, pages = _last_wins(slots, pages)
        if self.store_now(space, slots, pages):
            return
        listed = slots.tolist()
        self._tickets.begin(space.number, listed)
        try:
            await self._store(space, slots, listed, pages)
        finally:
            self._tickets.end(space.number, listed)

    def store_now(self, space: Space, slots: U64, pages: U8, hashes: U64 | None = None) -> bool:
        """:meth:`store` in one turn, where the fastest tier is RAM and has room, and the pages are
        few or stored as they are. False = nothing happened: ask :meth:`store`, which waits, or
        says what is wrong.

        With ``hashes`` (n,), their xxh3, the pages are the first ones of the :meth:`window`, and
        the slots are distinct.
        """
        tier = self._fast_tier(space)
        if tier is None or not (tier.codec.is_none or len(slots) <= _INLINE_PAGES):
            return False
        if hashes is None and len(set(slots.tolist())) < len(slots):
            return False
        self._check(space, slots)
        fills, _ = find_fills(pages)
        if np.count_nonzero(fills):
            return False
        ticket = self._handles.take_sequences(1)
        try:
            if tier.codec.is_none:
                self._put_raw(space, tier, slots, pages, hashes, ticket)
            else:
                self._put_encoded(space, tier, slots, pages, ticket)
        except OutOfTiers:
            return False
        self._tickets.flip(space.number, slots, ticket)
        self.counters["pages_stored"] += len(slots)
        return True

    def _put_raw(
        self, space: Space, tier: Tier, slots: U64, pages: U8, hashes: U64 | None, ticket: int
    ) -> None:
        meta = raw_meta(ticket, space.page_shift)
        source = pages if hashes is None else None
        if hashes is None:
            hashes = np.fromiter(map(xxh3_64_intdigest, pages), np.uint64, len(pages))
        sums = identity(space.number, slots, meta)
        sums ^= hashes
        log = self._tiers.ram_log(tier)
        placed, places = log.place_raw(
            source, space.page_bytes, space.number, slots, sums, meta
        )  # fmt: skip
        try:
            size = space.page_bytes + HEADER_BYTES
            self._ledger.put(space, slots, placed.words, tier.tag, places, size)
        finally:
            log.settle(placed)

    def _put_encoded(self, space: Space, tier: Tier, slots: U64, pages: U8, ticket: int) -> None:
        encoded, ids = tier.codec.encode(pages)
        log = self._tiers.ram_log(tier)
        meta = raw_meta(ticket, space.page_shift)
        placed, places = log.place_encoded(encoded, ids, space.number, slots, meta)
        try:
            self._ledger.put(space, slots, placed.words, tier.tag, places)
        finally:
            log.settle(placed)

    def window(self, space: Space) -> U8 | None:
        """Where :meth:`store_now` would put the next pages, so that whoever receives pages can
        receive them there: (n, record bytes), each page behind its header. None = not now. Good
        until the caller gives way to the event loop, or stores anything."""
        tier = self._fast_tier(space)
        if tier is None or not tier.codec.is_none:
            return None
        try:
            return self._tiers.ram_log(tier).window(space.page_bytes)
        except OutOfTiers:
            return None

    def _fast_tier(self, space: Space) -> Tier | None:
        """The fastest tier, if it is RAM and takes pages, without a limit to be looked at."""
        limits = space.limits
        if space.deleted or limits.quota_bytes or limits.tier_max_bytes:
            return None
        for tier in self._tiers.ranked:
            if limits.allows(tier.name):
                return tier if tier.ram is not None and tier.writable else None
        return None

    async def fill(self, space: Space, slots: U64, pattern: int = 0) -> None:
        """Stores the same fill page in distinct slots; see :meth:`store`. One turn."""
        self._check(space, slots)
        words = entry.fill_words(np.full(len(slots), pattern, np.uint32))
        self._commit(space, slots, slots.tolist(), words, self._handles.take_sequences(1))
        self.counters["pages_stored"] += len(slots)

    async def update(self, space: Space, slots: U64, edit: Callable[[U8], None]) -> None:
        """Changes pages in place: reads distinct slots (zeros where there is no page), hands the
        pages to ``edit``, stores them; as if all in one moment.

        Where a slot was stored or freed meanwhile, it begins again: ``edit`` may be called more
        than once. Raises as :meth:`load` and :meth:`store` do.
        """
        listed = slots.tolist()
        self._tickets.begin(space.number, listed)
        try:
            while True:
                self._check(space, slots)
                seen = self._tickets.newest(space.number, listed)
                pages = await self.read(space, slots)
                edit(pages)
                try:
                    await self._store(space, slots, listed, pages, seen)
                except _Overtaken:
                    continue
                return
        finally:
            self._tickets.end(space.number, listed)

    async def _store(
        self, space: Space, slots: U64, listed: list[int], pages: U8, seen: list[int] | None = None
    ) -> None:
        ticket = self._handles.take_sequences(1)
        fills, patterns = find_fills(pages)
        words = entry.fill_words(patterns)
        if fills.all():
            self._commit(space, slots, listed, words, ticket, seen)
        else:
            await self._store_real(space, slots, listed, words, ~fills, pages, ticket, seen)
        self.counters["pages_stored"] += len(slots)

    async def _store_real(
        self, space: Space, slots: U64, listed: list[int], words: U64, real: Mask, pages: U8,
        ticket: int, seen: list[int] | None,
    ) -> None:  # fmt: skip
        every = bool(real.all())
        real_slots = slots if every else slots[real]
        real_pages = pages if every else pages[real]
        encoded: dict[str, Records] = {}

        async def records_for(tier: Tier) -> Records:
            found = encoded.get(tier.spec.codec)
            if found is None:
                n = len(real_slots)
                found = encoded[tier.spec.codec] = await self._codecs.encode(
                    tier.codec, real_pages,
                    space=np.full(n, space.number, np.uint32), slot=real_slots.astype(np.uint32),
                    sequence=np.full(n, ticket, np.uint64),
                    page_shift=np.full(n, space.page_shift, np.uint64),
                )  # fmt: skip
            return found

        done: list[_Part] = []
        whole = slice(0, len(real_slots))
        try:
            await self._place(space, slots, whole, records_for, done)
            located = np.empty(len(real_slots), np.uint64)
            for part in done:
                located[part.of] = part.placed.words
            words[real] = located
            self._commit(space, slots, listed, words, ticket, seen)
        except SpaceFull:
            space.events["quota"] += 1
            raise
        except OutOfTiers:
            space.events["out_of_tiers"] += 1
            raise
        finally:
            for part in done:
                self._stage(space, part.tier, -part.cost)
                self._tiers.settle(part.tier, part.placed)

    async def _place(
        self, space: Space, slots: U64, part: slice,
        records_for: Callable[[Tier], Awaitable[Records]], done: list[_Part],
        *, patient: bool = True,
    ) -> None:  # fmt: skip
        """Places a part of the batch in one tier, or, where none takes all of it, in halves.

        What was placed is added to ``done``, also when the rest then finds no room; the error is
        that of the largest part. Once a part has waited for reclaim and grants, its halves take
        what there is.
        """
        try:
            done.append(await self._place_in_one(space, slots, part, records_for, patient))
        except (OutOfTiers, SpaceFull, TierUnavailable) as error:
            # Less would not help where the space is full; where its share of a tier is, it may.
            if _is_quota(error) or part.stop - part.start < 2:
                raise
            patient = patient and isinstance(error, SpaceFull)
            middle = (part.start + part.stop) // 2
            try:
                for half in (slice(part.start, middle), slice(middle, part.stop)):
                    await self._place(space, slots, half, records_for, done, patient=patient)
            except (OutOfTiers, SpaceFull, TierUnavailable):
                raise error from None

    async def _place_in_one(
        self, space: Space, slots: U64, part: slice,
        records_for: Callable[[Tier], Awaitable[Records]], patient: bool,
    ) -> _Part:  # fmt: skip
        """Finds room: RAM at once, else RAM after reclaim, else straight to a slower tier."""
        allowed = [tier for tier in self._tiers if space.limits.allows(tier.name)]
        memory = [tier for tier in allowed if tier.ram is not None]
        refused: dict[Tier, VswapError] = {}
        need = (part.stop - part.start) * space.page_bytes
        deadline = self._clock() + _RECLAIM_DEADLINE_S
        for _ in range(_RECLAIM_TRIES):
            full: list[tuple[Tier, int]] = []
            for tier in memory:
                if not tier.writable:
                    continue
                records = (await records_for(tier)).take(part)
                need = int(records.cost.sum())
                try:
                    self._check_limits(space, slots, need, tier)
                    placed = self._tiers.ram_log(tier).place(records, STORES)
                except SpaceFull as error:
                    refused[tier] = error
                except OutOfTiers as error:
                    refused[tier] = error
                    full.append((tier, need))
                else:
                    self._stage(space, tier, need)
                    return _Part(tier, placed, part, need)
            if not patient or not full or self._clock() > deadline:
                break
            if not await self._make_room(full):
                break
        for tier in allowed:
            if tier.ram is not None or not tier.writable:
                continue
            records = (await records_for(tier)).take(part)
            need = int(records.cost.sum())
            while True:
                try:
                    self._check_limits(space, slots, need, tier)
                    placed = await self._write(space, tier, records, need)
                    return _Part(tier, placed, part, need)
                except SpaceFull as error:
                    refused[tier] = error
                    break
                except OutOfTiers as error:
                    refused[tier] = error
                    # What the log needs is more than the records: it may take several segments.
                    wanted = int(error.fields.get("need", need))
                    if not patient or not await self._grants.want(tier, wanted):
                        break
                except (TierUnavailable, OutcomeUnknown):
                    break
        untried = [tier.tried for tier in allowed if not tier.tried.done()]
        if untried:
            # The node was just started: what none of the others takes waits for these.
            await asyncio.wait(untried, return_when=asyncio.FIRST_COMPLETED)
            return await self._place_in_one(space, slots, part, records_for, patient)
        raise self._refusal(space, allowed, list(refused.values()), need)

    async def _write(self, space: Space, tier: Tier, records: Records, need: int) -> Placed:
        """Staged from before the write: whoever checks a limit meanwhile must see it."""
        self._stage(space, tier, need)
        try:
            return await self._tiers.segment_log(tier).place([records], compacting=False)
        except BaseException:
            self._stage(space, tier, -need)
            raise

    def _stage(self, space: Space, tier: Tier, size_bytes: int) -> None:
        """Counts bytes that are placed in a tier and not yet flipped."""
        key = space.number, tier.tag
        self._staged[key] += size_bytes
        if not self._staged[key]:
            del self._staged[key]

    def _refusal(
        self, space: Space, allowed: list[Tier], refused: list[VswapError], need: int
    ) -> VswapError:
        """What to tell the client: the quota, what may come back, a limit, or no room."""
        limits = [error for error in refused if isinstance(error, SpaceFull)]
        if limits and all(map(_is_quota, refused)):
            return limits[-1]
        sick = [t for t in allowed if not t.writable and t.state is TierState.ACTIVE]
        if sick:
            return TierUnavailable(
                f"no room for {need} bytes, and some tiers cannot be written now ({_named(sick)})",
                tier=sick[0].name, need=need,
            )  # fmt: skip
        undecided = [t for t in allowed if self._grants.undecided(t)]
        if undecided:
            return TierUnavailable(
                f"no room for {need} bytes, and the coordinator, which may grant more "
                f"({_named(undecided)}), does not answer",
                tier=undecided[0].name, need=need,
            )  # fmt: skip
        if limits and len(limits) == len(refused):
            return next(error for error in limits if not _is_quota(error))
        return OutOfTiers(
            f"space {space.name!r}: no allowed tier has room for {need} bytes of pages "
            f"({_named(allowed) or 'no tier is allowed'})",
            space=space.name, need=need, tiers=[t.name for t in allowed],
        )  # fmt: skip

    def _check_limits(self, space: Space, slots: U64, added: int, tier: Tier) -> None:
        """Raises SpaceFull if replacing these slots by ``added`` bytes in ``tier`` breaks a limit.

        What the slots charge now counts as freed, and what is staged as stored.
        """
        self._check_quota(space, slots, added)
        self._check_tier(space, slots, added, tier, self._staged.get((space.number, tier.tag), 0))

    def _check_quota(self, space: Space, slots: U64, added: int) -> None:
        quota = space.limits.quota_bytes
        if not quota:
            return
        room = quota - space.live_bytes + int(_charges(space, slots)[1].sum())
        if added > room:
            raise SpaceFull(
                f"space {space.name!r}: quota of {quota} bytes has room for {max(room, 0)}, "
                f"not for {added}",
                space=space.name, need=added, room=max(room, 0),
            )  # fmt: skip

    def _check_tier(
        self, space: Space, slots: U64, added: int, tier: Tier, staged: int = 0
    ) -> None:
        most = space.limits.tier_max_bytes.get(tier.name)
        if most is None:
            return
        tags, cost = _charges(space, slots)
        stored = int(space.bytes_by_tag[tier.tag]) + staged
        room = most - stored + int(cost[tags == tier.tag].sum())
        if added > room:
            raise SpaceFull(
                f"space {space.name!r} may hold {most} bytes in tier {tier.name}, "
                f"which has room for {max(room, 0)}, not for {added}",
                space=space.name, need=added, room=max(room, 0), tier=tier.name,
            )  # fmt: skip

    def _check_all(self, space: Space, slots: U64, words: U64) -> None:
        """Raises SpaceFull if these entries, in the place of the present ones, break a limit."""
        tags = entry.tags(words)
        cost = np.where(tags >= entry.FIRST_TIER, entry.sizes(words) + ROW_BYTES, 0)
        if cost.any():
            self._check_quota(space, slots, int(cost.sum()))
            for tag in np.unique(tags[cost > 0]).tolist():
                added = int(cost[tags == tag].sum())
                self._check_tier(space, slots, added, self._tiers.by_tag(tag))

    def _commit(
        self, space: Space, slots: U64, listed: list[int], words: U64, ticket: int,
        seen: list[int] | None = None,
    ) -> None:  # fmt: skip
        """Flips what no newer operation has flipped. One turn; raises before anything changed.

        ``seen``: nothing may have flipped since these tickets, else _Overtaken.
        """
        if space.deleted:
            raise UnknownSpace(f"space {space.name!r} was deleted", space=space.name)
        if seen is not None and seen != self._tickets.newest(space.number, listed):
            raise _Overtaken
        won = self._tickets.winners(space.number, listed, ticket)
        if won is not None:
            slots, words = slots[won], words[won]
        if space.limits.quota_bytes or space.limits.tier_max_bytes:
            self._check_all(space, slots, words)
        space.table.reserve(slots)
        self._ledger.flip(space, slots, words, space.table.get(slots))
        self._tickets.flip(space.number, slots, ticket, edit=seen is not None)

    # ---------------------------------------------------------------- load

    async def load(self, space: Space, slots: U64) -> U8:
        """The pages (n, page_bytes) of slots; the stored copies stay. Slots may repeat.

        Raises SlotOutOfRange, SlotNotFound (naming the slots), PageCorrupt, PageLost,
        TierUnavailable.
        """
        self._check(space, slots)
        words = space.table.get(slots)
        out = np.empty((len(slots), space.page_bytes), np.uint8)
        await self._load(space, slots, words, out)
        self.counters["pages_loaded"] += len(slots)
        return out

    async def read(self, space: Space, slots: U64) -> U8:
        """As :meth:`load`, with zeros for slots that hold no page: what a disk does."""
        self._check(space, slots)
        words = space.table.get(slots)
        out = np.empty((len(slots), space.page_bytes), np.uint8)
        await self._load(space, slots, np.where(words == 0, entry.ZERO_WORD, words), out)
        self.counters["pages_loaded"] += len(slots)
        return out

    def peek(self, space: Space, slots: U64) -> list[Buffer | None]:
        """The pages that can be had without waiting: holes (zeros), fill pages, and what lies in
        RAM. None for all others, and for those that fail their check: :meth:`read` tells.

        Some are views of the RAM tier, good until the caller gives way to the event loop. Decodes
        on the event loop, so ask for few: 32 compressed pages take about 0.15 ms. Slots must be in
        range.
        """
        if space.deleted:
            raise UnknownSpace(f"space {space.name!r} was deleted", space=space.name)
        words = space.table.get(slots)
        tags = words >> entry.TAG_SHIFT
        first = int(tags[0])
        if np.count_nonzero(tags == first) == len(slots):
            return self._peek_tag(first, space, slots, words)
        pages: list[Buffer | None] = [None] * len(slots)
        for tag in np.unique(tags).tolist():
            index = np.flatnonzero(tags == tag)
            found = self._peek_tag(tag, space, slots[index], words[index])
            for i, page in zip(index.tolist(), found, strict=True):
                pages[i] = page
        return pages

    def _peek_tag(self, tag: int, space: Space, slots: U64, words: U64) -> list[Buffer | None]:
        """:meth:`peek` for slots whose entries have the same tag."""
        if tag == entry.FREE:
            return [_ZERO_PAGE[: space.page_bytes]] * len(slots)
        if tag == entry.FILL:
            return [
                _ZERO_PAGE[: space.page_bytes] if not pattern
                else pattern.to_bytes(4, "little") * (space.page_bytes // 4)
                for pattern in entry.lows(words).tolist()
            ]  # fmt: skip
        tier = None if tag == entry.POISON else self._tiers.by_tag(tag)
        if tier is None or tier.ram is None:
            return [None] * len(slots)
        self._peeks += 1
        if not self._peeks % _WARM_EVERY:
            space.table.warm(slots)
        self.counters["pages_loaded"] += len(slots)
        return self._resident.pages(tier, space, slots, words)

    async def _load(self, space: Space, slots: U64, words: U64, out: U8) -> None:
        tags = entry.tags(words)
        if not tags.all():
            missing = slots[tags == entry.FREE]
            raise SlotNotFound(
                f"space {space.name!r}: {len(missing)} of {len(slots)} slots hold no page "
                f"(first: {int(missing[0])})",
                space=space.name, slots=missing.tolist(),
            )  # fmt: skip
        fill = tags == entry.FILL
        if fill.any():
            out.view(np.uint32)[fill] = entry.lows(words[fill])[:, None]
            if fill.all():
                return
        if (tags == entry.POISON).any():
            raise self._poisoned(space, slots, words, tags)
        stored = np.flatnonzero(~fill)
        space.table.warm(slots[stored])
        pinned = np.unique(entry.handles(words[stored]))
        self._handles.pins[pinned] += 1
        try:
            remote: list[Awaitable[Found]] = []
            for tag in np.unique(tags[stored]).tolist():
                index = np.flatnonzero(tags == tag)
                tier = self._tiers.by_tag(tag)
                if tier.ram is not None:
                    found = self._reader.in_ram(tier, space, slots[index], words[index], index)
                    await self._deliver(space, slots, words, found, out)
                else:
                    remote.append(
                        self._reader.in_backend(tier, space, slots[index], words[index], index)
                    )
            for found in await asyncio.gather(*remote):
                self.counters["remote_pages_loaded"] += len(found.index)
                await self._deliver(space, slots, words, found, out)
        finally:
            self._reaper.unpin_many(pinned)

    async def _deliver(
        self, space: Space, slots: U64, words: U64, found: Found, out: U8, reads: int = 0
    ) -> None:
        """Verifies, decodes and scatters the records of one tier; raises if one is no good.

        A record that fails its check, or does not come whole, is read again, since a bad transfer
        is not a bad copy; and then from wherever else its tier has it. A tier that does not answer
        is not asked again.
        """
        away = [error for _, error in found.failed if not isinstance(error, PageLost)]
        if away or (found.failed and reads == READS - 1):
            error = away[0] if away else found.failed[0][1]
            kind = type(error)
            # What else it lacks, a listing tells.
            found.tier.suspect = True
            same = [index for index, other in found.failed if type(other) is kind]
            bad = slots[np.sort(np.concatenate(same))].tolist()
            raise kind(
                f"space {space.name!r}: {len(bad)} pages in tier {found.tier.name}: {error}",
                **{**error.fields, "space": space.name, "slots": bad, "tier": found.tier.name},
            )
        ok, pages = await self._codecs.decode(found.records, space.page_bytes)
        if ok.all() and not found.failed:
            out[found.index] = np.frombuffer(b"".join(pages), np.uint8).reshape(-1, out.shape[1])
            if self.on_hot is not None and found.tier.ram is None:
                self.on_hot(space, slots, words, found)
            return
        for i in np.flatnonzero(ok).tolist():
            out[found.index[i]] = np.frombuffer(pages[i], np.uint8)
        bad_index = np.concatenate([found.index[~ok], *(index for index, _ in found.failed)])
        if found.tier.ram is None and reads < READS - 1:
            # One by one: a range that does not come must not fail for what else is in it.
            again = await self._reader.in_backend(
                found.tier, space, slots[bad_index], words[bad_index], bad_index,
                apart=bool(found.failed),
            )  # fmt: skip
            await self._deliver(space, slots, words, again, out, reads + 1)
            return
        if found.tier.ram is None and reads == READS - 1:
            records, healed = await self._reader.elsewhere(
                found.tier, space.number, slots[bad_index], words[bad_index]
            )
            if records is not None:
                good = Found(found.tier, bad_index[healed], records, [])
                await self._deliver(space, slots, words, good, out, reads + 1)
                self.counters["healed_pages"] += len(records)
                bad_index = bad_index[~healed]
                if not len(bad_index):
                    return
        self.counters["corrupt_pages"] += len(bad_index)
        raise PageCorrupt(
            f"space {space.name!r}: {len(bad_index)} pages in tier {found.tier.name} fail "
            f"their check (first slot: {int(slots[bad_index[0]])})",
            space=space.name, slots=slots[bad_index].tolist(), tier=found.tier.name,
        )  # fmt: skip

    def _poisoned(self, space: Space, slots: U64, words: U64, tags: U8) -> VswapError:
        bad = tags == entry.POISON
        lost = entry.lows(words[bad]) == entry.POISON_LOST
        kind, text = (PageLost, "are lost") if lost.all() else (PageCorrupt, "failed their check")
        return kind(
            f"space {space.name!r}: {int(bad.sum())} pages {text} "
            f"(first slot: {int(slots[bad][0])})",
            space=space.name, slots=slots[bad].tolist(),
        )  # fmt: skip

    # ---------------------------------------------------------------- exclusive load

    async def load_exclusive(self, space: Space, slots: U64) -> tuple[U8, int]:
        """Loads distinct slots; returns the pages and a token for :meth:`confirm`.

        Nothing is freed before the confirmation, so a lost reply loses nothing. A token that is not
        confirmed in time expires, and its pages stay stored.
        """
        self._check(space, slots)
        self._expire_tokens()
        listed = slots.tolist()
        self._tickets.begin(space.number, listed)
        seen = self._tickets.newest(space.number, listed)
        token = self._handles.take_sequences(1)
        pending = _Exclusive(space, slots.copy(), seen, self._clock() + self._exclusive_timeout_s)
        try:
            pages = await self.load(space, slots)
        except BaseException:
            self._tickets.end(space.number, listed)
            raise
        self._tokens[token] = pending
        while len(self._tokens) > _MAX_TOKENS:
            self._drop(self._tokens.popitem(last=False)[1])
        return pages, token

    async def confirm(self, space: Space, token: int) -> int:
        """Frees what an exclusive load returned, except slots stored or freed since; how many.

        Repeating a confirmation is safe. Raises StaleIncarnation for a token that expired or that
        this life of the node never gave out: the pages may still be stored.
        """
        if token in self._confirmed:
            return self._confirmed[token]
        self._expire_tokens()
        pending = self._tokens.get(token)
        if pending is None or pending.space is not space:
            raise StaleIncarnation(
                f"token {token} of an exclusive load has expired; the pages are still stored "
                "unless it was confirmed before",
                token=token,
            )
        del self._tokens[token]
        listed = pending.slots.tolist()
        now = self._tickets.newest(space.number, listed)
        self._drop(pending)
        same = np.array(now, np.uint64) == np.array(pending.seen, np.uint64)
        freed = self._free(space, pending.slots[same])
        self._confirmed[token] = freed
        while len(self._confirmed) > _MAX_TOKENS:
            self._confirmed.popitem(last=False)
        return freed

    def _drop(self, pending: _Exclusive) -> None:
        self._tickets.end(pending.space.number, pending.slots.tolist())

    def _expire_tokens(self) -> None:
        now = self._clock()
        while self._tokens:
            token, pending = next(iter(self._tokens.items()))
            if pending.expires_at > now:
                return
            del self._tokens[token]
            self._drop(pending)

    # ---------------------------------------------------------------- free, locate

    async def free(self, space: Space, slots: U64) -> int:
        """Frees slots; those that hold nothing are ignored. Returns how many held a page."""
        self._check(space, slots)
        return self._free(space, np.unique(slots))

    def _free(self, space: Space, slots: U64) -> int:
        ticket = self._handles.take_sequences(1)
        old = space.table.get(slots)
        used = slots[old != 0]
        self._ledger.flip(space, used, np.zeros(len(used), np.uint64), old[old != 0])
        self._tickets.flip(space.number, slots, ticket)
        self.counters["pages_freed"] += len(used)
        return len(used)

    def locate(self, space: Space, slots: U64) -> U8:
        """The tag of each slot's entry: 0 free, 1 fill, else a tier's tag."""
        self._check(space, slots)
        return entry.tags(space.table.get(slots))

    async def clear(self, space: Space) -> int:
        """Frees every slot of a space that no new request can find any more."""
        freed = 0
        for chunk in space.table.chunks().tolist():
            slots, _ = space.table.scan(chunk)
            freed += self._free(space, slots)
            await asyncio.sleep(0)
        for token, pending in list(self._tokens.items()):
            if pending.space is space:
                del self._tokens[token]
        self._tickets.forget_space(space.number)
        return freed

    def _check(self, space: Space, slots: U64) -> None:
        if space.deleted:
            raise UnknownSpace(f"space {space.name!r} was deleted", space=space.name)
        if np.count_nonzero(slots >= space.max_slots):
            bad = slots[slots >= space.max_slots]
            raise SlotOutOfRange(
                f"space {space.name!r} has {space.max_slots} slots; slot {int(bad[0])} is outside",
                space=space.name, slots=bad.tolist(), max_slots=space.max_slots,
            )  # fmt: skip


def _charges(space: Space, slots: U64) -> tuple[U8, I64]:
    """Tags of the slots' entries, and the bytes that each charges now."""
    old = space.table.get(slots)
    tags = entry.tags(old)
    in_tier = (tags >= entry.FIRST_TIER) & (tags <= entry.LAST_TIER)
    return tags, np.where(in_tier, entry.sizes(old) + ROW_BYTES, 0)


def _is_quota(error: VswapError) -> bool:
    """The space as a whole is full, not its share of one tier."""
    return isinstance(error, SpaceFull) and "tier" not in error.fields


def _named(tiers: list[Tier]) -> str:
    """Tiers and what is wrong with each, for a message."""
    return ", ".join(f"{tier.name}: {tier.error}" if tier.error else tier.name for tier in tiers)


def _last_wins(slots: U64, pages: U8) -> tuple[U64, U8]:
    """Distinct slots with the last page given for each."""
    if len(slots) < 2:
        return slots, pages
    distinct, index = np.unique(slots[::-1], return_index=True)
    if len(distinct) == len(slots):
        return slots, pages
    keep: I64 = len(slots) - 1 - index
    return slots[keep], pages[keep]
