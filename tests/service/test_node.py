"""A node as a process: what a client and an operator meet."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from processes import Daemon
from shards import pages, slots

from vswap.cli.embedded import EmbeddedRedis, free_port
from vswap.client import Client
from vswap.v1 import node_pb2, node_pb2_grpc
from vswap.wire import rpc
from vswap.wire.errors import (
    AlreadyExists,
    BatchTooLarge,
    DuplicateSlots,
    InvalidRequest,
    OutOfTiers,
    PageSizeMismatch,
    Refused,
    SlotNotFound,
    SlotOutOfRange,
    SpaceFull,
    StaleIncarnation,
    UnknownSpace,
    UnknownTier,
    VswapError,
)

CONFIG = """
[[tiers]]
name = "ram"
url = "ram://"
codec = "none"
capacity_bytes = 4194304
rank = 0

[[tiers]]
name = "disk"
url = "file://{root}/disk"
capacity_bytes = 268435456
rank = 1

[[spaces]]
name = "s"
max_slots = 1000000
"""


def node(root: Path, config: str = CONFIG, *flags: str, **more: object) -> Daemon:
    file = root / "node.toml"
    file.write_text(config.replace("{root}", str(root)))
    return Daemon("node", root / "state", "--name", "n", "--config", str(file), *flags)


def test_serves_pages_and_leaves_cleanly(tmp_path: Path) -> None:
    where = np.arange(4000, dtype=np.uint64)
    with node(tmp_path) as daemon, Client(daemon.address) as client:
        space = client.space("s")
        for start in range(0, 4000, 500):
            part = where[start : start + 500]
            space.store(part, pages(part, 1))
        assert (np.concatenate([space.load(where[:2000]), space.load(where[2000:])])
                == pages(where, 1)).all()  # fmt: skip
        assert daemon.stop() == 0
        assert "Traceback" not in daemon.output


def test_sigterm_finishes_what_is_under_way(tmp_path: Path) -> None:
    with node(tmp_path) as daemon:
        acknowledged: list[int] = []

        def work() -> None:
            with Client(daemon.address, retry_s=0) as client:
                space = client.space("s")
                for i in range(10_000):
                    part = np.arange(i * 16, i * 16 + 16, dtype=np.uint64)
                    try:
                        space.store(part, pages(part, 1))
                    except VswapError:
                        return
                    acknowledged.append(i)

        thread = threading.Thread(target=work)
        thread.start()
        while len(acknowledged) < 20:
            pass
        assert daemon.stop() == 0
        thread.join()
        daemon.start()
        with Client(daemon.address) as client:
            space = client.space("s")
            for i in acknowledged:
                part = np.arange(i * 16, i * 16 + 16, dtype=np.uint64)
                assert (space.load(part) == pages(part, 1)).all()


def test_a_killed_node_comes_back_with_every_acknowledged_page(tmp_path: Path) -> None:
    where = np.arange(3000, dtype=np.uint64)
    with node(tmp_path) as daemon:
        with Client(daemon.address) as client:
            for start in range(0, 3000, 500):
                part = where[start : start + 500]
                client.space("s").store(part, pages(part, 1))
            client.space("s").free(where[:100])
        daemon.kill()
        daemon.start()
        with Client(daemon.address) as client:
            space = client.space("s")
            assert (space.load(where[100:2000]) == pages(where[100:2000], 1)).all()
            assert (space.load(where[2000:]) == pages(where[2000:], 1)).all()
            with pytest.raises(SlotNotFound):
                space.load([5])
            assert client.status().incarnation == 2


def test_fresh_starts_empty(tmp_path: Path) -> None:
    with node(tmp_path) as daemon:
        with Client(daemon.address) as client:
            client.space("s").store(slots(1), pages(slots(1), 1))
        daemon.kill()
    with (
        node(tmp_path, CONFIG, "--fresh") as daemon,
        Client(daemon.address) as client,
        pytest.raises(SlotNotFound),
    ):
        client.space("s").load([1])


def test_a_second_node_on_the_same_directory_is_refused(tmp_path: Path) -> None:
    with node(tmp_path) as daemon:
        second = node(tmp_path).launch()
        assert second.wait() == 3
        assert daemon.process is not None
        assert f"pid {daemon.process.pid}" in second.output
        with Client(daemon.address) as client:
            client.space("s").store(slots(1), pages(slots(1), 1))


@pytest.mark.parametrize(
    ("config", "flags", "code", "says"),
    [
        ("nmae = 'x'", [], 2, "node.toml: nmae: unknown key"),
        ("threads = 'many'", [], 2, "node.toml: threads: "),
        ("[[tiers]]\nname='r'\nurl='ram://'\ncapacity_bytes=1\ncodec='zip'", [], 2,
         "node.toml: tiers[0].codec"),
        ("[[tiers]]\nname='r'\nurl='ram://'\ncapacity_bytes=1", [], 3, "at least"),
        ("[[tiers]]\nname='r'\nurl='ram://'", [], 2, "capacity_bytes"),
        ("this is not toml", [], 2, "not valid TOML"),
        ("", ["--listen", "0.0.0.0:7999"], 2, "--insecure"),
        ("", ["--listen", "nonsense"], 2, "listen"),
        ("[[tiers]]\nname='r'\nurl='ftp://x'", [], 2, "unknown scheme"),
        ("[[tiers]]\nname='r'\nurl='ram://'\ncapacity_bytes=99999999\n"
         "[[tiers]]\nname='d'\nurl='file:///etc/passwd/x'\ncapacity_bytes=99999999", [], 3,
         "not writable"),
        (f"[[tiers]]\nname='r'\nurl='redis://127.0.0.1:{free_port()}'\ncapacity_bytes=99999999",
         [], 4, "refused"),
    ],
)  # fmt: skip
def test_a_bad_configuration_is_one_clear_line(
    tmp_path: Path, config: str, flags: list[str], code: int, says: str
) -> None:
    daemon = node(tmp_path, config, *flags).launch()
    assert daemon.wait() == code, daemon.output
    lines = [line for line in daemon.output.splitlines() if "[" not in line[:40]]
    assert says in daemon.output
    assert "Traceback" not in daemon.output
    assert len(lines) <= 2, daemon.output


def test_a_redis_that_evicts_is_refused(tmp_path: Path) -> None:
    with EmbeddedRedis(policy="allkeys-lru") as server:
        config = f"[[tiers]]\nname='r'\nurl='{server.url}'\ncapacity_bytes=99999999"
        daemon = node(tmp_path, config).launch()
        assert daemon.wait() == 3
        assert "noeviction" in daemon.output


def test_a_directory_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "package.json").write_text("{}")
    daemon = node(tmp_path, CONFIG, "--fresh").launch()
    assert daemon.wait() == 3
    assert "not vswap's" in daemon.output
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["package.json"]


def test_a_node_without_spaces_starts_again(tmp_path: Path) -> None:
    config = "[[tiers]]\nname='ram'\nurl='ram://'\ncapacity_bytes=4194304\n"
    with node(tmp_path, config) as daemon:
        assert daemon.stop() == 0
        with Client(daemon.start().address) as client:
            assert client.status().incarnation == 2


def test_pages_hold_their_tiers_in_the_configuration(tmp_path: Path) -> None:
    where = np.arange(500, dtype=np.uint64)
    with node(tmp_path) as daemon:
        with Client(daemon.address) as client:
            client.space("s").store(where, pages(where, 1))
        assert daemon.stop() == 0
    resized = node(tmp_path, CONFIG.replace("4194304", "67108864")).launch()
    assert resized.wait() == 3
    assert "set capacity_bytes back" in resized.output
    without = node(tmp_path, CONFIG.replace('"ram"', '"other"')).launch()
    assert without.wait() == 3
    assert "no longer configured" in without.output
    with node(tmp_path) as daemon, Client(daemon.address) as client:
        assert (client.space("s").load(where) == pages(where, 1)).all()


def test_an_absent_coordinator_delays_nothing_and_a_strange_one_stops_nothing(
    tmp_path: Path,
) -> None:
    coordinator = f"127.0.0.1:{free_port()}"
    first = Daemon("coordinator", tmp_path / "c1", "--listen", coordinator)
    with node(tmp_path, CONFIG, "--coordinator", coordinator) as daemon:
        with Client(daemon.address) as client:
            assert client.status().coordinator == "absent"
            client.space("s").store(slots(1), pages(slots(1), 1))
            with first:
                deadline = time.monotonic() + 20
                while client.status().coordinator != "connected":
                    assert time.monotonic() < deadline, daemon.output
                    time.sleep(0.05)
        assert daemon.stop() == 0
        assert daemon.output.count("coordinator away") <= 2
        # Of another cluster: this node is a member already, and its pages count for more.
        with Daemon("coordinator", tmp_path / "c2", "--listen", coordinator):
            with Client(daemon.start().address) as client:
                assert (client.space("s").load([1]) == pages(slots(1), 1)).all()
            assert "belongs to cluster" in daemon.output


def test_any_answer_fences_what_came_before(tmp_path: Path) -> None:
    """A late copy of an old request must not slip past because the newer one was refused."""
    with node(tmp_path) as daemon, Client(daemon.address) as client:
        space = client.space("s")
        space.store(slots(1), pages(slots(1), 2))
        stub = node_pb2_grpc.PagesStub(grpc.insecure_channel(daemon.address))

        def tag(number: int) -> node_pb2.RequestTag:
            return node_pb2.RequestTag(session=9, number=number, oldest_open=number)

        with pytest.raises(grpc.RpcError):
            stub.Free(node_pb2.FreeRequest(space="gone", tag=tag(2)))
        late = node_pb2.StoreRequest(
            space="s", slots=slots(1).tobytes(), pages=pages(slots(1), 1).tobytes(), tag=tag(1)
        )
        with pytest.raises(grpc.RpcError) as failed:
            stub.Store(late)
        assert type(rpc.from_rpc_error(failed.value, "x")) is StaleIncarnation
        assert (space.load([1]) == pages(slots(1), 2)).all()


def test_nonsense_requests_get_one_specific_error_and_change_nothing(tmp_path: Path) -> None:
    with node(tmp_path) as daemon, Client(daemon.address) as client:
        space = client.space("s")
        space.store(slots(1, 2), pages(slots(1, 2), 1))
        stub = node_pb2_grpc.PagesStub(
            grpc.insecure_channel(daemon.address, options=rpc.CHANNEL_OPTIONS)
        )

        def raw(kind: type[VswapError], **fields: Any) -> None:
            request = node_pb2.StoreRequest(**{"space": "s", **fields})
            with pytest.raises(grpc.RpcError) as failed:
                stub.Store(request)
            assert type(rpc.from_rpc_error(failed.value, "x")) is kind

        page = bytes(4096)
        raw(PageSizeMismatch, slots=slots(1).tobytes(), pages=page[:-1])
        raw(PageSizeMismatch, slots=slots(1).tobytes(), pages=page * 2)
        raw(PageSizeMismatch, slots=slots(1, 2).tobytes(), pages=page)
        raw(InvalidRequest, slots=b"1234567", pages=page)
        raw(SlotOutOfRange, slots=slots(1, 1_000_000).tobytes(), pages=page * 2)
        raw(SlotOutOfRange, slots=slots(1, 2**64 - 1).tobytes(), pages=page * 2)
        raw(UnknownSpace, space="nope", slots=slots(1).tobytes(), pages=page)
        raw(DuplicateSlots, slots=slots(1, 2, 1).tobytes(), pages=page * 3)
        many = np.arange(2049, dtype=np.uint64)
        raw(BatchTooLarge, slots=many.tobytes(), pages=page * 2049)
        huge = np.arange(9000, dtype=np.uint64)
        raw(BatchTooLarge, slots=huge.tobytes(), pages=page * 9000)
        with pytest.raises(grpc.RpcError) as failed:
            stub.Free(node_pb2.FreeRequest(space="s", slots=bytes(8 * (rpc.MAX_FREE_SLOTS + 1))))
        assert type(rpc.from_rpc_error(failed.value, "x")) is BatchTooLarge
        raw(StaleIncarnation, slots=slots(1).tobytes(), pages=page,
            tag=node_pb2.RequestTag(session=5, number=3, oldest_open=4))  # fmt: skip
        with pytest.raises(UnknownTier):
            client.create_space("x", tiers=["nope"])
        with pytest.raises(AlreadyExists):
            client.create_space("s")
        with pytest.raises(InvalidRequest):
            client.create_space("x", page_bytes=5000)
        with pytest.raises(UnknownSpace):
            client.delete_space("nope")
        assert (space.load([1, 2]) == pages(slots(1, 2), 1)).all()
        assert client.status().pages == 2


def test_a_full_quota_and_full_tiers_write_nothing_by_halves(tmp_path: Path) -> None:
    config = "[[tiers]]\nname='ram'\nurl='ram://'\ncodec='none'\ncapacity_bytes=4194304\n"
    with node(tmp_path, config) as daemon, Client(daemon.address, retry_s=0) as client:
        small = client.create_space("small", quota_bytes=100_000)
        few = np.arange(20, dtype=np.uint64)
        small.store(few, pages(few, 1))
        with pytest.raises(SpaceFull):
            small.store(few + 10, pages(few + 10, 2))
        assert (small.load(few) == pages(few, 1)).all()
        with pytest.raises(SlotNotFound):
            small.load([25])
        big = client.create_space("big")
        stored = 0
        with pytest.raises(OutOfTiers):
            while stored < 2000:
                part = np.arange(stored, stored + 100, dtype=np.uint64)
                big.store(part, pages(part, 1))
                stored += 100
        assert 0 < stored < 1000
        every = np.arange(stored, dtype=np.uint64)
        assert (big.load(every) == pages(every, 1)).all()
        with pytest.raises(SlotNotFound):
            big.load([stored])


def test_spaces_change_at_runtime(tmp_path: Path) -> None:
    with node(tmp_path) as daemon, Client(daemon.address) as client:
        space = client.create_space("big-pages", page_bytes=65536, max_slots=100)
        content = np.random.default_rng(0).integers(0, 256, (3, 65536), np.uint8)
        space.store(slots(1, 50, 99), content)
        assert (space.load(slots(99, 1)) == content[[2, 0]]).all()
        assert client.delete_space("big-pages") == 3
        with pytest.raises(UnknownSpace):
            client.space("big-pages")


def test_health_and_reflection_answer(tmp_path: Path) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
        ProtoReflectionDescriptorDatabase,
    )

    with node(tmp_path) as daemon:
        channel = grpc.insecure_channel(daemon.address)
        health: Any = health_pb2_grpc.HealthStub(channel)
        answer = health.Check(health_pb2.HealthCheckRequest(service="vswap.v1.Pages"))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        names = ProtoReflectionDescriptorDatabase(channel).get_services()
        assert {"vswap.v1.Pages", "vswap.v1.NodeAdmin"} <= set(names)


def test_listens_on_a_unix_socket(tmp_path: Path) -> None:
    socket = f"unix:{tmp_path}/n.sock"
    with node(tmp_path, CONFIG, "--listen", socket) as daemon:
        assert daemon.address == socket
        with Client(socket) as client:
            client.space("s").store(slots(1), pages(slots(1), 1))


def test_a_node_alone_can_leave_too(tmp_path: Path) -> None:
    with node(tmp_path) as daemon, Client(daemon.address, retry_s=0) as client:
        space = client.space("s")
        space.store(slots(*range(2000)), pages(slots(*range(2000)), 1))
        with pytest.raises(Refused, match="2000 pages"):
            client.leave()
        space.free(slots(*range(2000)))
        client.leave()
        assert daemon.wait() == 0
    assert not [path for path in (tmp_path / "disk").rglob("*") if path.is_file()]
    assert {path.name for path in daemon.state.iterdir()} == {"lock"}
