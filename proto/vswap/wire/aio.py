"""The server side of grpc.aio: errors of :mod:`vswap.wire.errors` leave a service as statuses.

    class PagesService(node_pb2_grpc.PagesServicer):
        @served
        async def Load(self, request, context): ...

Whatever else a method raises is a defect: it is logged with its traceback and leaves as one clear
line, an InternalError. The stream or channel stays up.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import grpc
import structlog

from vswap.wire.errors import InternalError, VswapError
from vswap.wire.rpc import to_status

_log = structlog.get_logger("vswap.rpc")

Self = TypeVar("Self")
Request = TypeVar("Request")
Reply = TypeVar("Reply")
Context = grpc.aio.ServicerContext[Any, Any]


def served(
    method: Callable[[Self, Request, Context], Awaitable[Reply]],
) -> Callable[[Self, Request, Context], Awaitable[Reply]]:
    """Wraps a method with one reply (unary or stream request)."""

    @functools.wraps(method)
    async def call(self: Self, request: Request, context: Context) -> Reply:
        try:
            return await method(self, request, context)
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception as error:
            await abort(context, error, method.__qualname__)

    return call


def served_stream(
    method: Callable[[Self, Request, Context], AsyncGenerator[Reply, None]],
) -> Callable[[Self, Request, Context], AsyncIterator[Reply]]:
    """Wraps a method that is an async generator of replies."""

    @functools.wraps(method)
    async def call(self: Self, request: Request, context: Context) -> AsyncIterator[Reply]:
        try:
            # Closed at once when the call ends early, not when the garbage collector comes by.
            async with contextlib.aclosing(method(self, request, context)) as replies:
                async for reply in replies:
                    yield reply
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception as error:
            await abort(context, error, method.__qualname__)

    return call


async def abort(context: Context, error: Exception, where: str) -> NoReturn:
    """Ends the call with the status that stands for ``error``."""
    if not isinstance(error, VswapError):
        _log.error("a call failed unexpectedly", call=where, exc_info=error)
        error = InternalError(f"{where} failed: {type(error).__name__}: {error}", call=where)
    code, details, metadata = to_status(error)
    await context.abort(code, details, metadata)
