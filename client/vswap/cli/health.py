"""`vswap health`: does a daemon answer? For container health checks and supervisors.

``python -m vswap.cli.health ADDRESS`` is the same with a seventh of the start-up time, since it
loads nothing else of the command: a health check runs every few seconds, for ever.
"""

from __future__ import annotations

import sys
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from vswap.wire.errors import Unreachable, VswapError
from vswap.wire.rpc import from_rpc_error

_DEADLINE_S = 5.0


def health(address: str) -> None:
    """Ask the coordinator or node at ADDRESS (host:port or unix:/path) whether it serves.

    Exit code 0 if it does, 4 if not.
    """
    # A proxy in the environment is for the web, not for a neighbour.
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=_DEADLINE_S)
        except grpc.RpcError as error:
            raise from_rpc_error(error, address) from error
    if reply.status != health_pb2.HealthCheckResponse.SERVING:
        raise Unreachable(f"{address} does not serve", address=address)


def main() -> None:
    if len(sys.argv) != 2:
        print("vswap: usage: python -m vswap.cli.health ADDRESS", file=sys.stderr)
        sys.exit(2)
    try:
        health(sys.argv[1])
    except VswapError as error:
        print(f"vswap: {error}", file=sys.stderr)
        sys.exit(4)


if __name__ == "__main__":
    main()
