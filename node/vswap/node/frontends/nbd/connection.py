"""One NBD client: what its socket holds is parsed and served as one batch.

Reads of what lies in RAM are answered in the turn in which they arrive. All else (stores, pages of
slower tiers, parts of pages) runs in tasks, while later requests are served. Nothing is unbounded:
a client that has too much under way, or that does not take its replies, is not read from.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, cast

import structlog

from vswap.node.device import Device
from vswap.node.frontends.nbd.budget import Budget
from vswap.node.frontends.nbd.handshake import Catalogue, Handshake, Phase
from vswap.node.frontends.nbd.replies import Replies
from vswap.node.frontends.nbd.requests import ProtocolError
from vswap.node.frontends.nbd.session import Session
from vswap.tiers.backend import Buffer
from vswap.wire.tcp import notice_loss

_MOST_BUFFERS = 1024
"""IOV_MAX of Linux."""
_BUFFER_BYTES = 512 * 1024
_MAX_TASKS = 256
_MAX_QUEUED = 1024
_WRITE_HIGH, _WRITE_LOW = 512 * 1024, 128 * 1024
_HANDSHAKE_S = 30.0
_PATIENCE_S = 30.0
"""Who takes no reply for so long, while all clients together hold what they may, is hung up on."""

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
        self._socket: socket.socket | None = None
        """The same socket beside the transport, to send from where pages lie."""
        self._hung_up = select.poll()
        self._handshake: Handshake | None = Handshake(catalogue)
        self._deadline: asyncio.TimerHandle | None = None
        self._session: Session | None = None
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._end = 0
        self._streaming = False
        """Long writes follow each other: most of each is received where it will lie."""
        self._pump_scheduled = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._write_paused = False
        self._read_paused = False
        self._was_paused = False
        """What the socket holds may have waited for a while."""
        self._can_write = asyncio.Event()
        self._ending = False
        """The client said goodbye, or is thrown out: no more requests; replies still go out."""

    # ---------------------------------------------------------------- transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are none of asyncio's by type.
        self._transport = transport = cast(asyncio.Transport, transport)
        try:
            number = os.dup(transport.get_extra_info("socket").fileno())
        except OSError as error:
            logger.warning("cannot take another NBD client", why=str(error))
            self.abort()
            return
        self._socket = socket.socket(fileno=number)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _WRITE_HIGH)
        # A unix socket tells apart who has closed it and who only ended his half, and still reads.
        ended = 0
        if self._socket.family != socket.AF_UNIX:
            notice_loss(self._socket)
            ended = select.POLLRDHUP
        self._hung_up.register(self._socket, ended)
        transport.set_write_buffer_limits(_WRITE_HIGH, _WRITE_LOW)
        self._deadline = asyncio.get_running_loop().call_later(_HANDSHAKE_S, self.abort)
        assert self._handshake is not None
        transport.write(bytes(self._handshake.replies))
        self._handshake.replies.clear()
        if self._ending:
            transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._socket is not None:
            self._socket.close()
        self._ending = True
        self._can_write.set()
        if self._session is not None:
            self._session.drop()
        if self._deadline is not None:
            self._deadline.cancel()
        self._budget.forget(self.pump)
        self._tell_if_over()

    def eof_received(self) -> bool:
        """No more requests; what was asked is still answered, if somebody may be there."""
        if self._session is not None and self._abandoned:
            self._session.drop()
        self._end_soon()
        return True

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._streaming and self._session is not None:
            # Leave long writes in the socket, for :meth:`Session.receive`.
            page = self._session.page_bytes
            return self._buffer[self._end : page if self._end < page else self._end + page]
        return self._buffer[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        self._end += nbytes
        if self._was_paused:
            self._was_paused = False
            self._end_if_abandoned()
        if self._ending:
            self._end = 0
            return
        try:
            self._take()
        except ProtocolError as error:
            logger.info("dropped an NBD client", why=str(error))
            self._counters["nbd_protocol_errors"] += 1
            self.abort()
            return
        self._throttle()

    def _take(self) -> None:
        """Takes what it can of what is in the buffer, and of long writes from the socket."""
        used = self._negotiate() if self._handshake is not None else 0
        session = self._session
        left = None
        if session is not None:
            assert self._socket is not None
            if not self._streaming:
                used += session.feed(self._buffer[used : self._end])
            self._keep(used)
            left = session.receive(self._socket, self._buffer, self._end)
            if left is None and self._streaming:
                self._keep(session.feed(self._buffer[: self._end]))
                left = session.receive(self._socket, self._buffer, self._end)
            if left is not None:
                self._end = left
                if session.must_feed(left):
                    self._keep(session.feed(self._buffer[:left]))
            self._streaming = left is not None
            self.pump()
            if session.said_goodbye:
                self._end_soon()
        else:
            self._keep(used)

    def _keep(self, used: int) -> None:
        """Moves what is left of the buffer to its front."""
        left = self._end - used
        if used and left:
            self._buffer[:left] = bytes(self._buffer[used : self._end])
        self._end = left

    def pause_writing(self) -> None:
        self._write_paused = True
        self._throttle()

    def resume_writing(self) -> None:
        self._write_paused = False
        self._can_write.set()
        self.pump()

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
            self.send(bytes(handshake.replies))
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
        self._session = Session(
            self, self._find_device(offer.name), offer, handshake.contexts,
            Replies(structured=handshake.structured, page_bytes=offer.page_bytes),
            self._counters,
        )  # fmt: skip

    # ---------------------------------------------------------------- flow

    @property
    def _queued(self) -> int:
        return self._session.queued if self._session is not None else 0

    @property
    def gone(self) -> bool:
        return self._transport is None or self._abandoned

    @property
    def _abandoned(self) -> bool:
        """The client hung up without a good-bye, though we may not have read as far as that.

        It may have asked again elsewhere what was not answered, and gone on from there: what has
        not begun must not be done any more, since it would undo what came after.
        """
        goodbye = self._session is not None and self._session.said_goodbye
        return not goodbye and self._socket is not None and bool(self._hung_up.poll(0))

    def _end_if_abandoned(self) -> None:
        if self._transport is not None and self._abandoned:
            if self._session is not None:
                self._session.drop()
            self.abort()

    @property
    def busy(self) -> bool:
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
        pause = self.busy or self._queued > _MAX_QUEUED
        if self._budget.spent and (pause or self._queued):
            self._budget.tell(self.pump)
        if pause and not self._read_paused:
            self._read_paused = True
            transport.pause_reading()
        elif self._read_paused and not pause:
            self._read_paused = False
            self._was_paused = True
            transport.resume_reading()

    def _end_soon(self) -> None:
        self._ending = True
        self._close_if_done()

    def _tell_if_over(self) -> None:
        """What is under way goes on when the client is gone, and the server waits for it."""
        if self._transport is None and not self._tasks:
            self._on_closed(self)

    def _close_if_done(self) -> None:
        if self._ending and not self._tasks and not self._queued and self._transport is not None:
            self._transport.close()

    def send(self, *parts: Buffer) -> None:
        """Sends buffers that the caller may use again: straight from where they lie, as far as the
        socket takes them; only the rest is copied."""
        transport = self._transport
        if transport is None:
            return
        sent = 0
        direct = not transport.get_write_buffer_size() and not transport.is_closing()
        if direct and self._socket is not None:
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

    def spawn(self, work: Coroutine[Any, Any, None], cost_bytes: int) -> None:
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
            self.pump()
            self._tell_if_over()

        task.add_done_callback(done)

    async def drained(self) -> None:
        """Waits until the client has taken its replies, nearly: till then they count as held.

        Hangs up on who takes nothing at all for long, while there is nothing left for others.
        """
        while self._write_paused and (transport := self._transport) is not None:
            self._can_write.clear()
            left = transport.get_write_buffer_size()
            try:
                await asyncio.wait_for(self._can_write.wait(), _PATIENCE_S)
            except TimeoutError:
                if self._budget.spent and transport.get_write_buffer_size() >= left:
                    logger.info("dropped an NBD client that takes no replies")
                    self._counters["nbd_stuck"] += 1
                    self.abort()
                    return

    def pump(self) -> None:
        """Lets the session serve on, a turn's worth; the rest in the next turn."""
        self._pump_scheduled = False
        session = self._session
        if session is not None and session.queued:
            self._end_if_abandoned()
        if session is not None and session.serve_some() and not self._pump_scheduled:
            self._pump_scheduled = True
            asyncio.get_running_loop().call_soon(self.pump)
        self._throttle()
        self._close_if_done()
