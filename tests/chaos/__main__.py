"""``make chaos``: rounds of load on a real cluster whose processes are killed.

In each round several clients store, load and free shared slots, over the SDK and as a block device,
a kernel swaps on the node where the machine can do that, a job may run, and at a random moment the
victim is killed with -9 and started again; a redundant tier is rebuilt under load. Then every slot
is read, and every history is held against what a single copy could have answered. A node is besides
killed at every point of :mod:`chaos.points`. In the end everything is freed, and nothing may be
left on any backend. Exits 1 if anything was lost, wrong, failed or left.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from chaos.cluster import SPACES, Cluster
from chaos.doomed import DoomedNode
from chaos.harm import suffer
from chaos.load import Slot, verify
from chaos.points import POINTS, Point
from swapping import Swapping, missing


def run(
    victim: str, redundancy: str, rounds: int, seed: int, root: Path, *, swap: bool = False
) -> bool:
    """Prints what it does; True = nothing was lost, wrong or failed. ``swap``: a kernel swaps on
    the node all the while."""
    rng = random.Random(seed)
    cluster = Cluster(root, redundancy, swap=swap)
    held: dict[Slot, int | None] = {}
    operations = failed = 0
    healthy: list[float] = []
    degraded: list[float] = []
    """Of loads that overlap with what was between the kill and the end of the rebuild."""
    rebuilt: list[tuple[int, float]] = []
    """Degraded bytes, and seconds from the servers' return until none were left."""
    # A node that is killed is a pause to its clients; nothing else may even be that.
    retry_s = 30.0 if victim == "node" else 0.0
    try:
        with _swapping(cluster, root) if swap else nullcontext() as swapping:
            for number in range(1, rounds + 1):
                load = cluster.load(rng, retry_s)
                time.sleep(rng.uniform(0.1, 0.4))
                job = cluster.disturb(rng)
                harmed = math.inf
                if victim == "node" and redundancy != "none" and rng.random() < 0.5:
                    harmed = time.monotonic()
                    cluster.lose_a_server(rng)
                time.sleep(rng.uniform(0.0, 0.5))
                harmed = min(harmed, time.monotonic())
                cluster.kill(victim, rng)
                if redundancy != "none":
                    rebuilt.append(cluster.rebuild())
                mended = time.monotonic()
                time.sleep(rng.uniform(0.1, 0.4))
                load.stop()
                with cluster.connect() as client:
                    held = verify(load, client, SPACES, held)
                cluster.settle()
                operations += load.operations
                failed += len(load.failed)
                for began, took in load.latencies:
                    overlaps = began < mended and began + took > harmed
                    (degraded if overlaps else healthy).append(took)
                print(f"round {number}: {load.operations} operations, {job}", flush=True)
                assert not load.wrong, load.wrong[:3]
                assert not load.failed, load.failed[:3]
                if swapping is not None:
                    swapping.check()
            if swapping is not None:
                print(f"a kernel swapped meanwhile: {swapping.finish()}")
        cluster.empty()
    except AssertionError as error:
        print(f"FAILED (--seed {seed}): {error}")
        return False
    finally:
        cluster.stop()
    print(f"{rounds} rounds of killing {victim} ({redundancy}): {operations} operations, 0 lost, "
          f"0 wrong, {failed} failed")  # fmt: skip
    print(f"loads while all was well: {_percentiles(healthy)}; during the outage or the rebuild: "
          f"{_percentiles(degraded)}")  # fmt: skip
    if cluster.restarts_s:
        print(f"restart: median {np.median(cluster.restarts_s):.2f} s")
    rebuilt = [(size, took) for size, took in rebuilt if size]
    if rebuilt:
        size, took = np.median(rebuilt, axis=0) / (1e6, 1)
        speed = np.median([size / took for size, took in rebuilt]) / 1e6
        print(f"rebuilt under load, audit and wait for the job included: median {size:.2f} MB of "
              f"degraded bytes in {took:.2f} s, {speed:.2f} MB/s")  # fmt: skip
    return True


def run_points(points: Sequence[Point], seed: int, root: Path, *, at_once: int = 1) -> bool:
    """Kills a node at each crash point; prints what it does; True = nothing was lost or wrong.

    ``at_once``: so many kills go by before everything is read.
    """
    shapes = {
        "none": [point for point in points if point.takes != "outage"],
        "mirror:2": [point for point in points if point.takes == "outage"],
    }
    good = True
    for redundancy, some in shapes.items():
        if some:
            below = root / redundancy.partition(":")[0]
            below.mkdir()
            good &= _run_points(redundancy, some, seed, below, at_once)
    return good


