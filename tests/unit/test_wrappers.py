"""What the wrappers add; that they keep the contract is for tests/contract to say."""

from __future__ import annotations

import asyncio
from uuid import UUID

import pytest

from vswap.tiers.backend import Backend, Read, SegmentName, prefix
from vswap.tiers.factory import make_backend
from vswap.tiers.spec import TierSpec
from vswap.tiers.unmade import Unmade
from vswap.tiers.wrappers.faulty import FaultPlan, Faulty
from vswap.tiers.wrappers.metered import Metered
from vswap.wire.errors import (
    BadConfig,
    OutcomeUnknown,
    PageLost,
    SegmentExists,
    TierUnavailable,
    VswapError,
)

DATA = bytes(range(256)) * 4
CLUSTER, SHARD = UUID(int=1), UUID(int=2)


def name(serial: int) -> SegmentName:
    return SegmentName(CLUSTER, SHARD, serial)


def memory() -> Backend:
    return make_backend(TierSpec(name="t", url="memory:///", capacity_bytes=1 << 20))


async def stored(backend: Backend, serial: int) -> bytes | None:
    found = {item.key: item.bytes async for item in backend.list(prefix(CLUSTER))}
    if name(serial).key not in found:
        return None
    [data] = await backend.get([Read(name(serial), 0, found[name(serial).key])])
    assert not isinstance(data, VswapError)
    return bytes(data)


# ---------------------------------------------------------------- none at all


async def test_what_could_not_be_made_is_unavailable_and_says_why() -> None:
    unmade = Unmade("t", "no password")
    calls = [unmade.open(), unmade.put(name(1), DATA), unmade.delete([name(1)]), unmade.usage()]
    for call in [*calls, anext(aiter(unmade.list("vswap/")))]:
        with pytest.raises(TierUnavailable, match="no password"):
            await call
    [error] = await unmade.get([Read(name(1), 0, 1)])
    assert isinstance(error, TierUnavailable)
    await unmade.close()


# ---------------------------------------------------------------- faulty


async def test_calm_changes_nothing() -> None:
    faulty = Faulty(memory(), FaultPlan())
    await faulty.put(name(1), DATA)
    assert await stored(faulty, 1) == DATA
    assert not faulty.injected


async def test_an_error_means_that_nothing_happened() -> None:
    faulty = Faulty(memory(), FaultPlan(error=1))
    with pytest.raises(TierUnavailable):
        await faulty.put(name(1), DATA)
    assert await stored(faulty.inner, 1) is None
    await faulty.inner.put(name(1), DATA)
    with pytest.raises(TierUnavailable):
        await faulty.delete([name(1)])
    assert await stored(faulty.inner, 1) == DATA
    results = await faulty.get([Read(name(1), 0, 1)] * 3)
    assert [type(result) for result in results] == [TierUnavailable] * 3


async def test_a_lost_reply_means_that_it_happened() -> None:
    faulty = Faulty(memory(), FaultPlan(lost=1))
    with pytest.raises(OutcomeUnknown):
        await faulty.put(name(1), DATA)
    assert await stored(faulty.inner, 1) == DATA
    [result] = await faulty.get([Read(name(1), 0, 1)])
    assert isinstance(result, TierUnavailable)
    with pytest.raises(OutcomeUnknown):
        await faulty.delete([name(1)])
    assert await stored(faulty.inner, 1) is None


async def test_flips_exactly_one_bit_and_only_of_what_is_read() -> None:
    faulty = Faulty(memory(), FaultPlan(flip=1))
    await faulty.put(name(1), DATA)
    [data] = await faulty.get([Read(name(1), 0, len(DATA))])
    assert not isinstance(data, VswapError)
    wrong = [a ^ b for a, b in zip(bytes(data), DATA, strict=True) if a != b]
    assert len(wrong) == 1
    assert wrong[0].bit_count() == 1
    assert await stored(faulty.inner, 1) == DATA


async def test_a_torn_write_is_acknowledged_and_short() -> None:
    faulty = Faulty(memory(), FaultPlan(torn=1))
    await faulty.put(name(1), DATA)
    kept = await stored(faulty.inner, 1)
    assert kept is not None
    assert 0 < len(kept) < len(DATA)
    assert DATA.startswith(kept)


async def test_a_short_read_is_a_lost_page() -> None:
    faulty = Faulty(memory(), FaultPlan(short=1))
    await faulty.put(name(1), DATA)
    [result] = await faulty.get([Read(name(1), 0, 8)])
    assert isinstance(result, PageLost)


async def test_sleeps_by_the_clock_it_was_given() -> None:
    slept: list[float] = []

    async def sleep(delay_s: float) -> None:
        slept.append(delay_s)

    faulty = Faulty(memory(), FaultPlan.parse("delay_ms=250"), sleep=sleep)
    await faulty.put(name(1), DATA)
    await faulty.get([Read(name(1), 0, 1)])
    assert slept == [0.25, 0.25]


async def test_a_seed_replays() -> None:
    async def outcomes(seed: int) -> list[str]:
        faulty = Faulty(memory(), FaultPlan(seed=seed, error=0.3, lost=0.3))
        found = await asyncio.gather(
            *(faulty.put(name(serial), DATA) for serial in range(60)), return_exceptions=True
        )
        return [type(one).__name__ for one in found]

    assert await outcomes(7) == await outcomes(7)
    assert await outcomes(7) != await outcomes(8)
    assert set(await outcomes(7)) == {"NoneType", "TierUnavailable", "OutcomeUnknown"}


def test_a_plan_is_read_from_text() -> None:
    plan = FaultPlan.parse("seed=7, error=0.01,lost=0.02,delay=0.1,delay_ms=5,flip=0.001,torn=1")
    assert plan == FaultPlan(
        seed=7, error=0.01, lost=0.02, delay=0.1, delay_ms=5, flip=0.001, torn=1
    )
    assert FaultPlan.parse("") == FaultPlan()


@pytest.mark.parametrize(
    ("text", "word"),
    [("error=2", "error"), ("error=x", "error"), ("eror=0.1", "eror"), ("error", "key=value")],
)
def test_a_wrong_plan_is_named(text: str, word: str) -> None:
    with pytest.raises(BadConfig, match=word):
        FaultPlan.parse(text)


# ---------------------------------------------------------------- metered


async def test_counts_calls_bytes_errors_and_time() -> None:
    ticks = iter(range(100))
    metered = Metered(memory(), clock=lambda: float(next(ticks)))
    await metered.put(name(1), DATA)
    with pytest.raises(SegmentExists):
        await metered.put(name(1), b"other")
    await metered.get([Read(name(1), 0, 100), Read(name(2), 0, 100), Read(name(1), 4, 10)])
    await metered.delete([name(1)])
    assert metered.meter.flat("x") == {
        "x_put_calls": 2, "x_put_errors": 1, "x_put_bytes": len(DATA), "x_put_us": 2_000_000,
        "x_get_calls": 1, "x_get_errors": 1, "x_get_bytes": 110, "x_get_us": 1_000_000,
        "x_delete_calls": 1, "x_delete_errors": 0, "x_delete_bytes": 0, "x_delete_us": 1_000_000,
    }  # fmt: skip
