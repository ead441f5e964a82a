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
from vswap.wire.errors import BatchTooLarge, DuplicateSlots, InvalidRequest, PageSizeMismatch
from vswap.wire.rpc import MAX_BATCH_BYTES


class PagesService(node_pb2_grpc.PagesServicer):
    """Validates, then hands numpy views of the message to the pager; no copy on the way in.

    ``inflight_bytes`` bounds the page bytes of all calls under way: further calls wait.
    """

    def __init__(self, shard: Shard, *, inflight_bytes: int) -> None:
        self._shard = shard
        self._tags = Tags()
        self._room = Room(max(inflight_bytes, MAX_BATCH_BYTES))

    @served
    async def Store(  # noqa: N802
        self, request: node_pb2.StoreRequest, context: Context
    ) -> node_pb2.StoreReply:
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
        async with self._room.take(len(request.pages)):
            self._tags.admit(request.tag)
            await self._shard.pager.store(space, slots, pages)
        return node_pb2.StoreReply()

    @served
    async def Load(  # noqa: N802
        self, request: node_pb2.LoadRequest, context: Context
    ) -> node_pb2.LoadReply:
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
        space = self._shard.spaces.get(request.space)
        self._tags.admit(request.tag)
        return node_pb2.ConfirmReply(freed=await self._shard.pager.confirm(space, request.token))

    @served
    async def Free(  # noqa: N802
        self, request: node_pb2.FreeRequest, context: Context
    ) -> node_pb2.FreeReply:
        space = self._shard.spaces.get(request.space)
        slots = _slots(request.slots)
        _check_distinct(space, slots)
        self._tags.admit(request.tag)
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

    def __init__(self, limit_bytes: int) -> None:
        self._free = limit_bytes
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()

    @asynccontextmanager
    async def take(self, amount_bytes: int) -> AsyncIterator[None]:
        async with self._turn:
            while self._free < amount_bytes:
                self._freed.clear()
                await self._freed.wait()
            self._free -= amount_bytes
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
    distinct, counts = np.unique(slots, return_counts=True)
    if len(distinct) != len(slots):
        twice = distinct[counts > 1]
        raise DuplicateSlots(
            f"slot {int(twice[0])} occurs {int(counts.max())} times in one batch",
            space=space.name, slots=twice.tolist(),
        )  # fmt: skip
