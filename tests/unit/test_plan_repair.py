"""The coordinator's part of redundancy: when it repairs, and which servers may be replaced."""

from __future__ import annotations

import pytest
from plans import MIB, Node, World, state_of

from vswap.coordinator import views
from vswap.coordinator.balance import Policy
from vswap.coordinator.events import Now, SetTier, StartJob
from vswap.coordinator.state import Job, JobState, MoveKind
from vswap.tiers.spec import TierSpec
from vswap.v1 import common_pb2
from vswap.wire.errors import AlreadyExists, BadConfig, InvalidRequest, Refused

URLS = ("redis://u:secret@a", "redis://u:secret@b")


def servers(*up: bool, only_here: tuple[int, ...] = (0, 0)) -> list[common_pb2.TierServer]:
    return [
        common_pb2.TierServer(url=f"redis://{name}", up=u, error="" if u else "gone", only_here=o)
        for name, u, o in zip("ab", up, only_here, strict=True)
    ]


def degraded(node: Node, tier: str, size: int, *, repairable: bool, segments: int = 5) -> None:
    node.redundant[tier] = {
        "degraded_segments": segments if size else 0,
        "degraded_bytes": size,
        "repairable_bytes": size if repairable else 0,
        "servers": servers(True, repairable or not size),
    }
    node.report()


def world(**policy: bool) -> World:
    world = World(Policy(balance=False, compact=False, **policy))
    world.add_tier("m", urls=URLS, redundancy="mirror:2")
    return world


def jobs(world: World) -> list[Job]:
    return list(world.state.jobs.values())


def test_repair_begins_when_the_servers_are_back_and_not_before() -> None:
    w = world()
    node = w.node("n")
    node.fill("m", 8 * MIB)
    degraded(node, "m", 3 * MIB, repairable=False)
    w.tick(5)
    assert not jobs(w)
    degraded(node, "m", 3 * MIB, repairable=True)
    w.tick()
    [job] = jobs(w)
    assert (job.kind, job.automatic, job.bytes_total) == (MoveKind.REPAIR, True, 3 * MIB)
    assert job.rate_bytes_s == 64 * MIB
    node.settle()
    assert node.directives[job.id].kind == 40
    w.tick()
    assert len(jobs(w)) == 1
    node.progress[job.id].bytes_moved = 3 * MIB
    node.progress[job.id].state = "done"
    degraded(node, "m", 0, repairable=False)
    assert state_of(job) is JobState.DONE


def test_it_may_be_switched_off_and_asked_for() -> None:
    w = world(repair=False)
    node = w.node("n")
    node.fill("m", 8 * MIB)
    degraded(node, "m", 3 * MIB, repairable=True)
    w.tick(5)
    assert not jobs(w)
    job = w.start(MoveKind.REPAIR, "m", rate_bytes_s=1000)
    assert node.directives[job.id].rate_bytes_s == 1000


def test_a_repair_goes_beside_other_jobs_and_not_beside_a_drain() -> None:
    w = world()
    w.add_tier("other", rank=20)
    node = w.node("n")
    node.fill("m", 8 * MIB)
    w.start(MoveKind.MIGRATE, "m", destination="other")
    degraded(node, "m", 3 * MIB, repairable=True)
    w.tick()
    assert [job.kind for job in jobs(w)] == [MoveKind.MIGRATE, MoveKind.REPAIR]
    node.settle()
    node.redundant.clear()
    for job in jobs(w):
        node.progress[job.id].state = "done"
    node.report()
    degraded(node, "m", 3 * MIB, repairable=True)
    w.start(MoveKind.DRAIN, "m")
    w.tick(60)
    assert [job.kind for job in jobs(w)][2:] == [MoveKind.DRAIN]


def test_nothing_is_compacted_by_itself_while_a_server_is_down() -> None:
    w = World(Policy(balance=False, compact_min_garbage_bytes=MIB))
    w.add_tier("m", urls=URLS, redundancy="mirror:2")
    node = w.node("n")
    node.fill("m", 2 * MIB, 16 * MIB)
    node.redundant["m"] = {"servers": servers(True, False)}
    node.report()
    w.tick(5)
    assert not jobs(w)
    node.redundant["m"] = {"servers": servers(True, True)}
    node.report()
    w.tick(5)
    assert [job.kind for job in jobs(w)] == [MoveKind.COMPACT]


