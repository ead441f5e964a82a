"""Errors over gRPC: an exception of :mod:`vswap.wire.errors` arrives as the same exception.

The class, message and fields travel in the trailing metadata key ``vswap-error-bin``; the status
code is for clients that know only gRPC.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import grpc

from vswap.v1 import common_pb2
from vswap.wire import errors

METADATA_KEY = "vswap-error-bin"

MAX_BATCH_BYTES = 8 * 2**20
"""Most page bytes in one batch of the Pages service; more is refused with BatchTooLarge."""

MAX_FREE_SLOTS = 16384
"""Most slots in one free, which a node carries out in one turn of its loop (10 ms)."""

MAX_MESSAGE_BYTES = 4 * MAX_BATCH_BYTES
"""gRPC's own limit lies higher, so that a batch somewhat too large gets our error, not gRPC's."""

CHANNEL_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]

SERVER_OPTIONS: list[tuple[str, int]] = [
    *CHANNEL_OPTIONS,
    ("grpc.so_reuseport", 0),
    # Else a connection's window grows to megabytes for each call, read or not.
    ("grpc.http2.bdp_probe", 0),
    # Further calls of a connection wait in the client.
    ("grpc.max_concurrent_streams", 64),
]

MAX_CALLS = 1024
"""Calls that a server has under way or waiting, a window of 64 KiB each; further ones are refused,
and repeated by the client after a pause."""

_KINDS: dict[str, type[errors.VswapError]] = {kind.__name__: kind for kind in errors.GRPC_STATUS}


def to_status(
    error: errors.VswapError,
) -> tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]]:
    """The arguments of ``context.abort``: code, details, trailing metadata."""
    detail = common_pb2.ErrorDetail(
        kind=type(error).__name__, message=error.message, fields_json=error.fields_json
    )
    code = errors.GRPC_STATUS[type(error)]
    return code, error.message, ((METADATA_KEY, detail.SerializeToString()),)


def from_rpc_error(error: grpc.RpcError, address: str) -> errors.VswapError:
    """The vswap error that a failed call stands for.

    A call that failed without our detail never reached the service's code or lost its reply:
    UNAVAILABLE and DEADLINE_EXCEEDED mean that the outcome is unknown unless the connection was
    never made.
    """
    code = error.code() if hasattr(error, "code") else grpc.StatusCode.UNKNOWN
    details = (error.details() if hasattr(error, "details") else None) or str(code)
    for key, value in _trailing(error):
        if key == METADATA_KEY and isinstance(value, bytes):
            detail = common_pb2.ErrorDetail.FromString(value)
            kind = _KINDS.get(detail.kind, errors.InternalError)
            return kind(detail.message, **json.loads(detail.fields_json or "{}"))
    if code == grpc.StatusCode.UNAVAILABLE:
        if "failed to connect" in details.lower() or "connection refused" in details.lower():
            return errors.Unreachable(f"cannot reach {address}: {details}", address=address)
        return errors.OutcomeUnknown(f"connection to {address} broke: {details}", address=address)
    if code in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
        return errors.OutcomeUnknown(f"no reply from {address} in time", address=address)
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" not in details:
        return errors.Unreachable(f"{address} is overloaded: {details}", address=address)
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return errors.BatchTooLarge(f"message over the limit: {details}", limit=MAX_BATCH_BYTES)
    if code == grpc.StatusCode.UNIMPLEMENTED:
        return errors.InvalidRequest(f"{address} does not know this call: {details}")
    return errors.InternalError(f"{address} answered {code.name}: {details}", address=address)


def _trailing(error: grpc.RpcError) -> Iterable[tuple[str, Any]]:
    metadata: Any = error.trailing_metadata() if hasattr(error, "trailing_metadata") else None
    return [] if metadata is None else list(metadata)
