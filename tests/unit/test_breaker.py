"""The circuit breaker by itself, and around a backend."""

from __future__ import annotations

import asyncio
import random
from uuid import UUID

import pytest

from vswap.tiers.backend import Read, SegmentName
from vswap.tiers.breaker import FAILURES, Breaker
from vswap.tiers.factory import make_backend
from vswap.tiers.spec import TierSpec
from vswap.tiers.wrappers.faulty import FaultPlan, Faulty
from vswap.tiers.wrappers.guarded import Guarded
from vswap.wire.errors import PageLost, SegmentExists, TierUnavailable


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def breaker() -> tuple[Breaker, Clock]:
    clock = Clock()
    return Breaker(clock, random.Random(1)), clock


def fail(one: Breaker, times: int = FAILURES) -> None:
    for _ in range(times):
        call = one.begin()
        assert call is not None
        one.failed(call)


def test_opens_after_failures_in_a_row_only() -> None:
    one, _ = breaker()
    for _ in range(5):
        fail(one, FAILURES - 1)
        call = one.begin()
        assert call is not None
        one.succeeded(call)
    assert not one.is_open
    fail(one)
    assert one.is_open
    assert one.begin() is None


def test_one_probe_at_a_time_tests_the_server_again() -> None:
    one, clock = breaker()
    fail(one)
    clock.now += one.retry_after_s
    probe = one.begin()
    assert probe is not None
    assert one.begin() is None
    one.succeeded(probe)
    assert not one.is_open
    assert one.begin() is not None


def test_pauses_grow_up_to_a_bound_and_are_jittered() -> None:
    one, clock = breaker()
    fail(one)
    pauses = [one.retry_after_s]
    for _ in range(10):
        clock.now += one.retry_after_s
        fail(one, 1)
        pauses.append(one.retry_after_s)
    assert 0.1 <= pauses[0] <= 0.2
    assert 5 <= pauses[-1] <= 10
    assert pauses[4] > pauses[0] * 4
    other = Breaker(clock, random.Random(2))
    fail(other)
    assert other.retry_after_s != pauses[0]


def test_calls_from_before_it_opened_are_old_news() -> None:
    one, clock = breaker()
    slow = [one.begin() for _ in range(20)]
    fail(one)
    pause = one.retry_after_s
    for call in slow:
        assert call is not None
        one.failed(call)
    assert one.retry_after_s == pause
    clock.now += pause
    assert one.begin() is not None
    assert slow[0] is not None
    one.succeeded(slow[0])
    assert one.is_open


def test_a_probe_that_is_cancelled_lets_another_one_try() -> None:
    one, clock = breaker()
    fail(one)
    clock.now += one.retry_after_s
    probe = one.begin()
    assert probe is not None
    one.dropped(probe)
    assert one.begin() is not None


# ---------------------------------------------------------------- around a backend

DATA = b"x" * 64


def name(serial: int) -> SegmentName:
    return SegmentName(UUID(int=1), UUID(int=2), serial)


def guarded() -> tuple[Guarded, Faulty, Clock]:
    clock = Clock()
    faulty = Faulty(
        make_backend(TierSpec(name="t", url="memory:///", capacity_bytes=1 << 20)), FaultPlan()
    )
    return Guarded(faulty, clock, random.Random(1)), faulty, clock


async def test_a_server_that_does_not_answer_is_left_alone() -> None:
    backend, faulty, clock = guarded()
    await backend.put(name(1), DATA)
    read = Read(name(1), 0, 64)
    faulty.plan = FaultPlan(error=1)
    for _ in range(FAILURES):
        await backend.get([read])
    asked = faulty.injected["error"]
    for _ in range(10):
        [answer] = await backend.get([read])
        assert isinstance(answer, TierUnavailable)
        assert answer.fields["retry_after_s"] > 0
        assert "injected error" in answer.message
    assert faulty.injected["error"] == asked
    assert backend.held_back == 10
    faulty.plan = FaultPlan()
    clock.now += backend.reach.retry_after_s
    assert await backend.get([read, read]) == [DATA, DATA]
    assert not backend.reach.is_open


async def test_a_server_that_refuses_writes_is_still_read_and_cleaned() -> None:
    backend, faulty, _ = guarded()
    await backend.put(name(1), DATA)
    faulty.plan = FaultPlan(error=1)
    for serial in range(2, 2 + FAILURES):
        with pytest.raises(TierUnavailable):
            await backend.put(name(serial), DATA)
    faulty.plan = FaultPlan()
    with pytest.raises(TierUnavailable, match="left alone"):
        await backend.put(name(9), DATA)
    assert await backend.get([Read(name(1), 0, 64)]) == [DATA]
    await backend.delete([name(1)])


async def test_an_answer_is_no_outage() -> None:
    backend, _, _ = guarded()
    await backend.put(name(1), DATA)
    for _ in range(2 * FAILURES):
        with pytest.raises(SegmentExists):
            await backend.put(name(1), b"other")
        [answer] = await backend.get([Read(name(7), 0, 64)])
        assert isinstance(answer, PageLost)
    assert not backend.reach.is_open
    assert not backend.write.is_open


async def test_a_cancelled_probe_does_not_lock_the_server_out() -> None:
    backend, faulty, clock = guarded()
    await backend.put(name(1), DATA)
    faulty.plan = FaultPlan(error=1)
    for _ in range(FAILURES):
        await backend.get([Read(name(1), 0, 64)])
    clock.now += backend.reach.retry_after_s
    faulty.plan = FaultPlan(delay=1, delay_ms=60_000)
    probe = asyncio.create_task(backend.get([Read(name(1), 0, 64)]))
    await asyncio.sleep(0)
    probe.cancel()
    await asyncio.gather(probe, return_exceptions=True)
    faulty.plan = FaultPlan()
    assert await backend.get([Read(name(1), 0, 64)]) == [DATA]
