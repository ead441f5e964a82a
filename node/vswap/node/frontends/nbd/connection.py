"""One NBD client: what its socket holds is parsed and served as one batch.

Reads of what lies in RAM are answered in the turn in which they arrive. All else (stores, pages of
slower tiers, parts of pages) runs in tasks, while later requests are served. Nothing is unbounded:
a client that has too much under way, or that does not take its replies, is not read from.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from itertools import pairwise
from typing import Any, cast

import numpy as np
import structlog

from vswap.node.device import Device, allocation, tier
from vswap.node.frontends.nbd import wire
from vswap.node.frontends.nbd.budget import Budget
from vswap.node.frontends.nbd.handshake import CONTEXTS, Catalogue, Handshake, Phase
from vswap.node.frontends.nbd.replies import Replies
from vswap.node.frontends.nbd.requests import Parser, ProtocolError, Write
from vswap.node.frontends.nbd.wire import Command
from vswap.tiers.backend import Buffer
from vswap.tiers.record import U8, U64
from vswap.wire.errors import NBD_ERRNO, InternalError, VswapError

_MOST_BUFFERS = 1024
"""IOV_MAX of Linux."""
_BUFFER_BYTES = 512 * 1024
_TURN_PAGES = 128
"""Pages that are read in one turn of the loop, before others have theirs."""
_STORE_PAGES = 256
_LONG_BYTES = 2**20
"""Reads beyond this never overdraw the budget."""
_MAX_TASKS = 256
_MAX_QUEUED = 1024
_WRITE_HIGH, _WRITE_LOW = 512 * 1024, 128 * 1024
_HANDSHAKE_S = 30.0
_QUESTIONS: dict[str, Callable[[U64], Any]] = {"base:allocation": allocation, "vswap:tier": tier}

logger = structlog.get_logger("vswap.node.nbd")


class Connection(asyncio.BufferedProtocol):
    """A protocol for uvloop; made per client by the server, which hands in what is shared."""

    def __init__(
        self, catalogue: Catalogue, device: Callable[[str], Device], budget: Budget,
        counters: Counter[str], on_closed: Callable[[Connection], None],
    ) -> None:  # fmt: skip
        self._catalogue = catalogue
        self._find_device = device
        self._budget = budget
        self._counters = counters
        self._on_closed = on_closed
        self._transport: asyncio.Transport | None = None
        self._handshake: Handshake | None = Handshake(catalogue)
        self._deadline: asyncio.TimerHandle | None = None
        self._parser: Parser | None = None
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._end = 0
        self._queue: deque[tuple[int, int, int, int]] = deque()
        self._pump_scheduled = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._write_paused = False
        self._read_paused = False
        self._can_write = asyncio.Event()
        self._ending = False
        """The client said goodbye, or is thrown out: no more requests; replies still go out."""

    # ---------------------------------------------------------------- transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are none of asyncio's by type.
        self._transport = transport = cast(asyncio.Transport, transport)
        # The same socket beside the transport, to send from where pages lie.
        self._socket = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _WRITE_HIGH)
        transport.set_write_buffer_limits(_WRITE_HIGH, _WRITE_LOW)
        self._deadline = asyncio.get_running_loop().call_later(_HANDSHAKE_S, self.abort)
        assert self._handshake is not None
        transport.write(bytes(self._handshake.replies))
        self._handshake.replies.clear()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._socket.close()
        self._ending = True
        self._can_write.set()
        self._queue.clear()
        if self._deadline is not None:
            self._deadline.cancel()
        self._budget.forget(self._pump)
        self._on_closed(self)

    def eof_received(self) -> bool:
        """Half-closed: what was asked is still answered."""
        self._end_soon()
        return True

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        self._end += nbytes
        if self._ending:
            self._end = 0
            return
        try:
            used = self._negotiate() if self._handshake is not None else 0
            if self._parser is not None:
                used += self._parser.feed(self._buffer[used : self._end])
                self._take()
        except ProtocolError as error:
            logger.info("dropped an NBD client", why=str(error))
            self._counters["nbd_protocol_errors"] += 1
            self.abort()
            return
        left = self._end - used
        if used and left:
            self._buffer[:left] = bytes(self._buffer[used : self._end])
        self._end = left
        self._throttle()

    def pause_writing(self) -> None:
        self._write_paused = True
        self._throttle()

    def resume_writing(self) -> None:
        self._write_paused = False
        self._can_write.set()
        self._pump()

    def abort(self) -> None:
        """Hangs up without a word."""
        self._ending = True
        if self._transport is not None:
            self._transport.abort()

    def finish(self) -> None:
        """Takes no more requests; what is under way is still answered. Then hangs up."""
        self._end_soon()

    # ---------------------------------------------------------------- negotiation

    def _negotiate(self) -> int:
        handshake = self._handshake
        assert handshake is not None
        used = handshake.feed(self._buffer[: self._end])
        if handshake.replies:
            self._send(bytes(handshake.replies))
            handshake.replies.clear()
        if handshake.phase is Phase.CLOSED:
            self._end_soon()
        elif handshake.phase is Phase.TRANSMISSION:
            self._enter(handshake)
        return used

    def _enter(self, handshake: Handshake) -> None:
        offer = handshake.export
        assert offer is not None
        if self._deadline is not None:
            self._deadline.cancel()
        self._handshake = None
        self._device = self._find_device(offer.name)
        self._page_bytes = offer.page_bytes
        self._page_mask = offer.page_bytes - 1
        self._shift = offer.page_bytes.bit_length() - 1
        self._contexts = [name for name in CONTEXTS if name in handshake.contexts]
        self._replies = Replies(structured=handshake.structured)
        self._parser = Parser(
            size_bytes=offer.size_bytes, page_bytes=offer.page_bytes,
            has_contexts=bool(self._contexts),
        )  # fmt: skip

    # ---------------------------------------------------------------- flow

    def _busy(self) -> bool:
        # Who has nothing under way may go on: those who hold the budget cannot stop the others.
        return (
            len(self._tasks) >= _MAX_TASKS
            or self._write_paused
            or (self._budget.spent and bool(self._tasks))
        )

    def _throttle(self) -> None:
        """Stops or goes on reading from the client."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        pause = self._busy() or len(self._queue) > _MAX_QUEUED
        if self._budget.spent and (pause or self._queue):
            self._budget.tell(self._pump)
        if pause and not self._read_paused:
            self._read_paused = True
            transport.pause_reading()
        elif self._read_paused and not pause:
            self._read_paused = False
            transport.resume_reading()

    def _end_soon(self) -> None:
        self._ending = True
        self._close_if_done()

    def _close_if_done(self) -> None:
        if self._ending and not self._tasks and not self._queue and self._transport is not None:
            self._transport.close()

    def _send(self, *parts: Buffer) -> None:
        """Sends buffers that the caller may use again: straight from where they lie, as far as the
        socket takes them; only the rest is copied."""
        transport = self._transport
        if transport is None:
            return
        sent = 0
        if not transport.get_write_buffer_size() and not transport.is_closing():
            try:
                sent = self._socket.sendmsg(parts[:_MOST_BUFFERS])
            except (BlockingIOError, InterruptedError):
                pass
            except OSError:
                # The transport finds out for itself.
                return
        if sent or len(parts) > 1:
            rest = sum(map(len, parts)) - sent
            if not rest:
                return
            parts = (memoryview(b"".join(parts))[sent:],)
        transport.write(parts[0])

    def _spawn(self, work: Coroutine[Any, Any, None], cost_bytes: int) -> None:
        """Runs work that holds ``cost_bytes`` of memory."""
        self._budget.take(cost_bytes)
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)

        def done(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            self._budget.give(cost_bytes)
            if not task.cancelled() and task.exception() is not None:
                logger.error("a request failed in an unforeseen way", exc_info=task.exception())
                self.abort()
            self._pump()

        task.add_done_callback(done)

    # ---------------------------------------------------------------- requests

    def _take(self) -> None:
        """Takes what the parser has found."""
        parser = self._parser
        assert parser is not None
        if parser.pieces:
            self._store(parser.pieces)
            parser.pieces.clear()
        for command, cookie, errno, why in parser.errors:
            self._refuse(cookie, errno, why, command)
        parser.errors.clear()
        for request in parser.others:
            self._other(*request)
        parser.others.clear()
        if parser.reads:
            self._queue.extend(parser.reads)
            parser.reads.clear()
            self._pump()
        if parser.disconnect:
            self._end_soon()

    def _refuse(self, cookie: int, errno: int, why: str, command: int) -> None:
        self._counters["nbd_errors"] += 1
        self._send(self._replies.error(cookie, errno, why))

    def _fail(self, cookie: int, error: Exception) -> None:
        if not isinstance(error, VswapError):
            logger.error("a request failed in an unforeseen way", exc_info=error)
            error = InternalError(str(error))
        self._refuse(cookie, NBD_ERRNO[type(error)], error.message, -1)

    def _other(self, command: int, cookie: int, offset: int, length: int, flags: int) -> None:
        self._counters[f"nbd_{Command(command).name.lower()}"] += 1
        if command == Command.BLOCK_STATUS:
            self._block_status(cookie, offset, length, flags)
        elif not length:
            # Also a flush: what was acknowledged is where a load finds it, whatever dies but the
            # host, and nothing that this daemon could flush outlives that.
            self._send(self._replies.done(cookie))
        else:
            self._spawn(self._change(command, cookie, offset, length, flags), 0)

    async def _change(
        self, command: int, cookie: int, offset: int, length: int, flags: int
    ) -> None:
        device = self._device
        try:
            if command == Command.TRIM:
                await device.trim(offset, length)
            elif command == Command.CACHE:
                await device.cache(offset, length)
            elif flags & wire.FAST_ZERO and (offset | length) & self._page_mask:
                why = "zeroing a part of a page is no faster than writing it"
                self._refuse(cookie, wire.ENOTSUP, why, command)
                return
            else:
                await device.zero(offset, length, hole=not flags & wire.NO_HOLE)
        except VswapError as error:
            self._fail(cookie, error)
        else:
            self._send(self._replies.done(cookie))

    def _block_status(self, cookie: int, offset: int, length: int, flags: int) -> None:
        questions = [_QUESTIONS[name] for name in self._contexts]
        found = self._device.extents(offset, length, questions, one=bool(flags & wire.REQ_ONE))
        self._send(
            self._replies.block_status(
                cookie,
                [
                    (CONTEXTS[name], *extents)
                    for name, extents in zip(self._contexts, found, strict=True)
                ],
            )
        )

    # ---------------------------------------------------------------- read

    def _pump(self) -> None:
        """Serves queued reads, a turn's worth; the rest in the next turn."""
        self._pump_scheduled = False
        if self._queue and not self._busy():
            self._serve_some()
            waits = self._queue and self._queue[0][2] > _LONG_BYTES and self._budget.spent
            if self._queue and not waits and not self._busy() and not self._pump_scheduled:
                self._pump_scheduled = True
                asyncio.get_running_loop().call_soon(self._pump)
        self._throttle()
        self._close_if_done()

    def _serve_some(self) -> None:
        mask, shift = self._page_mask, self._shift
        batch: list[tuple[int, int, int]] = []
        slots: list[int] = []
        while self._queue and len(slots) < _TURN_PAGES:
            if self._queue[0][2] > _LONG_BYTES and self._budget.spent:
                break
            cookie, offset, length, flags = self._queue.popleft()
            if (offset | length) & mask or length > _TURN_PAGES << shift:
                self._counters["nbd_read"] += 1
                if (
                    flags & wire.DF
                    or not self._replies.structured
                    or length <= _TURN_PAGES << shift
                ):
                    self._spawn(self._read(cookie, offset, length), length)
                else:
                    self._spawn(self._stream(cookie, offset, length), 2 * _STORE_PAGES << shift)
                continue
            batch.append((cookie, offset, length))
            if length == mask + 1:
                slots.append(offset >> shift)
            else:
                slots.extend(range(offset >> shift, (offset + length) >> shift))
        if batch:
            self._counters["nbd_read"] += len(batch)
            self._serve(batch, np.array(slots, np.uint64))

    def _serve(self, batch: list[tuple[int, int, int]], slots: U64) -> None:
        """Answers reads of whole pages: at once what can be had at once, all others by a task."""
        try:
            pages = self._device.peek(slots)
        except VswapError as error:
            for cookie, _, _ in batch:
                self._fail(cookie, error)
            return
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
            self._send(*parts)
        if late:
            self._spawn(self._serve_late(late), sum(length for _, _, length in late))

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
                self._fail(batch[0][0], error)
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
        self._send(*parts)
        await self._drained()

    async def _read(self, cookie: int, offset: int, length: int) -> None:
        """Any range, in one piece."""
        try:
            data = await self._device.read(offset, length)
        except VswapError as error:
            self._fail(cookie, error)
            return
        self._send(self._replies.data(cookie, offset, length), data)
        await self._drained()

    async def _stream(self, cookie: int, offset: int, length: int) -> None:
        """A long range, in chunks, as fast as the client takes them."""
        step = _STORE_PAGES << self._shift
        end = offset + length
        while offset < end:
            size = min(step - (offset & self._page_mask), end - offset)
            try:
                data = await self._device.read(offset, size)
            except VswapError as error:
                self._fail(cookie, error)
                return
            self._send(self._replies.data(cookie, offset, size, last=offset + size == end), data)
            offset += size
            await self._drained()
            if self._transport is None:
                return

    async def _drained(self) -> None:
        """Waits until the client has taken its replies, nearly: till then they count as held."""
        while self._write_paused and self._transport is not None:
            self._can_write.clear()
            await self._can_write.wait()

    # ---------------------------------------------------------------- write

    def _store(self, pieces: list[tuple[Write, int, memoryview]]) -> None:
        """Copies pieces of writes out of the receive buffer and stores them."""
        mask = self._page_mask
        whole: list[tuple[Write, int, memoryview]] = []
        parts: dict[int, list[tuple[Write, int, bytes]]] = {}
        for piece in pieces:
            write, offset, data = piece
            if not (offset | len(data)) & mask:
                whole.append(piece)
                continue
            self._cut(write, offset, data, whole, parts)
        while whole:
            self._store_whole(whole)
        for slot, edits in parts.items():
            self._spawn(self._edit(slot, edits), sum(len(data) for _, _, data in edits))

    def _cut(
        self, write: Write, offset: int, data: memoryview,
        whole: list[tuple[Write, int, memoryview]],
        parts: dict[int, list[tuple[Write, int, bytes]]],
    ) -> None:  # fmt: skip
        """Cuts an unaligned piece: parts of pages at its ends, whole pages between."""
        first, end = self._device.inner(offset, len(data))
        shift = self._shift
        cuts = [0, (first << shift) - offset, (end << shift) - offset, len(data)]
        if end <= first:
            # No whole page: one part, or two where a page ends inside.
            middle = (first << shift) - offset
            cuts = (
                [0, middle, middle, len(data)] if 0 < middle < len(data) else [0, 0, 0, len(data)]
            )
        write.pending -= 1
        for number, (a, b) in enumerate(pairwise(cuts)):
            if a == b:
                continue
            write.pending += 1
            if number == 1:
                whole.append((write, offset + a, data[a:b]))
            else:
                slot = (offset + a) >> shift
                start = (offset + a) & self._page_mask
                parts.setdefault(slot, []).append((write, start, bytes(data[a:b])))

    def _store_whole(self, whole: list[tuple[Write, int, memoryview]]) -> None:
        """Takes pieces of about a batch off ``whole`` and stores them: now, or in a task, which
        needs a copy, since the buffer receives what comes next."""
        taken: list[tuple[Write, int]] = []
        views: list[memoryview] = []
        slots: list[int] = []
        size, shift = 0, self._shift
        for write, offset, data in whole:
            if size >= _STORE_PAGES << shift:
                break
            length = len(data)
            taken.append((write, length >> shift))
            views.append(data)
            slots.extend(range(offset >> shift, (offset + length) >> shift))
            size += length
        del whole[: len(taken)]
        data = views[0] if len(views) == 1 else memoryview(b"".join(views))
        pages = np.frombuffer(data, np.uint8).reshape(-1, self._page_bytes)
        where = np.array(slots, np.uint64)
        try:
            if self._device.write_now(where, pages):
                self._stored([write for write, _ in taken])
                return
        except VswapError:
            # Which of them it was, the task finds out.
            pass
        if len(views) == 1:
            pages = pages.copy()
        self._spawn(self._write(taken, where, pages), size)

    async def _write(self, taken: list[tuple[Write, int]], slots: U64, pages: U8) -> None:
        """Stores pieces (write, pages) in one go, and one by one if that fails, so that each has
        its own fate."""
        try:
            await self._device.write_slots(slots, pages)
        except VswapError as error:
            if len(taken) > 1:
                position = 0
                for piece in taken:
                    end = position + piece[1]
                    await self._write([piece], slots[position:end], pages[position:end])
                    position = end
                return
            self._failed(taken[0][0], error)
        self._stored([write for write, _ in taken])

    async def _edit(self, slot: int, edits: list[tuple[Write, int, bytes]]) -> None:
        try:
            await self._device.edit(slot, [(start, data) for _, start, data in edits])
        except VswapError as error:
            for write, _, _ in edits:
                self._failed(write, error)
        self._stored([write for write, _, _ in edits])

    def _failed(self, write: Write, error: VswapError) -> None:
        write.error, write.why = NBD_ERRNO[type(error)], error.message

    def _stored(self, writes: list[Write]) -> None:
        """Counts pieces as done; answers the writes that have no more to come."""
        parts: list[Buffer] = []
        for write in writes:
            write.pending -= 1
            if write.pending or write.left:
                continue
            self._counters["nbd_write"] += 1
            if write.error:
                self._counters["nbd_errors"] += 1
                parts.append(self._replies.error(write.cookie, write.error, write.why))
            else:
                parts.append(self._replies.done(write.cookie))
        if parts:
            self._send(b"".join(parts))