def _run_points(
    redundancy: str, points: Sequence[Point], seed: int, root: Path, at_once: int
) -> bool:
    rng = random.Random(seed)
    cluster = Cluster(root, redundancy, doomed=True)
    node = cluster.node
    assert isinstance(node, DoomedNode)
    held: dict[Slot, int | None] = {}
    names: list[str] = []
    try:
        for start in range(0, len(points), at_once):
            names.clear()
            load = cluster.load(rng, retry_s=30.0, each=1)
            try:
                for point in points[start : start + at_once]:
                    names.append(point.name)
                    _meet(cluster, node, point, rng, root)
            finally:
                load.stop()
            with cluster.connect() as client:
                held = verify(load, client, SPACES, held)
            assert not load.wrong, load.wrong[:3]
            assert not load.failed, load.failed[:3]
            cluster.settle()
        cluster.empty()
    except AssertionError as error:
        print(f"FAILED at {' '.join(names)} (--seed {seed}): {error}")
        return False
    finally:
        cluster.stop()
    print(f"killed at {len(points)} crash points ({redundancy}): 0 lost, 0 wrong")
    return True


def _meet(cluster: Cluster, node: DoomedNode, point: Point, rng: random.Random, root: Path) -> None:
    """Has the node come by the point, and starts it again."""

    def die() -> None:
        _die(cluster, node, point, rng)
        node.start()

    if point.takes == "outage":
        server = rng.choice(cluster.servers)
        server.kill()
        die()
        server.start()
        cluster.rebuild()
    elif point.takes:
        suffer(cluster, point.takes, root, die)
    else:
        die()


def _die(cluster: Cluster, node: DoomedNode, point: Point, rng: random.Random) -> None:
    # A restart has most to do after a kill in the middle of something.
    node.arm("block-open" if point.start else point.name, rng.randrange(8) if point.often else 0)
    until_s = time.monotonic() + 30
    assert node.process is not None
    while node.process.poll() is None:
        assert time.monotonic() < until_s, "the node does not come by there"
        if not point.takes:
            cluster.disturb(rng)
        with contextlib.suppress(subprocess.TimeoutExpired):
            node.process.wait(0.2)
    if point.start:
        node.launch(point.name)
        assert node.process.wait(30) == -signal.SIGKILL, node.output[-2000:]


def _swapping(cluster: Cluster, root: Path) -> Swapping:
    return Swapping(cluster.name, cluster.node.address, "k", root)


def _percentiles(seconds: Sequence[float]) -> str:
    if not seconds:
        return "none"
    p50, p99 = np.percentile(seconds, [50, 99]) * 1000
    return f"p50 {p50:.1f} ms, p99 {p99:.1f} ms"


def main() -> int:
    parser = argparse.ArgumentParser(prog="make chaos ROUNDS=N VICTIM=V SEED=S", usage=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--victim", choices=("node", "coordinator", "redis"), default="node")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--swap", choices=("auto", "yes", "no"), default="auto",
        help="whether a kernel swaps on the node all the while; auto: where this machine can",
    )  # fmt: skip
    args = parser.parse_args()
    # What is attached is detached also then.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    lacking = missing()
    if lacking and args.swap == "yes":
        parser.error(f"no kernel can swap here: it takes {', '.join(lacking)}")
    swap = args.swap != "no" and not lacking
    if not swap:
        why = f"it takes {', '.join(lacking)}" if lacking else "--swap no"
        print(f"*** no kernel swaps on the node in these rounds: {why}", flush=True)
    shapes = {"none": args.rounds}
    if args.victim == "redis":
        shapes = {"mirror:2": args.rounds, "rs:4+2": args.rounds}
    elif args.victim == "node":
        shapes = {"none": args.rounds - args.rounds // 2, "mirror:2": args.rounds // 2}
    good = True
    for redundancy, rounds in shapes.items():
        with tempfile.TemporaryDirectory() as root:
            good &= run(args.victim, redundancy, rounds, args.seed, Path(root), swap=swap)
    if args.victim == "node":
        with tempfile.TemporaryDirectory() as root:
            good &= run_points(POINTS, args.seed, Path(root))
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
