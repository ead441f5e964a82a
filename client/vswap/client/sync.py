"""The synchronous client."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, TypeVar, overload

import grpc
import numpy as np
from numpy.typing import NDArray

from vswap.client import calls, channels
from vswap.client.attempts import Attempts, Policy
from vswap.client.calls import Call, PageArray, Pages, Slots
from vswap.client.lanes import Lane, Lanes
from vswap.v1 import node_pb2
from vswap.wire.errors import InvalidRequest, VswapError
from vswap.wire.rpc import from_rpc_error

Out = TypeVar("Out")


class Client:
    """A connection to one node, at ``host:port`` or ``unix:/path``. Connects on first use.

    Thread-safe: any number of threads may call at once over the one connection. A call that fails
    for a passing reason (TierUnavailable, Unreachable, OutcomeUnknown) is repeated with growing
    pauses for ``retry_s`` seconds (0: never); one attempt takes at most ``deadline_s``. Every
    error is a `vswap.wire.errors.VswapError`; OutcomeUnknown from a store, free or confirm means
    that it may have happened, and that repeating it is safe.
    """

    def __init__(self, address: str, *, deadline_s: float = 30.0, retry_s: float = 10.0) -> None:
        self.address = channels.check_address(address)
        self._policy = Policy(deadline_s, retry_s)
        self._channel = grpc.insecure_channel(self.address, options=channels.OPTIONS)
        self._stubs = channels.node_stubs(self._channel)
        self._lanes = Lanes()
        self._fencing = threading.Lock()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls under way fail. Idempotent."""
        self._channel.close()

    # -------------------------------------------------------------- spaces

    def space(self, name: str = "default") -> Space:
        """The space of that name (one round trip); UnknownSpace if the node has none."""
        return Space(self, self._run(calls.find_space(name, self.address)))

    def create_space(
        self,
        name: str,
        *,
        page_bytes: int = 4096,
        max_slots: int = 2**28,
        quota_bytes: int = 0,
        tiers: Iterable[str] = (),
        tier_max_bytes: Mapping[str, int] | None = None,
        exist_ok: bool = False,
    ) -> Space:
        """Create a space and return it.

        ``page_bytes`` is a power of two, 4096 to 65536; ``quota_bytes`` bounds the stored bytes (0:
        no quota); ``tiers`` are those it may use (none named: all); ``tier_max_bytes`` bounds its
        stored bytes per tier (0 forbids the tier). AlreadyExists if there is one of that name,
        unless ``exist_ok`` and its page size and maximum are the same.
        """
        call = calls.create_space(
            name, page_bytes, max_slots, quota_bytes, tiers, tier_max_bytes or {}, exist_ok
        )
        return Space(self, self._run(call))

    def set_space(
        self,
        name: str,
        *,
        quota_bytes: int = 0,
        tiers: Iterable[str] = (),
        tier_max_bytes: Mapping[str, int] | None = None,
        max_slots: int = 0,
    ) -> node_pb2.Space:
        """Replace the limits of a space as a whole; ``max_slots`` may only grow (0: unchanged)."""
        call = calls.set_space(name, quota_bytes, tiers, tier_max_bytes or {}, max_slots)
        return self._run(call)

    def delete_space(self, name: str) -> int:
        """Delete a space with all its pages; returns how many there were."""
        return self._run(calls.delete_space(name))

    def spaces(self) -> list[node_pb2.Space]:
        """Every space of the node with its limits and accounting (``Space`` in node.proto)."""
        return self._run(calls.list_spaces())

    def status(self) -> node_pb2.NodeStatus:
        """The node's tiers, counters and pressure (``NodeStatus`` in node.proto)."""
        return self._run(calls.status())

    def set_fault(self, tier: str, plan: str) -> str:
        """Make a tier of the node misbehave, or, as ``red/2``, one of its servers ("off": no
        longer); returns the plan before, "" for none. Refused by a node that was not started with
        ``--allow-faults``."""
        return self._run(calls.set_fault(tier, plan))

    def check(self, *, deep: bool = False) -> Iterator[node_pb2.CheckProgress]:
        """Have the node hold tables, books and backends against each other; how far it is,
        twice a second, the last one with ``done``. Closing the iterator ends the check."""
        stream = self._stubs["NodeAdmin"].Check(node_pb2.CheckRequest(deep=deep))
        try:
            yield from stream
        except grpc.RpcError as failure:
            raise from_rpc_error(failure, self.address) from failure
        finally:
            stream.cancel()

    def scrub(self, tier: str = "", rate_bytes_s: int = 0) -> Iterator[node_pb2.ScrubProgress]:
        """Have the node read and verify all that it stores, or one tier; how far it is, twice a
        second, the last one with ``done``. Closing the iterator ends the pass."""
        stream = self._stubs["NodeAdmin"].Scrub(
            node_pb2.ScrubRequest(tier=tier, rate_bytes_s=rate_bytes_s)
        )
        try:
            yield from stream
        except grpc.RpcError as failure:
            raise from_rpc_error(failure, self.address) from failure
        finally:
            stream.cancel()

    def leave(self) -> None:
        """Retire the node for good; its daemon ends. Refused while it holds pages."""
        self._run(calls.leave())

    # -------------------------------------------------------------- calls

    def _run(self, call: Call[Out], space: str = "") -> Out:
        attempts = Attempts(self._policy, writes=call.tagged, now_s=time.monotonic())
        lane = self._lanes.take() if call.tagged else None
        try:
            while True:
                try:
                    if lane is not None:
                        self._fence(space)
                    reply = self._send(call, lane)
                except VswapError as error:
                    time.sleep(attempts.pause_s(error, time.monotonic()))
                else:
                    return call.decode(reply)
        finally:
            if lane is not None:
                self._lanes.give(lane)

    def _send(self, call: Call[Any], lane: Lane | None) -> Any:
        if lane is not None:
            call.request.tag.CopyFrom(lane.next_tag())
        method = getattr(self._stubs[call.service], call.method)
        try:
            reply = method(call.request, timeout=self._policy.deadline_s)
        except grpc.RpcError as failure:
            error = from_rpc_error(failure, self.address)
            if lane is not None:
                lane.failed(failure, error)
            raise error from failure
        except ValueError as failure:
            raise InvalidRequest(f"the client of {self.address} is closed") from failure
        if lane is not None:
            lane.answered()
        return reply

    def _fence(self, space: str) -> None:
        if not self._lanes.dirty():
            return
        with self._fencing:
            for lane in self._lanes.dirty():
                try:
                    self._send(calls.fence(space), lane)
                except VswapError:
                    if not lane.settled:
                        raise
                self._lanes.cleaned(lane)


