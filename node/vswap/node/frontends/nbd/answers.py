"""Answers that say no more than how a request went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import structlog

from vswap.node.frontends.nbd.replies import Replies
from vswap.node.frontends.nbd.requests import Write
from vswap.tiers.backend import Buffer
from vswap.tiers.record import U64
from vswap.wire.errors import NBD_ERRNO, InternalError, VswapError

logger = structlog.get_logger("vswap.node.nbd")


class Answers:
    """Sends them for one connection, and counts."""

    def __init__(
        self, send: Callable[[Buffer], None], replies: Replies, counters: Counter[str]
    ) -> None:
        self._send = send
        self._replies = replies
        self._counters = counters

    def refuse(self, cookie: int, errno: int, why: str) -> None:
        self._counters["nbd_errors"] += 1
        self._send(self._replies.error(cookie, errno, why))

    def fail(self, cookie: int, error: VswapError) -> None:
        if isinstance(error, InternalError):
            logger.error("a request failed in an unforeseen way", exc_info=error)
        self.refuse(cookie, NBD_ERRNO[type(error)], error.message)

    def stored_all(self, cookies: U64) -> None:
        """Answers writes that are stored whole; ``cookies`` as they travel."""
        self._counters["nbd_write"] += len(cookies)
        self._send(self._replies.done_all(cookies))

    def stored(self, writes: list[Write]) -> None:
        """Counts pieces of writes as done; answers the writes that have no more to come."""
        parts: list[bytes] = []
        for write in writes:
            write.pending -= 1
            if write.pending or write.left:
                continue
            self._counters["nbd_write"] += 1
            if write.error:
                self._counters["nbd_errors"] += 1
                parts.append(self._replies.error(write.cookie, write.error, write.why))
            else:
                parts.append(self._replies.done(write.cookie))
        if parts:
            self._send(b"".join(parts))
