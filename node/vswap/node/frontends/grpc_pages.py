"""The Pages service: the pager over gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np

from vswap.node.shard import Shard
from vswap.node.spaces import Space
from vswap.node.tags import Tags
from vswap.tiers.record import U8, U64
from vswap.v1 import node_pb2
from vswap.wire.aio import Context, served
from vswap.wire.errors import (
    BatchTooLarge,
    DuplicateSlots,
    InvalidRequest,
    PageSizeMismatch,
    Unreachable,
)
from vswap.wire.rpc import MAX_BATCH_BYTES, MAX_FREE_SLOTS

_ARRIVAL_S = _DEPARTURE_S = 10.0
"""A store that has room must arrive in it, and a reply be taken: they keep room from others."""


class PagesService:
    """Validates, then hands numpy views of the message to the pager; no copy on the way in.

    ``inflight_bytes`` bounds the page bytes of all calls under way; further calls wait. So that
    they wait with the client, not in our memory, a store is read from its connection once there is
    room for it, and a load's room is free once its reply has gone.

    A tag is admitted before anything is answered but Unreachable, so that any other answer tells
    the client that its earlier requests are fenced; and after the wait, in the turn in which the
    pager takes the request.
    """

    def __init__(self, shard: Shard, *, inflight_bytes: int) -> None:
        self._shard = shard
        self._tags = Tags()
        self._room = Room(max(inflight_bytes, MAX_BATCH_BYTES))

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serves the calls there. On the wire a stream of one message is the message."""
        v1 = node_pb2
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Store": grpc.stream_unary_rpc_method_handler(
                self.store, v1.StoreRequest.FromString, v1.StoreReply.SerializeToString
            ),
            "Load": grpc.unary_stream_rpc_method_handler(
                self.load, v1.LoadRequest.FromString, v1.LoadReply.SerializeToString
            ),
            "Confirm": grpc.unary_unary_rpc_method_handler(
                self.confirm, v1.ConfirmRequest.FromString, v1.ConfirmReply.SerializeToString
            ),
            "Free": grpc.unary_unary_rpc_method_handler(
                self.free, v1.FreeRequest.FromString, v1.FreeReply.SerializeToString
            ),
            "Locate": grpc.unary_unary_rpc_method_handler(
                self.locate, v1.LocateRequest.FromString, v1.LocateReply.SerializeToString
            ),
        }
        name = v1.DESCRIPTOR.services_by_name["Pages"].full_name
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))

    @served
    async def store(
        self, _requests: AsyncIterator[node_pb2.StoreRequest], context: Context
    ) -> node_pb2.StoreReply:
        async with self._room.take(MAX_BATCH_BYTES) as held:
            # Not from the iterator, which keeps a message for long after the call.
            request = await _first(context)
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
            held.shrink(len(request.pages))
            pages: U8 = np.frombuffer(request.pages, np.uint8).reshape(-1, space.page_bytes)
            await self._shard.pager.store(space, slots, pages)
        return node_pb2.StoreReply()

    @served
    async def load(self, request: node_pb2.LoadRequest, context: Context) -> None:
        self._tags.admit(request.tag)
        space = self._shard.spaces.get(request.space)
        slots = _slots(request.slots)
        _check_batch(space, slots)
        if request.exclusive:
            _check_distinct(space, slots)
        async with self._room.take(len(slots) * space.page_bytes):
            self._tags.admit(request.tag)
            token = 0
            if request.exclusive:
                pages, token = await self._shard.pager.load_exclusive(space, slots)
            else:
                pages = await self._shard.pager.load(space, slots)
            reply = node_pb2.LoadReply(pages=pages.tobytes(), token=token)
            try:
                await asyncio.wait_for(context.write(reply), _DEPARTURE_S)
            except TimeoutError:
                raise Unreachable(f"a reply was not taken for {_DEPARTURE_S:.0f} s") from None

    @served
    async def confirm(
        self, request: node_pb2.ConfirmRequest, context: Context
    ) -> node_pb2.ConfirmReply:
        self._tags.admit(request.tag)
        space = self._shard.spaces.get(request.space)
        return node_pb2.ConfirmReply(freed=await self._shard.pager.confirm(space, request.token))

    @served
    async def free(self, request: node_pb2.FreeRequest, context: Context) -> node_pb2.FreeReply:
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
    async def locate(
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
    async def take(self, amount_bytes: int) -> AsyncIterator[Held]:
        """Waits for room."""
        async with self._turn:
            while self._free < amount_bytes:
                self._freed.clear()
                await self._freed.wait()
            self._free -= amount_bytes
        held = Held(self, amount_bytes)
        try:
            yield held
        finally:
            held.shrink(0)

    def give(self, amount_bytes: int) -> None:
        self._free += amount_bytes
        self._freed.set()


class Held:
    """Room that is taken."""

    def __init__(self, room: Room, amount_bytes: int) -> None:
        self._room = room
        self._amount = amount_bytes

    def shrink(self, amount_bytes: int) -> None:
        """Gives back what is not needed."""
        self._room.give(self._amount - amount_bytes)
        self._amount = amount_bytes


async def _first(context: Context) -> node_pb2.StoreRequest:
    try:
        request: Any = await asyncio.wait_for(context.read(), _ARRIVAL_S)
    except TimeoutError:
        raise Unreachable(f"a store did not arrive within {_ARRIVAL_S:.0f} s") from None
    if request is grpc.aio.EOF:
        raise InvalidRequest("a store without a message")
    found: node_pb2.StoreRequest = request
    return found


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
