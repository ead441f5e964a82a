"""The operator's client: tiers, nodes and jobs at the coordinator. Synchronous, thread-safe."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any

import grpc

from vswap.client import channels
from vswap.v1 import common_pb2, coordinator_pb2, coordinator_pb2_grpc
from vswap.wire.errors import OutcomeUnknown, Unreachable, VswapError
from vswap.wire.rpc import from_rpc_error


class Operator:
    """A connection to the coordinator at ``host:port`` or ``unix:/path``.

    Replies are the messages of coordinator.proto. Nothing is repeated here: starting a job twice
    is not the same as starting it once. Every error is a `vswap.wire.errors.VswapError`.
    """

    def __init__(self, address: str, *, deadline_s: float = 30.0) -> None:
        self.address = channels.check_address(address)
        self._deadline_s = deadline_s
        self._channel = grpc.insecure_channel(self.address, options=channels.OPTIONS)
        generated: Any = coordinator_pb2_grpc
        self._stub = generated.OperatorStub(self._channel)

    def __enter__(self) -> Operator:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def cluster(self) -> coordinator_pb2.ClusterStatus:
        """Nodes, tiers and strangers as the coordinator knows them."""
        reply: coordinator_pb2.ClusterStatus = self._call(
            "GetCluster", coordinator_pb2.GetClusterRequest()
        )
        return reply

    def add_tier(self, spec: common_pb2.TierSpec) -> common_pb2.Tier:
        """Register a tier; its backend is opened first and refused if unfit."""
        reply: common_pb2.Tier = self._call("AddTier", coordinator_pb2.AddTierRequest(spec=spec))
        return reply

    def set_tier(
        self,
        name: str,
        *,
        capacity_bytes: int | None = None,
        rank: int | None = None,
        high: float | None = None,
        low: float | None = None,
        replace: tuple[str, str] | None = None,
        force: bool = False,
    ) -> common_pb2.Tier:
        """Change a tier while it runs; None leaves a setting as it is.

        ``replace`` puts a server in the place of another one of a redundant tier: (old, new) URL.
        Refused where pages would be lost, unless ``force``.
        """
        old, new = replace or (None, None)
        request = coordinator_pb2.SetTierRequest(
            name=name, capacity_bytes=capacity_bytes, rank=rank, high=high, low=low,
            replace=old, replace_by=new, force=force,
        )  # fmt: skip
        reply: common_pb2.Tier = self._call("SetTier", request)
        return reply

    def remove_tier(self, name: str) -> None:
        """Forget a tier that is drained or was never used."""
        self._call("RemoveTier", coordinator_pb2.RemoveTierRequest(name=name))

    def activate_tier(self, name: str) -> common_pb2.Tier:
        """Let a drained tier take pages again."""
        reply: common_pb2.Tier = self._call(
            "ActivateTier", coordinator_pb2.ActivateTierRequest(name=name)
        )
        return reply

    def forget_node(self, node: str) -> coordinator_pb2.ForgetNodeReply:
        """Declare that a node (name or shard uuid) never comes back; its pages are deleted."""
        reply: coordinator_pb2.ForgetNodeReply = self._call(
            "ForgetNode", coordinator_pb2.ForgetNodeRequest(node=node)
        )
        return reply

    def start_job(
        self, spec: coordinator_pb2.JobSpec, *, dry_run: bool = False
    ) -> coordinator_pb2.Job:
        """Start a drain, migration, compaction or repair; ``dry_run`` only plans it."""
        reply: coordinator_pb2.Job = self._call(
            "StartJob", coordinator_pb2.StartJobRequest(spec=spec, dry_run=dry_run)
        )
        return reply

    def jobs(self, *, ended: bool = False) -> list[coordinator_pb2.Job]:
        """Jobs under way; with ``ended`` those that are over as well."""
        reply: coordinator_pb2.ListJobsReply = self._call(
            "ListJobs", coordinator_pb2.ListJobsRequest(all=ended)
        )
        return list(reply.jobs)

    def cancel_job(self, job_id: str) -> coordinator_pb2.Job:
        """Stop a job; what it moved stays moved."""
        reply: coordinator_pb2.Job = self._call(
            "CancelJob", coordinator_pb2.CancelJobRequest(id=job_id)
        )
        return reply

    def watch_job(self, job_id: str) -> Iterator[coordinator_pb2.Job]:
        """The job at least once a second until it ends; raises when the coordinator goes away."""
        stream = self._stub.WatchJob(coordinator_pb2.WatchJobRequest(id=job_id))
        try:
            yield from stream
        except grpc.RpcError as failure:
            raise self._error(failure) from failure
        finally:
            stream.cancel()

    def _call(self, method: str, request: Any) -> Any:
        try:
            return getattr(self._stub, method)(request, timeout=self._deadline_s)
        except grpc.RpcError as failure:
            raise self._error(failure) from failure

    def _error(self, failure: grpc.RpcError) -> VswapError:
        error = from_rpc_error(failure, self.address)
        if isinstance(error, Unreachable):
            return Unreachable(
                f"no coordinator answers at {self.address} (another one: --coordinator or "
                "VSWAP_COORDINATOR)",
                address=self.address,
            )
        if isinstance(error, OutcomeUnknown):
            return OutcomeUnknown(f"the coordinator at {self.address} does not answer")
        return error
