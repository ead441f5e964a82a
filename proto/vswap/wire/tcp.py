"""Options of TCP connections."""

from __future__ import annotations

import socket

_IDLE_S, _INTERVAL_S, _PROBES = 10, 5, 4


def notice_loss(connection: socket.socket) -> None:
    """A machine at the other end that vanished without a word counts as gone after half a minute.

    Where bytes of ours are under way to it, the kernel's own patience decides.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _INTERVAL_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