class Space:
    """A space of one node. Thread-safe; obtained from `Client.space` or `Client.create_space`.

    Attributes: ``name``, ``page_bytes``, ``max_slots``, and ``max_batch``: most pages in a batch.

    A batch is atomic, so it is never split: more than ``max_batch`` pages raise BatchTooLarge. A
    store or free that fails has changed nothing, except with OutcomeUnknown, where it may have
    happened. Each call is one round trip.
    """

    def __init__(self, client: Client, info: node_pb2.Space) -> None:
        self._client = client
        self.name: str = info.name
        self.page_bytes: int = info.page_bytes
        self.max_slots: int = info.max_slots
        self.max_batch: int = calls.max_batch(info.page_bytes)

    def __repr__(self) -> str:
        return f"<Space {self.name!r} at {self._client.address}, {self.page_bytes}-byte pages>"

    def store(self, slots: Slots, pages: Pages) -> None:
        """Store one page per slot; returns when every page can be loaded.

        ``slots`` is array-like (n,) without duplicates, ``pages`` an array (n, page_bytes) of uint8
        or n * page_bytes bytes; or one int and one page. Replaces what the slots held. Raises
        PageSizeMismatch, SlotOutOfRange, DuplicateSlots, BatchTooLarge, SpaceFull, OutOfTiers,
        TierUnavailable, OutcomeUnknown.
        """
        call = calls.store(self.name, self.page_bytes, slots, pages)
        self._client._run(call, self.name)

    @overload
    def load(self, slots: int, out: None = None) -> bytes: ...
    @overload
    def load(self, slots: Slots, out: PageArray | None = None) -> PageArray: ...
    def load(self, slots: Slots, out: PageArray | None = None) -> PageArray | bytes:
        """The pages of the slots, in their order; the stored copies stay.

        For slots (n,): an array (n, page_bytes) of uint8, read-only unless it is ``out``, a
        writable array of that shape. For one int: bytes. Slots may repeat. Raises SlotNotFound if
        any slot holds nothing, PageLost or PageCorrupt if any page is gone or fails its check.
        """
        call = calls.load(self.name, self.page_bytes, slots, out)
        pages = self._client._run(call, self.name)
        return pages[0].tobytes() if isinstance(slots, int) and out is None else pages

    def load_exclusive(self, slots: Slots) -> ExclusiveLoad:
        """Load pages in order to free them: see `ExclusiveLoad`. Slots must not repeat."""
        call = calls.load_exclusive(self.name, self.page_bytes, slots)
        pages, token = self._client._run(call, self.name)
        return ExclusiveLoad(self, pages, token)

    def free(self, slots: Slots) -> int:
        """Free slots; those that hold nothing are ignored. Returns how many held a page.

        If an attempt was repeated the number is that of the last attempt.
        """
        return self._client._run(calls.free(self.name, slots), self.name)

    @overload
    def locate(self, slots: int) -> str: ...
    @overload
    def locate(self, slots: Slots) -> list[str]: ...
    def locate(self, slots: Slots) -> list[str] | str:
        """Where each slot's page lies: "free", "fill" or the name of a tier."""
        names, codes = self.locate_codes(slots)
        places = [names[code] for code in codes]
        return places[0] if isinstance(slots, int) else places

    def locate_codes(self, slots: Slots) -> tuple[list[str], NDArray[np.uint8]]:
        """As `locate`, for many slots: the names, and per slot an index (n,) of u8 into them."""
        return self._client._run(calls.locate(self.name, slots), self.name)


class ExclusiveLoad:
    """Pages that are freed once their loader has them safely.

    ``pages`` is a read-only array (n, page_bytes) of uint8. `confirm` frees the slots that were
    not stored again since. Unconfirmed, the pages stay stored. As a context manager it confirms
    on a clean exit and leaves everything stored when the block raises.
    """

    def __init__(self, space: Space, pages: PageArray, token: int) -> None:
        self._space = space
        self._token = token
        self.pages = pages

    def confirm(self) -> int:
        """Free what was loaded; returns how many slots were freed.

        Raises StaleIncarnation when the load is too long ago for the node to remember it.
        """
        call = calls.confirm(self._space.name, self._token)
        return self._space._client._run(call, self._space.name)

    def __enter__(self) -> ExclusiveLoad:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.confirm()
