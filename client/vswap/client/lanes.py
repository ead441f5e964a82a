"""Numbers requests so that a node can refuse a late copy of one that was given up.

The protocol (``RequestTag`` in node.proto): a node refuses a request whose number is below the
highest ``oldest_open`` that it saw from the same session. One session with many requests in flight
could not fence a request before all older ones ended. So a client holds several sessions, here
called lanes, with at most one request each: the next request of a lane fences the one before it
at once.

A lane whose last request may still arrive is *dirty*. No write may start while a lane is dirty,
or the late copy could overwrite it: the client first sends an empty request in each dirty lane.
"""

from __future__ import annotations

import secrets
import threading
from typing import Any

import grpc

from vswap.v1 import node_pb2
from vswap.wire.errors import OutcomeUnknown, Unreachable, VswapError
from vswap.wire.rpc import METADATA_KEY


class Lane:
    """One session of the protocol. Used by one call at a time.

    ``settled``: every request sent in this lane was answered or cannot arrive any more.
    """

    __slots__ = ("_number", "_session", "_settled_before", "settled")

    def __init__(self) -> None:
        self._session = secrets.randbits(64) or 1
        self._number = 0
        self._settled_before = True
        self.settled = True

    def next_tag(self) -> node_pb2.RequestTag:
        """The tag of a new request, which gives up every earlier one of this lane.

        Until `answered` or `failed` is called the lane is unsettled, also if the caller is
        cancelled or interrupted.
        """
        self._number += 1
        self._settled_before, self.settled = self.settled, False
        return node_pb2.RequestTag(
            session=self._session, number=self._number, oldest_open=self._number
        )

    def answered(self) -> None:
        """The newest request was answered, and it fenced those before it."""
        self.settled = True

    def failed(self, failure: grpc.RpcError, error: VswapError) -> None:
        """The newest request failed with ``failure``, which stands for ``error``."""
        if isinstance(error, Unreachable):
            self.settled = self._settled_before
        else:
            self.settled = _by_node(failure) or not isinstance(error, OutcomeUnknown)


class Lanes:
    """A client's lanes: as many as it ever had calls in flight. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[Lane] = []
        self._dirty: list[Lane] = []

    def take(self) -> Lane:
        """A clean lane for one call; hand it back with `give`."""
        with self._lock:
            return self._free.pop() if self._free else Lane()

    def give(self, lane: Lane) -> None:
        with self._lock:
            (self._free if lane.settled else self._dirty).append(lane)

    def dirty(self) -> list[Lane]:
        """Lanes to be fenced before the next write."""
        with self._lock:
            return list(self._dirty)

    def cleaned(self, lane: Lane) -> None:
        """The node has answered a newer request of this dirty lane."""
        with self._lock:
            self._dirty.remove(lane)
            self._free.append(lane)


def _by_node(failure: grpc.RpcError) -> bool:
    """Whether the node itself sent this error, rather than gRPC on this side."""
    call: Any = failure
    metadata = call.trailing_metadata() if hasattr(call, "trailing_metadata") else None
    return any(item[0] == METADATA_KEY for item in metadata or ())
