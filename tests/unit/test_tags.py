"""Request tags, and the bound on what is in flight."""

from __future__ import annotations

import asyncio

import pytest

from vswap.node import tags
from vswap.node.frontends.grpc_pages import Room
from vswap.node.tags import Tags
from vswap.v1.node_pb2 import RequestTag
from vswap.wire.errors import StaleIncarnation


def tag(session: int, number: int, oldest_open: int) -> RequestTag:
    return RequestTag(session=session, number=number, oldest_open=oldest_open)


def test_what_was_given_up_is_refused() -> None:
    seen = Tags()
    seen.admit(tag(1, 1, 1))
    seen.admit(tag(1, 4, 3))
    with pytest.raises(StaleIncarnation):
        seen.admit(tag(1, 2, 1))
    seen.admit(tag(1, 3, 1))
    # The floor never falls.
    with pytest.raises(StaleIncarnation):
        seen.admit(tag(1, 2, 2))


def test_sessions_are_apart_and_untagged_requests_pass() -> None:
    seen = Tags()
    seen.admit(tag(1, 9, 9))
    seen.admit(tag(2, 1, 1))
    seen.admit(RequestTag())
    seen.admit(RequestTag(number=1, oldest_open=5))


def test_a_refused_request_fences_too() -> None:
    seen = Tags()
    with pytest.raises(StaleIncarnation):
        seen.admit(tag(1, 5, 8))
    with pytest.raises(StaleIncarnation):
        seen.admit(tag(1, 7, 1))


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tags, "_MAX_SESSIONS", 3)
    seen = Tags()
    for session in (1, 2, 3):
        seen.admit(tag(session, 5, 5))
    seen.admit(tag(1, 6, 6))
    seen.admit(tag(4, 5, 5))
    # 2 was the one not heard of for longest.
    seen.admit(tag(2, 1, 1))
    for session in (1, 4):
        with pytest.raises(StaleIncarnation):
            seen.admit(tag(session, 1, 1))


async def hold(room: Room, amount: int, gate: asyncio.Event, done: list[int]) -> None:
    async with room.take(amount):
        done.append(amount)
        await gate.wait()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_calls_wait_for_room_in_their_order() -> None:
    room, gate, done = Room(10), asyncio.Event(), list[int]()
    tasks = [asyncio.create_task(hold(room, amount, gate, done)) for amount in (6, 5, 4)]
    await settle()
    # 4 would fit, but 5 came first: large batches do not starve.
    assert done == [6]
    gate.set()
    await asyncio.gather(*tasks)
    assert done == [6, 5, 4]
    async with asyncio.timeout(1), room.take(10):
        pass


async def test_a_call_that_is_given_up_takes_no_room() -> None:
    room, gate, done = Room(10), asyncio.Event(), list[int]()
    tasks = [asyncio.create_task(hold(room, amount, gate, done)) for amount in (10, 7, 3, 9)]
    await settle()
    tasks[1].cancel()
    tasks[0].cancel()
    await asyncio.gather(tasks[0], tasks[1], return_exceptions=True)
    await settle()
    assert done == [10, 3]
    gate.set()
    await asyncio.gather(*tasks[2:])
    async with asyncio.timeout(1), room.take(10):
        pass


async def test_room_that_is_not_needed_is_for_others() -> None:
    room, gate, done = Room(10), asyncio.Event(), list[int]()
    async with room.take(10) as held:
        task = asyncio.create_task(hold(room, 7, gate, done))
        await settle()
        assert not done
        held.shrink(3)
        await settle()
        assert done == [7]
    gate.set()
    await task
    async with asyncio.timeout(1), room.take(10):
        pass
