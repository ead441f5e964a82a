"""The two error tables are complete, and an error survives the wire with class and fields."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from vswap.wire import errors, rpc


def all_errors(kind: type[errors.VswapError] = errors.VswapError) -> list[type[errors.VswapError]]:
    return [k for sub in kind.__subclasses__() for k in [sub, *all_errors(sub)]]


@pytest.mark.parametrize("table", [errors.GRPC_STATUS, errors.NBD_ERRNO], ids=["grpc", "nbd"])
def test_table_is_complete(table: dict[type[errors.VswapError], object]) -> None:
    assert set(table) == set(all_errors())


class Failed(grpc.RpcError):
    def __init__(self, status: tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]]) -> None:
        self._status = status

    def code(self) -> grpc.StatusCode:
        return self._status[0]

    def details(self) -> str:
        return self._status[1]

    def trailing_metadata(self) -> Any:
        return self._status[2]


@pytest.mark.parametrize("kind", all_errors())
def test_error_survives_the_wire(kind: type[errors.VswapError]) -> None:
    sent = kind("it went wrong", space="s", slots=range(1000), need=5)
    got = rpc.from_rpc_error(Failed(rpc.to_status(sent)), "here")
    assert type(got) is kind
    assert got.message == sent.message
    assert got.fields["slots_count"] == 1000
    assert got.fields == sent.fields


def test_failure_without_detail_is_never_taken_for_nothing_happened() -> None:
    lost = rpc.from_rpc_error(Failed((grpc.StatusCode.UNAVAILABLE, "Socket closed", ())), "here")
    assert isinstance(lost, errors.OutcomeUnknown)
    refused = rpc.from_rpc_error(
        Failed((grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses", ())), "here"
    )
    assert isinstance(refused, errors.Unreachable)


async def test_a_server_that_is_too_busy_is_asked_again() -> None:
    """With gRPC's own words: what it refuses never began."""
    begun, over = asyncio.Event(), asyncio.Event()

    async def wait(request: bytes, context: Any) -> bytes:
        begun.set()
        await over.wait()
        return request

    server = grpc.aio.server(maximum_concurrent_rpcs=1)
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Wait": grpc.unary_unary_rpc_method_handler(wait)
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("x.Y", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call: Any = channel.unary_unary("/x.Y/Wait")
        first = asyncio.ensure_future(call(b"1"))
        await begun.wait()
        with pytest.raises(grpc.RpcError) as refused:
            await call(b"2")
        assert type(rpc.from_rpc_error(refused.value, "here")) is errors.Unreachable
        over.set()
        assert await first == b"1"
    await server.stop(None)
