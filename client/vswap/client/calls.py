"""Every call of the SDK as a value: its request, and how its reply is read. No I/O here.

Both clients run these calls, so whatever is checked or converted is the same in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vswap.v1 import node_pb2
from vswap.wire import rpc
from vswap.wire.errors import (
    BatchTooLarge,
    InternalError,
    InvalidRequest,
    PageSizeMismatch,
    SlotOutOfRange,
    UnknownSpace,
)

Out = TypeVar("Out")
Slots: TypeAlias = ArrayLike
Pages: TypeAlias = bytes | bytearray | memoryview | NDArray[np.uint8]
PageArray: TypeAlias = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Call(Generic[Out]):
    """One unary call: ``service`` is "Pages" or "NodeAdmin", ``decode`` reads its reply.

    A ``tagged`` call changes pages: its request has a ``tag``, set anew for every attempt.
    """

    service: str
    method: str
    request: Any
    decode: Callable[[Any], Out]
    tagged: bool = False


def slot_array(slots: Slots) -> NDArray[np.uint64]:
    """Slots as an array (n,) of u64. Refuses what is not a flat list of non-negative integers."""
    array = np.asarray(slots)
    if array.size == 0:
        return np.empty(0, np.uint64)
    if array.ndim > 1:
        raise InvalidRequest(f"slots must be one-dimensional, got shape {array.shape}")
    if array.dtype.kind not in "iu":
        raise InvalidRequest(f"slots must be integers, got {array.dtype}")
    if array.dtype.kind == "i" and array.min() < 0:
        raise SlotOutOfRange(f"slot {array.min()} is negative", slots=array[array < 0])
    return np.ascontiguousarray(array.reshape(-1), dtype="<u8")


def page_bytes_of(pages: Pages, count: int, page_bytes: int) -> bytes:
    """Pages as bytes for the wire. Refuses any but ``count`` whole pages of u8."""
    expected = count * page_bytes
    if isinstance(pages, np.ndarray):
        if pages.dtype != np.uint8:
            raise PageSizeMismatch(f"pages must be uint8, got {pages.dtype}", expected=expected)
        if pages.shape not in ((count, page_bytes), (expected,)):
            raise PageSizeMismatch(
                f"pages must have shape ({count}, {page_bytes}), got {pages.shape}",
                expected=expected,
                got=pages.nbytes,
            )
        return pages.tobytes()
    if not isinstance(pages, (bytes, bytearray, memoryview)):
        raise PageSizeMismatch(
            f"pages must be bytes or a uint8 array, got {type(pages).__name__}", expected=expected
        )
    data = pages if isinstance(pages, bytes) else bytes(pages)
    if len(data) != expected:
        raise PageSizeMismatch(
            f"{count} pages of {page_bytes} bytes are {expected} bytes, got {len(data)}",
            expected=expected,
            got=len(data),
        )
    return data


def max_batch(page_bytes: int) -> int:
    """Most pages of that size in one batch."""
    return rpc.MAX_BATCH_BYTES // page_bytes


def _check_batch(count: int, page_bytes: int) -> None:
    if count > max_batch(page_bytes):
        raise BatchTooLarge(
            f"{count} pages of {page_bytes} bytes are {count * page_bytes} bytes; one batch holds "
            f"{rpc.MAX_BATCH_BYTES} bytes ({max_batch(page_bytes)} pages)",
            limit=rpc.MAX_BATCH_BYTES,
            got=count * page_bytes,
        )


# ------------------------------------------------------------------ pages


def store(space: str, page_bytes: int, slots: Slots, pages: Pages) -> Call[None]:
    array = slot_array(slots)
    _check_batch(len(array), page_bytes)
    request = node_pb2.StoreRequest(
        space=space,
        slots=array.tobytes(),
        pages=page_bytes_of(pages, len(array), page_bytes),
    )
    return Call("Pages", "Store", request, lambda reply: None, tagged=True)


def load(
    space: str, page_bytes: int, slots: Slots, out: PageArray | None = None
) -> Call[PageArray]:
    """The pages as a read-only array (n, page_bytes), or written into ``out`` of that shape."""
    array = slot_array(slots)
    _check_batch(len(array), page_bytes)
    shape = (len(array), page_bytes)
    if out is not None and (out.dtype != np.uint8 or out.shape != shape or not out.flags.writeable):
        raise PageSizeMismatch(
            f"out must be a writable uint8 array of shape {shape}, got {out.dtype} {out.shape}",
            expected=len(array) * page_bytes,
            got=out.nbytes,
        )

    def decode(reply: node_pb2.LoadReply) -> PageArray:
        pages = _pages(reply.pages, shape)
        if out is None:
            return pages
        out[:] = pages
        return out

    request = node_pb2.LoadRequest(space=space, slots=array.tobytes())
    return Call("Pages", "Load", request, decode)


def load_exclusive(space: str, page_bytes: int, slots: Slots) -> Call[tuple[PageArray, int]]:
    """The pages, and the token with which they are freed."""
    array = slot_array(slots)
    _check_batch(len(array), page_bytes)
    request = node_pb2.LoadRequest(space=space, slots=array.tobytes(), exclusive=True)
    return Call(
        "Pages",
        "Load",
        request,
        lambda reply: (_pages(reply.pages, (len(array), page_bytes)), int(reply.token)),
        tagged=True,
    )


def confirm(space: str, token: int) -> Call[int]:
    request = node_pb2.ConfirmRequest(space=space, token=token)
    return Call("Pages", "Confirm", request, lambda reply: int(reply.freed), tagged=True)


def free(space: str, slots: Slots) -> Call[int]:
    array = slot_array(slots)
    if len(array) > rpc.MAX_FREE_SLOTS:
        raise BatchTooLarge(
            f"{len(array)} slots to free; one batch holds {rpc.MAX_FREE_SLOTS}",
            limit=rpc.MAX_FREE_SLOTS,
            got=len(array),
        )
    request = node_pb2.FreeRequest(space=space, slots=array.tobytes())
    return Call("Pages", "Free", request, lambda reply: int(reply.freed), tagged=True)


def fence(space: str) -> Call[None]:
    """Does nothing, but its tag makes the node refuse what came before it in its lane."""
    request = node_pb2.FreeRequest(space=space)
    return Call("Pages", "Free", request, lambda reply: None, tagged=True)


def locate(space: str, slots: Slots) -> Call[tuple[list[str], NDArray[np.uint8]]]:
    """Names of places, and per slot an index (n,) of u8 into them."""
    array = slot_array(slots)
    _check_batch(len(array), array.itemsize)

    def decode(reply: node_pb2.LocateReply) -> tuple[list[str], NDArray[np.uint8]]:
        codes = np.frombuffer(reply.places, np.uint8)
        if len(codes) != len(array):
            raise InternalError(f"asked for {len(array)} places, got {len(codes)}")
        return list(reply.names), codes

    request = node_pb2.LocateRequest(space=space, slots=array.tobytes())
    return Call("Pages", "Locate", request, decode)


def _pages(data: bytes, shape: tuple[int, int]) -> PageArray:
    if len(data) != shape[0] * shape[1]:
        raise InternalError(f"asked for {shape[0]} pages of {shape[1]} bytes, got {len(data)}")
    return np.frombuffer(data, np.uint8).reshape(shape)


# ------------------------------------------------------------------ spaces and status


def create_space(
    name: str,
    page_bytes: int,
    max_slots: int,
    quota_bytes: int,
    tiers: Iterable[str],
    tier_max_bytes: Mapping[str, int],
    exist_ok: bool,
) -> Call[node_pb2.Space]:
    request = node_pb2.CreateSpaceRequest(
        name=name,
        page_bytes=page_bytes,
        max_slots=max_slots,
        limits=limits(quota_bytes, tiers, tier_max_bytes),
        exist_ok=exist_ok,
    )
    return Call("NodeAdmin", "CreateSpace", request, lambda reply: reply)


def set_space(
    name: str,
    quota_bytes: int,
    tiers: Iterable[str],
    tier_max_bytes: Mapping[str, int],
    max_slots: int,
) -> Call[node_pb2.Space]:
    request = node_pb2.SetSpaceRequest(
        name=name, limits=limits(quota_bytes, tiers, tier_max_bytes), max_slots=max_slots
    )
    return Call("NodeAdmin", "SetSpace", request, lambda reply: reply)


def limits(
    quota_bytes: int, tiers: Iterable[str], tier_max_bytes: Mapping[str, int]
) -> node_pb2.SpaceLimits:
    return node_pb2.SpaceLimits(
        quota_bytes=quota_bytes, tiers=list(tiers), tier_max_bytes=dict(tier_max_bytes)
    )


def delete_space(name: str) -> Call[int]:
    request = node_pb2.DeleteSpaceRequest(name=name)
    return Call("NodeAdmin", "DeleteSpace", request, lambda reply: int(reply.pages))


def list_spaces() -> Call[list[node_pb2.Space]]:
    request = node_pb2.ListSpacesRequest()
    return Call("NodeAdmin", "ListSpaces", request, lambda reply: list(reply.spaces))


def find_space(name: str, address: str) -> Call[node_pb2.Space]:
    """The one space of that name; UnknownSpace names those that are there."""

    def decode(reply: node_pb2.ListSpacesReply) -> node_pb2.Space:
        for space in reply.spaces:
            if space.name == name:
                return space
        there = ", ".join(space.name for space in reply.spaces) or "none"
        raise UnknownSpace(f"no space {name!r} at {address} (there: {there})", space=name)

    return Call("NodeAdmin", "ListSpaces", node_pb2.ListSpacesRequest(), decode)


def set_fault(tier: str, plan: str) -> Call[str]:
    request = node_pb2.SetFaultRequest(tier=tier, plan=plan)
    return Call("NodeAdmin", "SetFault", request, lambda reply: str(reply.before))


def leave() -> Call[None]:
    return Call("NodeAdmin", "Leave", node_pb2.LeaveRequest(), lambda reply: None)


def status() -> Call[node_pb2.NodeStatus]:
    return Call("NodeAdmin", "GetNode", node_pb2.GetNodeRequest(), lambda reply: reply)
