"""Plays the demo from the first check to the last process stopped."""

from __future__ import annotations

import asyncio
import shutil
import signal
import sys
import time

import numpy as np
import uvloop
from numpy.typing import NDArray

from vswap.cli import units
from vswap.cli.demo import plan as plans
from vswap.cli.demo import stage as stages
from vswap.cli.demo.acts import SAMPLE_PAGES, Acts
from vswap.cli.demo.cluster import Cluster
from vswap.cli.demo.plan import PAGE_BYTES
from vswap.cli.demo.result import Result
from vswap.cli.demo.sample import Sample
from vswap.cli.demo.stage import Stage
from vswap.cli.demo.story import Story
from vswap.loadgen import corpus
from vswap.loadgen.run import LoadRun, LoadSpec
from vswap.loadgen.workload import Mix

CLIENTS_PER_NODE = 2
BATCH = 64


def play(story: Story, seconds: float, nodes: int, pages: int, keep: bool) -> Result:
    """Set the stage, play every act, and leave nothing behind unless ``keep``.

    Must run in the main thread. Raises VswapError where the machine is too small or a process
    fails, KeyboardInterrupt on SIGINT and SIGTERM; either way everything is stopped and removed.
    """
    for directory in stages.clear_remains():
        story.line(f"removed what a killed demo had left in {directory}")
    story.act("Page content: memory of running processes, and text")
    base = corpus.build("mixed", PAGE_BYTES, seed=1)
    plan = plans.make(nodes, pages, base)
    stages.check_room(plan)
    story.line(
        f"{units.count(plan.pages)} pages of 4 KiB are {units.size(plan.logical_bytes)}; "
        f"{units.percent(plans.FILL)} of them will be fill pages"
    )
    stage = Stage()
    cluster = Cluster(plan, stage, outlives=keep)
    kept = False
    try:
        # A SIGTERM must clean up as Ctrl-C does.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        result = uvloop.run(_acts(story, cluster, base, seconds))
        _summary(story, result)
        if keep:
            _how_to_go_on(story, cluster)
            kept = True
        return result
    except KeyboardInterrupt:
        story.line("interrupted: stopping everything")
        raise
    except Exception:
        story.line(f"the daemons' logs are kept in {stage.keep_logs()}", style="bold red")
        raise
    finally:
        # From here on a second Ctrl-C would leave things behind.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if not kept:
            cluster.stop()
            stage.remove()
        stage.close()
        signal.signal(signal.SIGINT, signal.default_int_handler)


async def _acts(story: Story, cluster: Cluster, base: NDArray[np.uint8], seconds: float) -> Result:
    begin_s = time.monotonic()
    plan = cluster.plan
    story.act(f"Start: a coordinator, {plan.nodes} nodes, two Redis servers, objects on disk")
    try:
        await cluster.start(story.line)
        spec = LoadSpec(
            mix=Mix(0.7, 0.27, 0.03),
            batch=BATCH,
            clients=CLIENTS_PER_NODE * plan.nodes,
            pages=plan.pages,
            fill=plans.FILL,
        )
        sample = await asyncio.to_thread(
            Sample, cluster.node_addresses[0], base, 2 * plan.pages, SAMPLE_PAGES
        )
        async with LoadRun(cluster.node_addresses, "default", spec, base, report=story.line) as run:
            acts = Acts(cluster, run, sample, story, base, seconds)
            for title, act in (
                ("Fill: pages sink from fast tiers to slow ones", acts.fill),
                ("Load: reads, writes and frees", acts.before),
                ("Drain a Redis server under load, and switch it off", acts.drain),
                ("Overwrite and free", acts.change),
                ("Compact the other Redis server", acts.compact),
                ("Migrate pages back from disk", acts.migrate),
                ("Read everything back", acts.read_back),
            ):
                story.act(title)
                await act()
        sample.close()
        acts.result.seconds = time.monotonic() - begin_s
        return acts.result
    finally:
        await cluster.disconnect()


def _summary(story: Story, result: Result) -> None:
    story.act("Summary")
    for claim in result.claims():
        story.line(
            f"{'yes' if claim.holds else 'NO '}  {claim.text}",
            style="green" if claim.holds else "bold red",
        )
    before, during = result.before.load.summary(), result.during.load.summary()
    story.line(
        f"     load of {BATCH} pages: p99 {units.micros(before['p99'])} before the drain, "
        f"{units.micros(during['p99'])} during it"
    )
    story.line(
        f"     {units.size(result.logical_bytes)} of pages took "
        f"{units.size(result.node_memory_bytes())} of the nodes' memory and "
        f"{units.size(result.stored_bytes() - result.node_memory_bytes())} elsewhere"
    )


def _how_to_go_on(story: Story, cluster: Cluster) -> None:
    directory, state = cluster.stage.directory, cluster.stage.state
    pids = [daemon.pid for daemon in cluster.daemons]
    pids += [server.pid for server in cluster.redis.values()]
    stop = directory / "stop.sh"
    stop.write_text(
        "#!/bin/sh\n# Stops this demo's processes (and no others) and removes its files.\n"
        f"for pid in {' '.join(map(str, pids))}; do\n"
        # A Redis server renames itself, but it works in its directory.
        f"  {{ cat /proc/$pid/cmdline; readlink /proc/$pid/cwd; }} 2>/dev/null |\n"
        f"    grep -aq {directory.name} && kill $pid\n"
        "done\n"
        f"sleep 2\nrm -rf {directory} {state}\n"
    )
    vswap = shutil.which("vswap") or sys.argv[0]
    story.act("It goes on running")
    for line in (
        f"export VSWAP_COORDINATOR={cluster.coordinator_address}",
        f"{vswap} status",
        f"{vswap} drain redis-b --dry-run",
        f"{vswap} loadgen --pages 20000 --first-slot {40 * cluster.plan.pages}",
        f"sh {stop}          # stop it",
    ):
        story.line(line)
