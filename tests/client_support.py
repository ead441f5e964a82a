"""For tests of the client: a node that is a dict, and the `vswap` command in this process.

The node is behind the real Pages and NodeAdmin services. It does what node.proto says, fences by
request tag, and can be told to fail or to lose replies.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any
from unittest import mock

import grpc
import numpy as np
import pytest

from vswap.cli.main import main
from vswap.v1 import common_pb2, node_pb2, node_pb2_grpc
from vswap.wire import errors, rpc

PAGE_BYTES = 4096
MAX_SLOTS = 1 << 20


class DictNode:
    """Pages in a dict. ``before`` and ``after`` are called with each request and may raise."""

    def __init__(self) -> None:
        self.pages: dict[int, bytes] = {}
        self.requests: list[Any] = []
        self.before: Callable[[Any], None] = lambda request: None
        self.after: Callable[[Any], None] = lambda request: None
        self.address = ""
        self._open: dict[int, int] = {}
        self._tokens: dict[int, list[int]] = {}
        self._lock = threading.Lock()

    def store(self, request: node_pb2.StoreRequest) -> node_pb2.StoreReply:
        slots = _slots(request.slots)
        if len(request.pages) != len(slots) * PAGE_BYTES:
            raise errors.PageSizeMismatch("wrong length")
        if slots and max(slots) >= MAX_SLOTS:
            raise errors.SlotOutOfRange("slot out of range", slots=slots, max_slots=MAX_SLOTS)
        for row, slot in enumerate(slots):
            self.pages[slot] = request.pages[row * PAGE_BYTES : (row + 1) * PAGE_BYTES]
        return node_pb2.StoreReply()

    def load(self, request: node_pb2.LoadRequest) -> node_pb2.LoadReply:
        slots = _slots(request.slots)
        missing = [slot for slot in slots if slot not in self.pages]
        if missing:
            raise errors.SlotNotFound("nothing there", slots=missing, space=request.space)
        token = len(self._tokens) + 1 if request.exclusive else 0
        if token:
            self._tokens[token] = slots
        return node_pb2.LoadReply(pages=b"".join(self.pages[s] for s in slots), token=token)

    def confirm(self, request: node_pb2.ConfirmRequest) -> node_pb2.ConfirmReply:
        slots = self._tokens.pop(request.token, None)
        if slots is None:
            raise errors.StaleIncarnation("no such exclusive load")
        return node_pb2.ConfirmReply(freed=self._drop(slots))

    def free(self, request: node_pb2.FreeRequest) -> node_pb2.FreeReply:
        return node_pb2.FreeReply(freed=self._drop(_slots(request.slots)))

    def locate(self, request: node_pb2.LocateRequest) -> node_pb2.LocateReply:
        places = bytes(2 if slot in self.pages else 0 for slot in _slots(request.slots))
        return node_pb2.LocateReply(places=places, names=["free", "fill", "ram"])

    def list_spaces(self, request: node_pb2.ListSpacesRequest) -> node_pb2.ListSpacesReply:
        return node_pb2.ListSpacesReply(spaces=[self.space()])

    def create_space(self, request: node_pb2.CreateSpaceRequest) -> node_pb2.Space:
        if request.name == "default" and not request.exist_ok:
            raise errors.AlreadyExists("there is one")
        space = self.space()
        space.name = request.name
        space.limits.CopyFrom(request.limits)
        return space

    def set_space(self, request: node_pb2.SetSpaceRequest) -> node_pb2.Space:
        space = self.space()
        space.limits.CopyFrom(request.limits)
        return space

    def delete_space(self, request: node_pb2.DeleteSpaceRequest) -> node_pb2.DeleteSpaceReply:
        return node_pb2.DeleteSpaceReply(pages=len(self.pages))

    def get_node(self, request: node_pb2.GetNodeRequest) -> node_pb2.NodeStatus:
        usage = common_pb2.TierUsage(
            tier="ram",
            pages=len(self.pages),
            logical_bytes=len(self.pages) * PAGE_BYTES,
            live_bytes=1000,
            stored_bytes=2000,
            limit_bytes=1 << 30,
            available=True,
            local=True,
            state="TIER_STATE_ACTIVE",
        )
        return node_pb2.NodeStatus(
            name="dict", version="0", coordinator="alone", pages=len(self.pages), tiers=[usage]
        )

    def set_fault(self, request: node_pb2.SetFaultRequest) -> node_pb2.SetFaultReply:
        raise errors.Refused("not for tests")

    def leave(self, request: node_pb2.LeaveRequest) -> node_pb2.LeaveReply:
        if self.pages:
            raise errors.Refused("pages are left", pages=len(self.pages))
        return node_pb2.LeaveReply()

    def space(self) -> node_pb2.Space:
        return node_pb2.Space(
            name="default", page_bytes=PAGE_BYTES, max_slots=MAX_SLOTS, pages=len(self.pages)
        )

    # -------------------------------------------------------------- the edge

    def serve(self, answer: Callable[[Any], Any]) -> Callable[[Any, grpc.ServicerContext], Any]:
        def handle(request: Any, context: grpc.ServicerContext) -> Any:
            try:
                with self._lock:
                    self.requests.append(request)
                    self.before(request)
                    self._fence(request)
                    reply = answer(request)
                    self.after(request)
                    return reply
            except errors.VswapError as error:
                code, details, metadata = rpc.to_status(error)
                context.set_trailing_metadata(metadata)
                context.abort(code, details)

        return handle

    def apply(self, request: Any) -> None:
        """A copy of a request that arrives late."""
        self._fence(request)
        self.store(request)

    def _fence(self, request: Any) -> None:
        if "tag" not in request.DESCRIPTOR.fields_by_name or not request.tag.session:
            return
        tag = request.tag
        highest = max(self._open.get(tag.session, 0), tag.oldest_open)
        self._open[tag.session] = highest
        if tag.number < highest:
            raise errors.StaleIncarnation("given up by its client")

    def _drop(self, slots: list[int]) -> int:
        return sum(self.pages.pop(slot, None) is not None for slot in slots)


def _slots(data: bytes) -> list[int]:
    return [int(slot) for slot in np.frombuffer(data, "<u8")]


class _Servicer(node_pb2_grpc.PagesServicer, node_pb2_grpc.NodeAdminServicer):
    """Gives the generated code its method names. Streams are not served."""

    def __init__(self, node: DictNode) -> None:
        for service in ("Pages", "NodeAdmin"):
            for method in node_pb2.DESCRIPTOR.services_by_name[service].methods:
                if method.server_streaming:
                    continue
                name = re.sub("(?<!^)(?=[A-Z])", "_", method.name).lower()
                setattr(self, method.name, node.serve(getattr(node, name)))


@contextmanager
def dict_node(address: str = "127.0.0.1:0") -> Iterator[DictNode]:
    """A running `DictNode` with its ``address`` set."""
    node = DictNode()
    server = grpc.server(futures.ThreadPoolExecutor(8), options=rpc.CHANNEL_OPTIONS)
    servicer: Any = _Servicer(node)
    generated: Any = node_pb2_grpc
    generated.add_PagesServicer_to_server(servicer, server)
    generated.add_NodeAdminServicer_to_server(servicer, server)
    port = server.add_insecure_port(address)
    node.address = address if address.startswith("unix:") else f"127.0.0.1:{port}"
    server.start()
    try:
        yield node
    finally:
        server.stop(0)


def run_vswap(*arguments: str, coordinator: str = "") -> subprocess.CompletedProcess[str]:
    """The command in this process, which spares its imports, but otherwise whole."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, VSWAP_COORDINATOR=coordinator),
        mock.patch.object(sys, "argv", ["vswap", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    code = ended.value.code
    assert isinstance(code, int)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())
