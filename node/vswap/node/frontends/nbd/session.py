"""What becomes of the requests of one client.

Reads of what lies in RAM are answered at once, a turn's worth at a time. All else (stores, pages of
slower tiers, parts of pages) runs in tasks, while later requests are served.
"""

from __future__ import annotations

import socket
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, cast

import numpy as np

from vswap.node.device import CACHE_PAGES, MAX_EXTENTS_BYTES, Device, allocation, tier
from vswap.node.frontends.nbd import wire
from vswap.node.frontends.nbd.answers import Answers
from vswap.node.frontends.nbd.handshake import CONTEXTS, Offer
from vswap.node.frontends.nbd.intake import Intake
from vswap.node.frontends.nbd.replies import Replies
from vswap.node.frontends.nbd.requests import Parser
from vswap.node.frontends.nbd.runs import Run
from vswap.node.frontends.nbd.wire import Command
from vswap.node.frontends.nbd.writes import Writes
from vswap.tiers.backend import Buffer
from vswap.tiers.record import U64
from vswap.wire.errors import VswapError

_TURN_PAGES = 128
"""Pages that are read in one turn of the loop, before others have theirs."""
_STREAM_PAGES = 256
_QUESTIONS: dict[str, Callable[[U64], Any]] = {"base:allocation": allocation, "vswap:tier": tier}


class Link(Protocol):
    """The client's connection, as a session sees it."""

    @property
    def busy(self) -> bool:
        """Too much is under way, or too many replies wait: serve no more for now."""

    @property
    def gone(self) -> bool:
        """Nobody waits for answers any more: begin nothing else that was asked."""

    def send(self, *parts: Buffer) -> None: ...

    def spawn(self, work: Coroutine[Any, Any, None], cost_bytes: int) -> None: ...

    async def drained(self) -> None: ...


