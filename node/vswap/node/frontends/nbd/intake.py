"""Long writes, received where they will lie.

The payload goes from the socket straight into the open block of the RAM tier, request after
request, as long as the socket holds more; then all of it is stored as one batch. Half of what a
long write costs otherwise is copying. Where requests have been alike, the next one is received
along with this one's end, as if it were alike too.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

import numpy as np
from xxhash import xxh3_64_intdigest

from vswap.node.device import Device
from vswap.node.frontends.nbd import wire
from vswap.node.frontends.nbd.requests import Parser, Write
from vswap.tiers.record import HEADER_BYTES, U8, U64
from vswap.wire.errors import VswapError

_LONG_PAGES = 8
"""Shorter writes are received with whatever else the socket holds."""
_BATCH_PAGES = 512
_RECEIVE_BYTES = 256 * 1024
"""Room for this much per call: a little more than a unix socket holds."""
_RECEIVES = 64
"""Calls per batch at most: others have their turn, however little comes with each."""
_TRIES, _VAIN, _PROBE = 8, 4, 16
"""So often is asked for more of a write, if not so many times in a row it was in vain; else only
each so many times."""


class Intake:
    """Of one connection. ``stored`` hears of pieces of writes that are stored; ``copied`` of those
    that could not be stored where they lie, with a copy of their pages."""

    def __init__(
        self, device: Device, parser: Parser, page_bytes: int,
        stored: Callable[[list[Write]], None],
        copied: Callable[[list[tuple[Write, int]], U64, U8], None],
    ) -> None:  # fmt: skip
        self._device = device
        self._parser = parser
        self._page_bytes = page_bytes
        self._shift = page_bytes.bit_length() - 1
        self._stored = stored
        self._copied = copied
        self._header = memoryview(bytearray(wire.REQUEST.size))
        self._alike = False
        """The last long write was as long as the one before."""
        self._vain = 0

    @property
    def wanted(self) -> bool:
        """A long write is on its way, at a page's beginning."""
        write = self._parser.write
        return (
            write is not None
            and write.length >= _LONG_PAGES << self._shift
            and write.left >= self._page_bytes
            and not write.offset & (self._page_bytes - 1)
        )

    def receive(self, source: socket.socket, buffer: memoryview, used: int) -> int | None:
        """Receives what the socket holds of long writes, and stores it.

        The first ``used`` bytes of ``buffer``, a page at most, came before. Returns how many bytes
        are left over there now: the beginning of a page if a long write is still :attr:`wanted`,
        else of what the parser is to be fed. None = nothing happened, there is no room. Raises
        ProtocolError.
        """
        pages = 0
        while pages < _BATCH_PAGES:
            window = self._device.window()
            if window is None:
                return used if pages else None
            batch = _Batch(window, self._page_bytes, buffer[:used])
            left = b""
            try:
                left = self._receive(source, batch)
            finally:
                left = left or batch.rest()
                used = len(left)
                buffer[:used] = left
                if batch.runs:
                    self._store(batch)
            if batch.room or not self.wanted:
                break
            # The block is full, and its end was near: there is more for another.
            pages += len(batch.pages)
        return used

    def _receive(self, source: socket.socket, batch: _Batch) -> bytes:
        """Returns what came last, if it begins with a header that was not understood."""
        parser, size = self._parser, len(self._header)
        for _ in range(_RECEIVES):
            write = parser.write
            if write is None or not self.wanted or not batch.room:
                break
            count = min(write.left, batch.room << self._shift, _RECEIVE_BYTES) >> self._shift
            ends = count << self._shift == write.left
            if batch.overlaps(write.offset >> self._shift, count):
                # Of two writes of a slot the later one counts: it is stored after this batch.
                break
            came = self._fill(source, batch, count, write.length if ends else 0)
            pages = min(batch.have >> self._shift, count)
            if pages:
                # Their hashes are taken meanwhile: the client sends on.
                batch.take(write, pages)
                parser.took(pages << self._shift)
            if write.left:
                if not came:
                    break
                continue
            begun = min(batch.have, size)
            batch.have -= begun
            if begun < size:
                return bytes(self._header[:begun])
            if not parser.feed(self._header):
                # A short write is understood once it is there.
                return bytes(self._header) + batch.rest()
            after = parser.write
            self._alike = after is not None and after.length == write.length
            if batch.have and not (after and self.wanted and batch.have <= after.left):
                # It is not alike.
                break
        return b""

    def _fill(self, source: socket.socket, batch: _Batch, count: int, alike: int) -> int:
        """Receives what is missing of ``count`` pages, and, where a write of ``alike`` bytes ends
        with them (0 = none does), the next request's header, and its payload if it is alike.
        Returns the bytes that came."""
        most = count
        if alike and self._alike:
            most = min(count + (min(alike, _RECEIVE_BYTES) >> self._shift), batch.room)
        batch.reach(most)
        parts = batch.missing(count)
        if alike:
            parts.append(self._header)
            parts += batch.views(count, most)
        if not parts:
            return 0
        came = self._receive_into(source, parts, waits=batch.have < count << self._shift)
        batch.have += came
        return came

    def _receive_into(self, source: socket.socket, parts: list[memoryview], *, waits: bool) -> int:
        """``waits``: the client is in the middle of a write. It sleeps till the socket is empty,
        and then sends more at once, usually: to ask again for some 30 us is cheaper than to store
        the little that came."""
        tries = 1
        if waits and (self._vain < _VAIN or self._vain % _PROBE == 0):
            tries = _TRIES
        for _ in range(tries):
            try:
                came = source.recvmsg_into(parts)[0]
            except BlockingIOError:
                continue
            except OSError:
                # The transport finds out for itself.
                return 0
            if waits:
                self._vain = 0
            return came
        if waits:
            self._vain += 1
        return 0

    def _store(self, batch: _Batch) -> None:
        slots = np.concatenate(
            [np.arange(first, first + count, dtype=np.uint64) for _, first, count in batch.runs]
        )
        for write, _, _ in batch.runs:
            write.pending += 1
        try:
            done = self._device.write_now(slots, batch.pages, np.array(batch.hashes, np.uint64))
        except VswapError:
            done = False
        if done:
            self._stored([write for write, _, _ in batch.runs])
        else:
            taken = [(write, count) for write, _, count in batch.runs]
            self._copied(taken, slots, batch.pages.copy())


