"""The SDK over real gRPC, against a dict."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from client_support import MAX_SLOTS, PAGE_BYTES, DictNode, dict_node

from vswap.client import AsyncClient, Client
from vswap.client.attempts import Attempts, Policy
from vswap.v1 import node_pb2
from vswap.wire import errors, rpc


@pytest.fixture
def node() -> Iterator[DictNode]:
    with dict_node() as node:
        yield node


def pages_of(*values: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.repeat(np.array(values, np.uint8)[:, None], PAGE_BYTES, axis=1)


def test_round_trip_of_arrays_and_bytes(node: DictNode) -> None:
    with Client(node.address) as client:
        space = client.space()
        assert (space.page_bytes, space.max_slots, space.max_batch) == (PAGE_BYTES, MAX_SLOTS, 2048)
        pages = pages_of(1, 2, 3)
        space.store(np.array([7, 5, 6]), pages)
        assert (space.load([6, 7]) == pages[[2, 0]]).all()
        assert not space.load([6]).flags.writeable
        space.store([1, 2], pages[:2].tobytes())
        space.store(3, memoryview(pages[2]))
        assert space.load(3) == pages[2].tobytes()
        out = np.zeros((2, PAGE_BYTES), np.uint8)
        assert space.load([1, 2], out=out) is out
        assert (out == pages[:2]).all()
        assert space.locate([1, 9]) == ["ram", "free"]
        assert space.locate(9) == "free"
        assert space.free([1, 2, 99]) == 2
        assert space.free(3) == 1
        with pytest.raises(errors.SlotNotFound) as caught:
            space.load([5, 1])
        assert caught.value.fields["slots"] == [1]
        assert client.status().pages == 3
        assert [info.name for info in client.spaces()] == ["default"]


def test_exclusive_load_frees_on_confirm_only(node: DictNode) -> None:
    with Client(node.address) as client:
        space = client.space()
        space.store([1, 2], pages_of(1, 2))
        with pytest.raises(RuntimeError), space.load_exclusive([1, 2]):
            raise RuntimeError
        assert len(node.pages) == 2
        with space.load_exclusive([1, 2]) as loaded:
            assert (loaded.pages == pages_of(1, 2)).all()
        assert not node.pages
        with pytest.raises(errors.StaleIncarnation):
            loaded.confirm()


async def test_the_asyncio_twin(node: DictNode) -> None:
    async with AsyncClient(node.address) as client:
        space = await client.space("default")
        await space.store([1, 2], pages_of(1, 2))
        assert (await space.load([2]) == pages_of(2)).all()
        assert await space.load(1) == pages_of(1).tobytes()
        assert await space.locate(1) == "ram"
        async with await space.load_exclusive([2]) as loaded:
            assert (loaded.pages == pages_of(2)).all()
        assert await space.free([1, 2]) == 1
        with pytest.raises(errors.UnknownSpace, match="there: default"):
            await client.space("other")
    with pytest.raises(errors.InvalidRequest, match="closed"):
        await space.load(1)


def test_unix_socket(tmp_path: Path) -> None:
    with dict_node(f"unix:{tmp_path}/node.sock") as node, Client(node.address) as client:
        client.space().store(1, bytes(PAGE_BYTES))
        assert client.space().load(1) == bytes(PAGE_BYTES)


@pytest.mark.parametrize(
    ("slots", "pages", "error"),
    [
        ([1], b"short", errors.PageSizeMismatch),
        ([1, 2], bytes(PAGE_BYTES), errors.PageSizeMismatch),
        ([1], np.zeros((1, PAGE_BYTES), np.uint16), errors.PageSizeMismatch),
        ([1], np.zeros((PAGE_BYTES, 1), np.uint8), errors.PageSizeMismatch),
        ([1], 5, errors.PageSizeMismatch),
        ([-1], bytes(PAGE_BYTES), errors.SlotOutOfRange),
        ([1.5], bytes(PAGE_BYTES), errors.InvalidRequest),
        ([[1, 2]], bytes(2 * PAGE_BYTES), errors.InvalidRequest),
        (range(2049), bytes(2049 * PAGE_BYTES), errors.BatchTooLarge),
        ([MAX_SLOTS], bytes(PAGE_BYTES), errors.SlotOutOfRange),
    ],
)
def test_bad_input_is_refused(
    node: DictNode, slots: Any, pages: Any, error: type[errors.VswapError]
) -> None:
    with Client(node.address, retry_s=0) as client, pytest.raises(error) as caught:
        client.space().store(slots, pages)
    assert type(caught.value) is error
    assert not node.pages


def test_batch_too_large_tells_the_figures(node: DictNode) -> None:
    with Client(node.address) as client, pytest.raises(errors.BatchTooLarge) as caught:
        client.space().load(range(4096))
    assert caught.value.fields == {"limit": rpc.MAX_BATCH_BYTES, "got": 4096 * PAGE_BYTES}


@pytest.mark.parametrize("address", ["", "localhost", "host:0", "host:x", "unix:relative"])
def test_bad_address(address: str) -> None:
    with pytest.raises(errors.InvalidRequest):
        Client(address)


def test_nobody_there_is_unreachable() -> None:
    with Client("127.0.0.1:1", retry_s=0) as client, pytest.raises(errors.Unreachable):
        client.status()


def test_a_passing_failure_is_retried(node: DictNode) -> None:
    failures = [errors.TierUnavailable("down", tier="ram")] * 2

    def fail(request: Any) -> None:
        if isinstance(request, node_pb2.StoreRequest) and failures:
            raise failures.pop()

    node.before = fail
    with Client(node.address) as client:
        client.space().store(1, bytes(PAGE_BYTES))
    stores = [r for r in node.requests if isinstance(r, node_pb2.StoreRequest)]
    numbers = [store.tag.number for store in stores]
    assert len({store.tag.session for store in stores}) == 1
    assert numbers == [1, 2, 3]
    assert [store.tag.oldest_open for store in stores] == numbers


def test_without_retries_the_first_failure_is_final(node: DictNode) -> None:
    def fail(request: Any) -> None:
        raise errors.TierUnavailable("down", tier="ram")

    with Client(node.address, retry_s=0) as client:
        space = client.space()
        node.before = fail
        with pytest.raises(errors.TierUnavailable):
            space.store(1, bytes(PAGE_BYTES))
    assert len(node.requests) == 2


def late(node: DictNode, delay_s: float, wanted: type) -> None:
    """From now on requests of one kind are done, but their replies come after ``delay_s``."""

    def wait(request: Any) -> None:
        if isinstance(request, wanted):
            time.sleep(delay_s)

    node.after = wait


def test_no_late_copy_overwrites_after_a_giving_up(node: DictNode) -> None:
    with Client(node.address, deadline_s=0.2, retry_s=0) as client:
        space = client.space()
        late(node, 0.5, node_pb2.StoreRequest)
        with pytest.raises(errors.OutcomeUnknown):
            space.store(1, pages_of(1))
        given_up = node.requests[-1]
        late(node, 0, node_pb2.StoreRequest)
        time.sleep(0.4)
        space.store(1, pages_of(2))
        with pytest.raises(errors.StaleIncarnation):
            node.apply(given_up)
        assert space.load(1) == pages_of(2).tobytes()


def test_concurrent_calls_do_not_hold_back_a_fence(node: DictNode) -> None:
    """A call that is open all the while must not keep a late copy of another one alive."""
    release = threading.Event()

    def hold(request: Any) -> None:
        if isinstance(request, node_pb2.LocateRequest):
            node._lock.release()
            release.wait(5)
            node._lock.acquire()

    with Client(node.address, deadline_s=5, retry_s=0) as client:
        space = client.space()
        node.before = hold
        open_call = threading.Thread(target=space.locate, args=([1],))
        open_call.start()
        hasty = Client(node.address, deadline_s=0.2, retry_s=0)
        hasty._lanes, hasty_space = client._lanes, hasty.space()
        late(node, 0.4, node_pb2.StoreRequest)
        with pytest.raises(errors.OutcomeUnknown):
            hasty_space.store(1, pages_of(1))
        given_up = next(r for r in node.requests if isinstance(r, node_pb2.StoreRequest))
        late(node, 0, node_pb2.StoreRequest)
        space.store(1, pages_of(2))
        with pytest.raises(errors.StaleIncarnation):
            node.apply(given_up)
        release.set()
        open_call.join()
        hasty.close()


async def test_a_cancelled_call_is_fenced_too(node: DictNode) -> None:
    import asyncio

    async with AsyncClient(node.address) as client:
        space = await client.space()
        late(node, 0.3, node_pb2.StoreRequest)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(space.store(1, pages_of(1)), 0.1)
        given_up = node.requests[-1]
        late(node, 0, node_pb2.StoreRequest)
        await space.store(1, pages_of(2))
        with pytest.raises(errors.StaleIncarnation):
            node.apply(given_up)


def test_a_refusal_after_a_lost_reply_does_not_claim_that_nothing_happened() -> None:
    attempts = Attempts(Policy(retry_s=1), writes=True, now_s=0)
    assert attempts.pause_s(errors.OutcomeUnknown("no reply"), 0) > 0
    with pytest.raises(errors.OutcomeUnknown, match="then: full"):
        attempts.pause_s(errors.OutOfTiers("full"), 0.1)
    reads = Attempts(Policy(retry_s=1), writes=False, now_s=0)
    reads.pause_s(errors.OutcomeUnknown("no reply"), 0)
    with pytest.raises(errors.SlotNotFound):
        reads.pause_s(errors.SlotNotFound("gone"), 0.1)


def test_pauses_grow_and_end() -> None:
    attempts = Attempts(Policy(retry_s=10), writes=False, now_s=0)
    error = errors.Unreachable("nobody")
    pauses = [attempts.pause_s(error, 1.0) for _ in range(8)]
    assert 0.025 <= pauses[0] <= 0.05
    assert max(pauses) <= 2.0
    assert pauses[7] >= 1.0
    assert attempts.pause_s(error, 9.9) <= 0.1 + 1e-9
    with pytest.raises(errors.Unreachable):
        attempts.pause_s(error, 10.0)
