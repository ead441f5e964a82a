"""Writes of one client: whole pages in batches, parts of pages one page at a time."""

from __future__ import annotations

from collections.abc import Coroutine
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from vswap.node.device import Device
from vswap.node.frontends.nbd.answers import Answers
from vswap.node.frontends.nbd.requests import Write
from vswap.node.frontends.nbd.runs import Run
from vswap.tiers.record import U8, U64
from vswap.wire.errors import NBD_ERRNO, VswapError

_STORE_PAGES = 256
_EDIT_TASKS = 32
"""Tasks that edit the pages of one batch. Pages of slower tiers are fetched by so many at once."""


class Link(Protocol):
    """See :class:`vswap.node.frontends.nbd.session.Link`."""

    @property
    def gone(self) -> bool: ...

    def spawn(self, work: Coroutine[Any, Any, None], cost_bytes: int) -> None: ...


class Writes:
    """Of one connection."""

    def __init__(self, device: Device, answers: Answers, link: Link, page_bytes: int) -> None:
        self._device = device
        self._answers = answers
        self._link = link
        self._page_bytes = page_bytes
        self._page_mask = page_bytes - 1
        self._shift = page_bytes.bit_length() - 1

    def store(self, pieces: list[tuple[Write, int, memoryview]]) -> None:
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
        slots = list(parts)
        step = -(-len(slots) // _EDIT_TASKS)
        for start in range(0, len(slots), max(step, 1)):
            some = {slot: parts[slot] for slot in slots[start : start + step]}
            cost = sum(len(data) for edits in some.values() for _, _, data in edits)
            self._link.spawn(self._edit(some), cost)

    def store_run(self, run: Run) -> None:
        """Stores whole pages, straight out of the receive buffer where it can be done now."""
        try:
            if self._device.write_now(run.slots, run.pages):
                self._answers.stored_all(run.cookies)
                return
        except VswapError:
            # Which of them it was, the task finds out.
            pass
        taken = []
        for cookie, offset in run.requests(self._page_bytes):
            write = Write(cookie, offset, 0)
            write.pending = 1
            taken.append((write, 1))
        self.store_later(taken, run.slots, run.pages.copy())

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
                self._answers.stored([write for write, _ in taken])
                return
        except VswapError:
            # Which of them it was, the task finds out.
            pass
        if len(views) == 1:
            pages = pages.copy()
        self.store_later(taken, where, pages)

    def store_later(self, taken: list[tuple[Write, int]], slots: U64, pages: U8) -> None:
        """Stores pieces (write, pages) in a task; ``pages`` stay as they are meanwhile."""
        self._link.spawn(self._write(taken, slots, pages), pages.size)

    async def _write(self, taken: list[tuple[Write, int]], slots: U64, pages: U8) -> None:
        """Stores pieces (write, pages) in one go, and one by one if that fails, so that each has
        its own fate."""
        try:
            await self._device.write_slots(slots, pages)
        except VswapError as error:
            if len(taken) > 1:
                position = 0
                for piece in taken:
                    if self._link.gone:
                        return
                    end = position + piece[1]
                    await self._write([piece], slots[position:end], pages[position:end])
                    position = end
                return
            _failed(taken[0][0], error)
        self._answers.stored([write for write, _ in taken])

    async def _edit(self, parts: dict[int, list[tuple[Write, int, bytes]]]) -> None:
        """Edits pages, one after the other."""
        for slot, edits in parts.items():
            if self._link.gone:
                return
            try:
                await self._device.edit(slot, [(start, data) for _, start, data in edits])
            except VswapError as error:
                for write, _, _ in edits:
                    _failed(write, error)
            self._answers.stored([write for write, _, _ in edits])


def _failed(write: Write, error: VswapError) -> None:
    write.error, write.why = NBD_ERRNO[type(error)], error.message