class Session:
    """The transmission phase of one connection."""

    def __init__(
        self, link: Link, device: Device, offer: Offer, contexts: frozenset[str],
        replies: Replies, counters: Counter[str],
    ) -> None:  # fmt: skip
        self._link = link
        self._device = device
        self._counters = counters
        self._replies = replies
        self._answers = Answers(link.send, replies, counters)
        self._contexts = [name for name in CONTEXTS if name in contexts]
        self.page_bytes = offer.page_bytes
        self._page_mask = offer.page_bytes - 1
        self._shift = offer.page_bytes.bit_length() - 1
        self._parser = Parser(
            size_bytes=offer.size_bytes, page_bytes=offer.page_bytes,
            structured=replies.structured, has_contexts=bool(self._contexts),
        )  # fmt: skip
        self._writes = Writes(device, self._answers, link, offer.page_bytes)
        self._intake = Intake(
            device, self._parser, offer.page_bytes, self._answers.stored, self._writes.store_later
        )
        self._reads: deque[tuple[int, int, int, int]] = deque()
        """Reads that wait: (cookie, offset, length, flags)."""
        self._others: deque[tuple[int, int, int, int, int]] = deque()
        """And others: (command, cookie, offset, length, flags)."""

    # ---------------------------------------------------------------- requests

    def feed(self, data: memoryview) -> int:
        """Takes what it can of what arrived; returns how many bytes. Raises ProtocolError."""
        used = self._parser.feed(data)
        self._take()
        return used

    def receive(self, source: socket.socket, buffer: memoryview, used: int) -> int | None:
        """See :meth:`Intake.receive`; None also where there is no long write to receive."""
        if used > self._page_mask + 1 or not self._intake.wanted:
            return None
        left = self._intake.receive(source, buffer, used)
        self._take()
        return left

    def must_feed(self, left: int) -> bool:
        """So many bytes that :meth:`receive` left are not only the beginning of a page."""
        return left > self._page_mask or (left > 0 and not self._intake.wanted)

    def _take(self) -> None:
        """Stores, refuses or queues what the parser understood."""
        parser = self._parser
        if parser.pieces:
            self._writes.store(parser.pieces)
            parser.pieces.clear()
        for run in parser.runs_written:
            self._writes.store_run(run)
        parser.runs_written.clear()
        for cookie, errno, why in parser.errors:
            self._answers.refuse(cookie, errno, why)
        parser.errors.clear()
        self._others.extend(parser.others)
        parser.others.clear()
        self._reads.extend(parser.reads)
        parser.reads.clear()
        for number, run in enumerate(parser.runs_read):
            self._read_run(run, first=not number)
        parser.runs_read.clear()

    @property
    def said_goodbye(self) -> bool:
        return self._parser.disconnect

    def _other(self, command: int, cookie: int, offset: int, length: int, flags: int) -> None:
        self._counters[f"nbd_{Command(command).name.lower()}"] += 1
        if not length:
            # Also a flush.
            try:
                self._device.flush()
            except VswapError as error:
                self._answers.fail(cookie, error)
            else:
                self._link.send(self._replies.done(cookie))
        elif command == Command.BLOCK_STATUS:
            cost = len(self._contexts) * MAX_EXTENTS_BYTES
            self._link.spawn(self._block_status(cookie, offset, length, flags), cost)
        else:
            held = min(length, CACHE_PAGES << self._shift) if command == Command.CACHE else 0
            self._link.spawn(self._change(command, cookie, offset, length, flags), held)

    async def _change(
        self, command: int, cookie: int, offset: int, length: int, flags: int
    ) -> None:
        device = self._device

        def stop() -> bool:
            return self._link.gone

        try:
            if command == Command.TRIM:
                await device.trim(offset, length, stop=stop)
            elif command == Command.CACHE:
                await device.cache(offset, length)
            elif flags & wire.FAST_ZERO and (offset | length) & self._page_mask:
                why = "zeroing a part of a page is no faster than writing it"
                self._answers.refuse(cookie, wire.ENOTSUP, why)
                return
            else:
                await device.zero(offset, length, hole=not flags & wire.NO_HOLE, stop=stop)
        except VswapError as error:
            self._answers.fail(cookie, error)
        else:
            self._link.send(self._replies.done(cookie))

    async def _block_status(self, cookie: int, offset: int, length: int, flags: int) -> None:
        questions = [_QUESTIONS[name] for name in self._contexts]
        try:
            one = bool(flags & wire.REQ_ONE)
            found = await self._device.extents(offset, length, questions, one=one)
        except VswapError as error:
            self._answers.fail(cookie, error)
            return
        self._link.send(
            self._replies.block_status(
                cookie,
                [
                    (CONTEXTS[name], *extents)
                    for name, extents in zip(self._contexts, found, strict=True)
                ],
            )
        )
        await self._link.drained()

    # ---------------------------------------------------------------- read

    @property
    def queued(self) -> int:
        return len(self._reads) + len(self._others)

    def drop(self) -> None:
        """Forgets what has not begun."""
        self._reads.clear()
        self._others.clear()

    def serve_some(self) -> bool:
        """Serves what waits, a turn's worth; True = there is more that could be served now."""
        while self._others and not self._link.busy:
            self._other(*self._others.popleft())
        if self._reads and not self._link.busy:
            self._serve_some()
        return bool(self._reads) and not self._link.busy

    def _serve_some(self) -> None:
        mask, shift = self._page_mask, self._shift
        batch: list[tuple[int, int, int]] = []
        slots: list[int] = []
        while self._reads and len(slots) < _TURN_PAGES:
            if self._link.busy:
                break
            cookie, offset, length, flags = self._reads.popleft()
            if (offset | length) & mask or length > _TURN_PAGES << shift:
                self._counters["nbd_read"] += 1
                if (
                    flags & wire.DF
                    or not self._replies.structured
                    or length <= _TURN_PAGES << shift
                ):
                    self._link.spawn(self._read(cookie, offset, length), length)
                else:
                    self._link.spawn(
                        self._stream(cookie, offset, length), 2 * _STREAM_PAGES << shift
                    )
                continue
            batch.append((cookie, offset, length))
            if length == mask + 1:
                slots.append(offset >> shift)
            else:
                slots.extend(range(offset >> shift, (offset + length) >> shift))
        if batch:
            self._counters["nbd_read"] += len(batch)
            self._serve(batch, np.array(slots, np.uint64))

    def _read_run(self, run: Run, *, first: bool) -> None:
        """Answers a run at once, if it is the first thing to be served in this turn."""
        size = self.page_bytes
        if not first or self._reads or self._link.busy:
            self._reads.extend((c, offset, size, 0) for c, offset in run.requests(size))
            return
        self._counters["nbd_read"] += len(run.slots)
        try:
            pages = self._device.peek(run.slots)
        except VswapError as error:
            for cookie, _ in run.requests(size):
                self._answers.fail(cookie, error)
            return
        if None in pages:
            batch = [(c, offset, size) for c, offset in run.requests(size)]
            self._answer(batch, run.slots, pages)
            return
        parts: list[Buffer | None] = [None] * (2 * len(pages))
        parts[::2] = self._replies.pages(run.cookies, run.offsets)
        parts[1::2] = pages
        self._link.send(*cast(list[Buffer], parts))

    def _serve(self, batch: list[tuple[int, int, int]], slots: U64) -> None:
        """Answers reads of whole pages."""
        try:
            pages = self._device.peek(slots)
        except VswapError as error:
            for cookie, _, _ in batch:
                self._answers.fail(cookie, error)
            return
        self._answer(batch, slots, pages)

    def _answer(
        self, batch: list[tuple[int, int, int]], slots: U64, pages: list[Buffer | None]
    ) -> None:
        """At once what could be had at once, all others by a task."""
        parts: list[Buffer] = []
        late: list[tuple[int, int, int]] = []
        position, shift, data = 0, self._shift, self._replies.data
        for read in batch:
            cookie, offset, length = read
            end = position + (length >> shift)
            found = pages[position:end]
            if any(page is None for page in found) and not self._device.fill_in(
                slots[position:end], found
            ):
                late.append(read)
            else:
                parts.append(data(cookie, offset, length))
                parts += cast(list[Buffer], found)
            position = end
        if parts:
            self._link.send(*parts)
        if late:
            self._link.spawn(self._serve_late(late), sum(length for _, _, length in late))

    async def _serve_late(self, batch: list[tuple[int, int, int]]) -> None:
        """Reads whole pages that are not in RAM: in one go, and one by one if that fails."""
        shift = self._shift
        slots = np.concatenate(
            [np.arange(o >> shift, (o + n) >> shift, dtype=np.uint64) for _, o, n in batch]
        )
        try:
            data = (await self._device.read_slots(slots)).reshape(-1).data
        except VswapError as error:
            if len(batch) == 1:
                self._answers.fail(batch[0][0], error)
                return
            for read in batch:
                await self._serve_late([read])
            return
        parts: list[Buffer] = []
        position = 0
        for cookie, offset, length in batch:
            parts.append(self._replies.data(cookie, offset, length))
            parts.append(data[position : position + length])
            position += length
        self._link.send(*parts)
        await self._link.drained()

    async def _read(self, cookie: int, offset: int, length: int) -> None:
        """Any range, in one piece."""
        try:
            data = await self._device.read(offset, length)
        except VswapError as error:
            self._answers.fail(cookie, error)
            return
        self._link.send(self._replies.data(cookie, offset, length), data)
        await self._link.drained()

    async def _stream(self, cookie: int, offset: int, length: int) -> None:
        """A long range, in chunks, as fast as the client takes them."""
        step = _STREAM_PAGES << self._shift
        end = offset + length
        while offset < end:
            size = min(step - (offset & self._page_mask), end - offset)
            try:
                data = await self._device.read(offset, size)
            except VswapError as error:
                self._answers.fail(cookie, error)
                return
            self._link.send(
                self._replies.data(cookie, offset, size, last=offset + size == end), data
            )
            offset += size
            await self._link.drained()
            if self._link.gone:
                return
