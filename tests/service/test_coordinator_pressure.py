"""Far more than a coordinator can tell and hear: it keeps up, and its memory does not grow."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from links import LinkNode
from processes import Daemon, private_mib

from vswap.v1 import common_pb2, coordinator_pb2, coordinator_pb2_grpc

pytestmark = pytest.mark.timeout(120)

MIB = 2**20
NODES, WATCHERS, POLLERS = 4, 150, 50
SECONDS = 5.0
MORE_MIB = 50
"""What all this may take beyond what an idle coordinator does; it takes 5."""


async def report_without_end(node: LinkNode, seen: dict[str, int]) -> None:
    """Every report tells of another byte that was moved."""
    [job_id] = node.directives or [""]
    while True:
        # As much as the stream takes: what waits here is this test's.
        if node.waiting < 100:
            if job_id:
                node.moved[job_id] = node.moved.get(job_id, 0) + 1
            node.report()
            seen["reports"] += 1
        await asyncio.sleep(0)


async def poll(stub: Any, seen: dict[str, int]) -> None:
    while True:
        try:
            await stub.GetCluster(coordinator_pb2.GetClusterRequest())
            seen["answers"] += 1
        except grpc.aio.AioRpcError as error:
            seen[error.code().name] = seen.get(error.code().name, 0) + 1
            await asyncio.sleep(0.1)


async def test_a_flood_of_reports_and_watchers_who_do_not_read(tmp_path: Path) -> None:
    seen = {"reports": 0, "answers": 0}
    with Daemon("coordinator", tmp_path / "state", "--lease", "10s") as daemon:
        async with grpc.aio.insecure_channel(daemon.address) as channel:
            generated: Any = coordinator_pb2_grpc
            stub = generated.OperatorStub(channel)
            for name, rank in (("a", 10), ("b", 20)):
                spec = common_pb2.TierSpec(
                    name=name, url=f"file://{tmp_path}/{name}", capacity_bytes=100 * MIB, rank=rank
                )
                await stub.AddTier(coordinator_pb2.AddTierRequest(spec=spec))
            nodes = [LinkNode(daemon.address, f"n{n}") for n in range(NODES)]
            for node in nodes:
                await node.connect()
            await nodes[0].until(lambda: {"a", "b"} <= nodes[0].tiers.keys())
            await nodes[0].store("a", 5 * MIB)
            drain = coordinator_pb2.JobSpec(kind=coordinator_pb2.MOVE_KIND_DRAIN, tier="a")
            job = await stub.StartJob(coordinator_pb2.StartJobRequest(spec=drain))
            await nodes[0].until(lambda: job.id in nodes[0].directives)
            idle = peak = private_mib(daemon)
            tasks = [asyncio.create_task(report_without_end(node, seen)) for node in nodes]
            watch = coordinator_pb2.WatchJobRequest(id=job.id)
            async with grpc.aio.insecure_channel(
                daemon.address, [("grpc.use_local_subchannel_pool", 1)]
            ) as others:
                deaf = [generated.OperatorStub(others).WatchJob(watch) for _ in range(WATCHERS)]
                tasks += [asyncio.create_task(poll(stub, seen)) for _ in range(POLLERS)]
                until_s = time.monotonic() + SECONDS
                while time.monotonic() < until_s:
                    peak = max(peak, private_mib(daemon))
                    await asyncio.sleep(0.05)
                # What matters gets through all the same.
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                nodes[0].move(job.id, nodes[0].stored["a"], "b")
                async with asyncio.timeout(20):
                    async for told in generated.OperatorStub(channel).WatchJob(watch):
                        job, peak = told, max(peak, private_mib(daemon))
                for call in deaf:
                    call.cancel()
            print(f"{idle} MiB idle, {peak} at most; {seen}")
            assert job.state == coordinator_pb2.JOB_STATE_DONE
            assert all(node.error is None for node in nodes)
            assert seen["answers"] > POLLERS
            assert peak - idle < MORE_MIB
            for node in nodes:
                await node.disconnect()
        assert "Traceback" not in daemon.output