class _Batch:
    """Pages that lie in the window, one behind the other. The first ones, ``runs`` of them as
    (write, first slot, pages), are taken; ``have`` bytes came of those behind."""

    def __init__(self, window: U8, page_bytes: int, begun: memoryview) -> None:
        self._window = window[:_BATCH_PAGES]
        self._flat = self._window.reshape(-1).data
        self._page_bytes = page_bytes
        self._shift = page_bytes.bit_length() - 1
        self._views: list[memoryview] = []
        self._taken = 0
        self.runs: list[tuple[Write, int, int]] = []
        self.hashes: list[int] = []
        self.have = len(begun)
        if begun:
            self.reach(1)
            self._views[0][: len(begun)] = begun

    @property
    def room(self) -> int:
        """Pages."""
        return len(self._window) - self._taken

    @property
    def pages(self) -> U8:
        """Those that are taken."""
        return self._window[: self._taken, HEADER_BYTES:]

    def overlaps(self, first: int, count: int) -> bool:
        """Whether some of these slots are written by what is taken."""
        end = first + count
        return any(start < end and first < start + n for _, start, n in self.runs)

    def reach(self, end: int) -> None:
        """Makes views of the next ``end`` pages, which :meth:`views` then has."""
        views, end = self._views, self._taken + end
        if end > len(views):
            size, step = self._page_bytes, self._window.shape[1]
            first = len(views) * step + HEADER_BYTES
            flat = self._flat
            views += [flat[at : at + size] for at in range(first, end * step, step)]

    def views(self, start: int, end: int) -> list[memoryview]:
        """Some of the pages behind those that are taken."""
        return self._views[self._taken + start : self._taken + end]

    def missing(self, count: int) -> list[memoryview]:
        """What has not come of the next ``count`` pages."""
        views = self.views(self.have >> self._shift, count)
        part = self.have & (self._page_bytes - 1)
        if part and views:
            views[0] = views[0][part:]
        return views

    def take(self, write: Write, count: int) -> None:
        """The next ``count`` pages, which came, belong to a write."""
        self.hashes.extend(map(xxh3_64_intdigest, self.views(0, count)))
        self.runs.append((write, write.offset >> self._shift, count))
        self._taken += count
        self.have -= count << self._shift

    def rest(self) -> bytes:
        """The bytes that came of pages that are not taken."""
        if not self.have:
            return b""
        return b"".join(self.views(0, -(-self.have >> self._shift)))[: self.have]
