"""A node's stream, as the coordinator writes to it."""

from __future__ import annotations

import pytest

from vswap.coordinator import runner
from vswap.coordinator.runner import Link
from vswap.v1 import coordinator_pb2
from vswap.wire.errors import Unreachable


async def test_messages_arrive_in_order_and_then_the_end() -> None:
    link = Link("stream", "shard")
    messages = [coordinator_pb2.CoordinatorMessage() for _ in range(3)]
    for message in messages:
        link.put(message)
    link.close(None)
    assert [await link.get() for _ in range(4)] == [*messages, None]


async def test_who_takes_nothing_is_cut_off() -> None:
    link = Link("stream", "shard")
    for _ in range(3 * runner._MOST_QUEUED):
        link.put(coordinator_pb2.CoordinatorMessage())
    assert link._queue.qsize() <= runner._MOST_QUEUED
    with pytest.raises(Unreachable, match="not taken"):
        await link.get()