def test_what_cannot_be_repaired_is_refused_with_the_reason() -> None:
    w = world()
    w.add_tier("plain")
    node = w.node("n")
    node.fill("m", 8 * MIB)
    with pytest.raises(InvalidRequest, match="no redundancy"):
        w.step(StartJob("x", MoveKind.REPAIR, "plain"))
    degraded(node, "m", 3 * MIB, repairable=False)
    with pytest.raises(Refused, match="5 degraded segments"):
        w.step(StartJob("x", MoveKind.REPAIR, "m"))
    degraded(node, "m", 0, repairable=False)
    assert state_of(w.start(MoveKind.REPAIR, "m")) is JobState.DONE


def test_operators_see_servers_as_the_nodes_do() -> None:
    w = world()
    one, two = w.node("one"), w.node("two")
    for node in (one, two):
        node.fill("m", MIB)
    one.redundant["m"] = {"degraded_segments": 2, "servers": servers(True, False)}
    two.redundant["m"] = {"degraded_segments": 1, "servers": servers(True, True)}
    one.report()
    two.report()
    [info] = views.cluster(w.state, Now(w.now_s, 0)).tiers
    assert info.usage.degraded_segments == 3
    assert [server.up for server in info.usage.servers] == [True, False]
    assert info.usage.servers[1].error == "one: gone"
    assert "secret" not in str(info)


def test_a_server_is_replaced_where_nothing_is_on_it_alone() -> None:
    w = world()
    node = w.node("n")
    node.fill("m", 8 * MIB)
    before = w.state.generation
    node.redundant["m"] = {"servers": servers(False, True)}
    node.report()
    with pytest.raises(Refused, match=r"as many other servers .* \(n says\)"):
        w.step(SetTier("m", replace=("redis://b", "redis://c")))
    node.redundant["m"] = {"servers": servers(True, True, only_here=(0, 4))}
    node.report()
    with pytest.raises(Refused, match="only good part of segments of tier m \\(4 of n\\)"):
        w.step(SetTier("m", replace=("redis://b", "redis://c")))
    # Without its credentials, which are not for command lines.
    w.step(SetTier("m", replace=("redis://a", "redis://c")))
    assert w.state.tiers["m"].spec.urls == ("redis://c", URLS[1])
    assert w.state.generation == before + 1
    w.restart()
    assert w.state.tiers["m"].spec.urls == ("redis://c", URLS[1])
    with pytest.raises(Refused, match=r"n may have pages .* and is absent"):
        w.step(SetTier("m", replace=("redis://b", "redis://d")))
    node.connect()
    w.step(SetTier("m", replace=("redis://b", "redis://d"), force=True))
    assert w.state.tiers["m"].spec.urls == ("redis://c", "redis://d")


@pytest.mark.parametrize(
    ("replace", "error", "word"),
    [
        (("redis://x", "redis://c"), BadConfig, "not spread over redis://x"),
        (("redis://a", "redis://b"), AlreadyExists, "already lies at"),
        (("redis://a", "redis://plain"), AlreadyExists, "plain already lies"),
        (("redis://a", "ftp://c"), BadConfig, "unknown scheme"),
    ],
)
def test_nonsense_is_no_replacement(
    replace: tuple[str, str], error: type[Exception], word: str
) -> None:
    w = world()
    w.add_tier("plain")
    with pytest.raises(error, match=word):
        w.step(SetTier("m", replace=replace))
    with pytest.raises(BadConfig):
        w.step(SetTier("plain", replace=("redis://plain", "redis://c")))


def test_two_tiers_share_no_server_and_a_tier_names_none_twice() -> None:
    w = world()
    with pytest.raises(AlreadyExists, match="m already lies at"):
        w.add_tier("n", urls=("redis://z", "redis://b"), redundancy="mirror:2")
    with pytest.raises(BadConfig, match="twice"):
        w.add_tier("n", urls=("redis://z", "redis://me@z/"), redundancy="mirror:2")


def test_room_counts_segments_of_all_stripes() -> None:
    urls = tuple(f"redis://{i}" for i in range(6))
    coded = TierSpec(name="c", urls=urls, redundancy="rs:4+2", capacity_bytes=MIB)
    w = World()
    w.add_tier("c", urls=urls, redundancy="rs:4+2")
    node = w.node("n")
    node.fill("c", 8 * MIB)
    w.add_tier("d", rank=20)
    assert coded.shape == (4, 2)
    job = w.start(MoveKind.MIGRATE, "c", destination="d")
    assert job.bytes_total == 8 * MIB
