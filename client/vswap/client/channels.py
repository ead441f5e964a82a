"""How the SDK connects: addresses, channel options, one definition for sync and asyncio."""

from __future__ import annotations

from typing import Any

from vswap.v1 import node_pb2_grpc
from vswap.wire import rpc
from vswap.wire.errors import InvalidRequest

OPTIONS: list[tuple[str, Any]] = [
    *rpc.CHANNEL_OPTIONS,
    # A proxy in the environment is for the web, not for a neighbour on loopback.
    ("grpc.enable_http_proxy", 0),
    # A restarted daemon is found again at once; gRPC's own default waits up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Also how long one attempt may take: a busy daemon needs more than a moment to say hello.
    ("grpc.min_reconnect_backoff_ms", 5000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Each client its own connection: clients in one process do not queue behind each other.
    ("grpc.use_local_subchannel_pool", 1),
]


def check_address(address: str) -> str:
    """The address if it reads as ``host:port`` or ``unix:/path``; InvalidRequest if not."""
    if address.startswith("unix:"):
        if address.removeprefix("unix:").startswith("/"):
            return address
    else:
        host, colon, port = address.rpartition(":")
        if colon and host and port.isdigit() and 0 < int(port) < 65536:
            return address
    raise InvalidRequest(f"bad address {address!r}: expected host:port or unix:/path")


def node_stubs(channel: Any) -> dict[str, Any]:
    """The stubs of a node's services by name, over a sync or an asyncio channel."""
    generated: Any = node_pb2_grpc
    return {name: getattr(generated, f"{name}Stub")(channel) for name in ("Pages", "NodeAdmin")}
