"""A gRPC stream as the control plane uses it, over the simulated network.

Both ends are production code: ``Control`` holds the call, ``NodeLinkService.Connect`` serves it.
What is written arrives in order, or the stream breaks; while the two are cut off it waits, until
both sides' keepalive gives up.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, NoReturn, TypeAlias

import grpc
from sim.loop import Process
from sim.net import Net

from vswap.coordinator.service import NodeLinkService

_KEEPALIVE_S = 15.0
_AGAIN_S = 0.2

_END = object()

Find: TypeAlias = Callable[[], tuple[Process, NodeLinkService] | None]
"""Who listens, if anybody does."""


class _Pipe:
    """One direction: ordered, delayed, held up while the two are cut off."""

    def __init__(self, net: Net, source: Process, target: Process) -> None:
        self._net = net
        self._source = source
        self._target = target
        self._last_s = 0.0
        self.inbox: asyncio.Queue[Any] = asyncio.Queue()

    def push(self, item: Any) -> None:
        """A message, an exception, or _END."""
        if self._source.alive:
            loop = self._net.loop
            self._last_s = max(self._last_s, loop.time() + self._net.delay_s())
            loop.call_at(self._last_s, self._deliver, item, context=self._target.context)

    def _deliver(self, item: Any) -> None:
        if not self._net.is_cut(self._source, self._target):
            self.inbox.put_nowait(item)
            return
        # Sent again until it arrives; what follows waits behind it.
        when_s = self._net.loop.time() + _AGAIN_S
        self._last_s = max(self._last_s, when_s)
        self._net.loop.call_at(when_s, self._deliver, item, context=self._target.context)

    def breaks(self, error: Exception) -> None:
        """The target notices, by itself."""
        self._net.loop.call_soon(self.inbox.put_nowait, error, context=self._target.context)


def _rpc_error(code: grpc.StatusCode, details: str, metadata: Any = ()) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(
        code, grpc.aio.Metadata(), grpc.aio.Metadata(*metadata), details=details
    )


class _Aborted(grpc.aio.AbortError):
    """What a service's context raises to end a call."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.error = error


class _Context:
    async def abort(self, code: grpc.StatusCode, details: str = "", metadata: Any = ()) -> NoReturn:
        raise _Aborted(_rpc_error(code, details, metadata))


class _Stream:
    """One call: the node's end of it has the interface of ``grpc.aio.StreamStreamCall``."""

    def __init__(self, net: Net, find: Find) -> None:
        self._net = net
        self._own = Process.current()
        self._over = False
        self._serving: asyncio.Task[None] | None = None
        found = find()
        if found is None:
            self._down = _Pipe(net, self._own, self._own)
            self._refuse("nobody listens")
            return
        self._there, self._service = found
        self._up = _Pipe(net, self._own, self._there)
        self._down = _Pipe(net, self._there, self._own)
        if net.is_cut(self._own, self._there):
            self._refuse("no route")
            return
        self._own.on_end.append(self._own_end)
        self._there.on_end.append(self._their_end)
        net.later(self._there, net.delay_s(), self._accept)
        self._watch(self._own, self._down)
        self._watch(self._there, self._up)

    def _refuse(self, why: str) -> None:
        self._down.push(_rpc_error(grpc.StatusCode.UNAVAILABLE, why))

    # ---------------------------------------------------------------- the node's end

    async def write(self, message: Any) -> None:
        if self._over:
            raise asyncio.InvalidStateError("the call is over")
        await asyncio.sleep(0)
        if hasattr(self, "_up"):
            self._up.push(type(message).FromString(message.SerializeToString()))

    def __aiter__(self) -> _Stream:
        return self

    async def __anext__(self) -> Any:
        item = await self._down.inbox.get()
        if item is _END:
            self._end()
            raise StopAsyncIteration
        if isinstance(item, Exception):
            self._end()
            raise item
        return item

    def cancel(self) -> None:
        if not self._over and hasattr(self, "_up"):
            self._up.push(asyncio.CancelledError())
        self._end()

    def _end(self) -> None:
        self._over = True
        if self._own_end in self._own.on_end:
            self._own.on_end.remove(self._own_end)

    # ---------------------------------------------------------------- the service's end

    def _accept(self) -> None:
        self._serving = self._net.loop.create_task(self._serve())

    async def _serve(self) -> None:
        answering = asyncio.create_task(self._answer())
        # What came from the node is handed on until it hangs up: then the handler is cancelled.
        self._requests: asyncio.Queue[Any] = asyncio.Queue()
        reading = asyncio.create_task(self._read())
        await asyncio.wait({answering, reading}, return_when=asyncio.FIRST_COMPLETED)
        for task in (answering, reading):
            task.cancel()
        await asyncio.gather(answering, reading, return_exceptions=True)
        if self._their_end in self._there.on_end:
            self._there.on_end.remove(self._their_end)

    async def _read(self) -> None:
        while True:
            item = await self._up.inbox.get()
            if isinstance(item, BaseException):
                return
            self._requests.put_nowait(item)

    async def _answer(self) -> None:
        async def requests() -> AsyncIterator[Any]:
            while True:
                yield await self._requests.get()

        try:
            async for reply in self._service.Connect(requests(), _Context()):  # type: ignore[arg-type]
                self._down.push(type(reply).FromString(reply.SerializeToString()))
        except _Aborted as aborted:
            self._down.push(aborted.error)
        else:
            self._down.push(_END)

    # ---------------------------------------------------------------- ends that nobody wrote

    def _own_end(self) -> None:
        if not self._net.is_cut(self._own, self._there):
            self._up.breaks(ConnectionError("the node is gone"))

    def _their_end(self) -> None:
        if not self._net.is_cut(self._own, self._there):
            self._down.breaks(_rpc_error(grpc.StatusCode.UNAVAILABLE, "connection reset"))

    def _watch(self, process: Process, pipe: _Pipe) -> None:
        """Keepalive: gives up on a peer that is dead or cut off."""
        silent_s = 0.0

        def look() -> None:
            nonlocal silent_s
            if self._over or (self._serving is not None and self._serving.done()):
                return
            heard = (
                self._own.alive and self._there.alive
                and not self._net.is_cut(self._own, self._there)
            )  # fmt: skip
            silent_s = 0.0 if heard else silent_s + _KEEPALIVE_S / 3
            if silent_s >= _KEEPALIVE_S:
                pipe.breaks(_rpc_error(grpc.StatusCode.UNAVAILABLE, "keepalive"))
                return
            self._net.later(process, _KEEPALIVE_S / 3, look)

        self._net.later(process, _KEEPALIVE_S / 3, look)


class Channel:
    """Stands for ``grpc.aio.Channel`` where ``Control`` makes one."""

    def __init__(self, net: Net, find: Find) -> None:
        self._net = net
        self._find = find

    async def __aenter__(self) -> Channel:
        return self

    async def __aexit__(self, *exc: object) -> None:
        return None

    def stream_stream(self, *names: Any, **options: Any) -> Callable[[], _Stream]:
        return lambda: _Stream(self._net, self._find)
