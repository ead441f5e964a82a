"""The Pages service: the pager over gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np

from vswap.node.shard import Shard
from vswap.node.spaces import Space
from vswap.node.tags import Tags
from vswap.tiers.record import U8, U64
from vswap.v1 import node_pb2, node_pb2_grpc
from vswap.wire.aio import Context, served
from vswap.wire.errors import (
    BatchTooLarge,
    DuplicateSlots,
    InvalidRequest,
    PageSizeMismatch,
    Unreachable,
)
from vswap.wire.rpc import MAX_BATCH_BYTES, MAX_FREE_SLOTS

_WAITING_SHARE = 4


class PagesService(node_pb2_grpc.PagesServicer):
    """Validates, then hands numpy views of the message to the pager; no copy on the way in.

    ``inflight_bytes`` bounds the page bytes of all calls under way. Further calls wait, and once
    the stores that wait hold four times as much, more are refused with Unreachable.

    A tag is admitted first, so that any answer, an error too, tells the client that its earlier
    requests are fenced; and again after the wait, in the turn in which the pager takes the request.
    """

    def __init__(self, shard: Shard, *, inflight_bytes: int) -> None:
        self._shard = shard
        self._tags = Tags()
        limit_bytes = max(inflight_bytes, MAX_BATCH_BYTES)
        self._room = Room(limit_bytes, _WAITING_SHARE * limit_bytes)

    @served
    async def Store(  # noqa: N802
        self, request: node_pb2.StoreRequest, context: Context
    ) -> node_pb2.StoreReply:
        self._tags.admit(request.tag)
        space = self._shard.spaces.get(request.space)
        slots = _slots(request.slots)
        _check_batch(space, slots)
        _check_distinct(space, slots)
        if len(request.pages) != len(slots) * space.page_bytes:
            raise PageSizeMismatch(
                f"{len(slots)} pages of {space.page_bytes} bytes are "
                f"{len(slots) * space.page_bytes} bytes, not {len(request.pages)}",
                expected=len(slots) * space.page_bytes, got=len(request.pages),
            )  # fmt: skip
        pages: U8 = np.frombuffer(request.pages, np.uint8).reshape(-1, space.page_bytes)
        async with self._room.take(len(request.pages), held_bytes=len(request.pages)):
            self._tags.admit(request.tag)
            await self._shard.pager.store(space, slots, pages)
        return node_pb2.StoreReply()

    @served
    async def Load(  # noqa: N802
        self, request: node_pb2.LoadRequest, context: Context
    ) -> node_pb2.LoadReply:
        self._tags.admit(request.tag)
        space = self._shard.spaces.get(request.space)
        slots = _slots(request.slots)
        _check_batch(space, slots)
        if request.exclusive:
            _check_distinct(space, slots)
        async with self._room.take(len(slots) * space.page_bytes):
            self._tags.admit(request.tag)
            if request.exclusive:
                pages, token = await self._shard.pager.load_exclusive(space, slots)
                return node_pb2.LoadReply(pages=pages.tobytes(), token=token)
            loaded = await self._shard.pager.load(space, slots)
            return node_pb2.LoadReply(pages=loaded.tobytes())

    @served
    async def Confirm(  # noqa: N802
        self, request: node_pb2.ConfirmRequest, context: Context
    ) -> node_pb2.ConfirmReply:
        self._tags.admit(request.tag)
        space = self._shard.spaces.get(request.space)
        return node_pb2.ConfirmReply(freed=await self._shard.pager.confirm(space, request.token))

    @served
    async def Free(  # noqa: N802
        self, request: node_pb2.FreeRequest, context: Context
    ) -> node_pb2.FreeReply:
        self._tags.admit(request.tag)
        space = self._shard.spaces.get(request.space)
        slots = _slots(request.slots)
        if len(slots) > MAX_FREE_SLOTS:
            raise BatchTooLarge(
                f"{len(slots)} slots to free at once; the limit is {MAX_FREE_SLOTS}",
                got=len(slots), limit=MAX_FREE_SLOTS,
            )  # fmt: skip
        _check_distinct(space, slots)
        return node_pb2.FreeReply(freed=await self._shard.pager.free(space, slots))

    @served
    async def Locate(  # noqa: N802
        self, request: node_pb2.LocateRequest, context: Context
    ) -> node_pb2.LocateReply:
        space = self._shard.spaces.get(request.space)
        places = self._shard.pager.locate(space, _slots(request.slots))
        return node_pb2.LocateReply(places=places.tobytes(), names=self._shard.places)


class Room:
    """A bound on bytes in flight. Fair: who waits longest goes first."""

    def __init__(self, limit_bytes: int, waiting_bytes: int) -> None:
        self._free = limit_bytes
        self._waiting_free = waiting_bytes
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()

    @asynccontextmanager
    async def take(self, amount_bytes: int, *, held_bytes: int = 0) -> AsyncIterator[None]:
        """Waits for room; ``held_bytes`` of memory are taken up meanwhile.

        Raises Unreachable where those who wait hold too much already.
        """
        if held_bytes > self._waiting_free:
            raise Unreachable("the node is overloaded: too many stores wait already; try again")
        self._waiting_free -= held_bytes
        try:
            async with self._turn:
                while self._free < amount_bytes:
                    self._freed.clear()
                    await self._freed.wait()
                self._free -= amount_bytes
        finally:
            self._waiting_free += held_bytes
        try:
            yield
        finally:
            self._free += amount_bytes
            self._freed.set()


def _slots(data: bytes) -> U64:
    if len(data) % 8:
        raise InvalidRequest(f"slots are 8 bytes each; {len(data)} bytes is no multiple")
    slots: U64 = np.frombuffer(data, "<u8")
    return slots


def _check_batch(space: Space, slots: U64) -> None:
    got = len(slots) * space.page_bytes
    if got > MAX_BATCH_BYTES:
        raise BatchTooLarge(
            f"a batch of {len(slots)} pages has {got} bytes; the limit is {MAX_BATCH_BYTES} "
            f"({MAX_BATCH_BYTES // space.page_bytes} pages of this space)",
            got=got, limit=MAX_BATCH_BYTES,
        )  # fmt: skip


def _check_distinct(space: Space, slots: U64) -> None:
    # A set of Python integers is cheaper than numpy's sort, up to far beyond the batch limit.
    if len(set(slots.tolist())) != len(slots):
        distinct, counts = np.unique(slots, return_counts=True)
        twice = distinct[counts > 1]
        raise DuplicateSlots(
            f"slot {int(twice[0])} occurs more than once in a batch",
            space=space.name, slots=twice.tolist(),
        )  # fmt: skip
