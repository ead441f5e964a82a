"""`vswap status`: the cluster on one screen."""

from __future__ import annotations

from rich.table import Table

from vswap.cli import jobs, nodes, options, output, tiers, units
from vswap.v1 import common_pb2, coordinator_pb2


def status(
    node_address: options.NodeAddress = None,
    coordinator: options.Coordinator = options.DEFAULT_COORDINATOR,
    as_json: options.Json = False,
) -> None:
    """Show nodes, tiers and jobs; with --node-address one node that works alone."""
    if node_address is not None:
        nodes.show(None, node_address, coordinator, as_json)
        return
    with options.operator(coordinator) as cluster:
        state = cluster.cluster()
        running = cluster.jobs()
    if as_json:
        output.print_json(
            {"cluster": output.plain(state), "jobs": [output.plain(job) for job in running]}
        )
        return
    console = output.stdout()
    console.print(
        f"cluster {state.cluster_uuid} ({state.version}) at {coordinator}, "
        f"configuration {state.generation}",
        markup=False,
    )
    console.print()
    node_rows = [
        (
            node.name,
            node.state if node.state == "connected" else _absent(node),
            node.address,
            units.count(node.pages),
            units.size(sum(tier.stored_bytes for tier in node.tiers)),
        )
        for node in state.nodes
    ]
    console.print(output.table(("NODE", "STATE", "ADDRESS", ">PAGES", ">STORED"), node_rows))
    console.print()
    console.print(_tiers(state))
    if running:
        console.print()
        console.print(jobs.job_table(running))
    output.remarks(tiers.unavailable(state))
    output.remarks(
        f"{stranger.tier}: {stranger.segments} segments ({units.size(stranger.bytes)}) under "
        f"{stranger.prefix} belong to nobody this cluster knows; they are left alone"
        for stranger in state.strangers
    )


def _absent(node: coordinator_pb2.NodeInfo) -> str:
    return f"{node.state} for {units.duration(node.last_seen_s_ago)}"


def _tiers(state: coordinator_pb2.ClusterStatus) -> Table:
    cluster = {info.tier.spec.name: info for info in state.tiers}
    usage: dict[str, common_pb2.TierUsage] = {}
    for node in state.nodes:
        for tier in node.tiers:
            total = usage.setdefault(
                tier.tier, common_pb2.TierUsage(tier=tier.tier, rank=tier.rank, state=tier.state)
            )
            total.pages += tier.pages
            total.logical_bytes += tier.logical_bytes
            total.live_bytes += tier.live_bytes
            total.stored_bytes += tier.stored_bytes
            total.limit_bytes += tier.limit_bytes
    for name, info in cluster.items():
        total = usage.setdefault(name, common_pb2.TierUsage(tier=name))
        total.rank = info.tier.spec.rank
        total.state = info.tier.state
        total.limit_bytes = info.tier.spec.capacity_bytes
    rows = [
        (
            tier.tier,
            "cluster" if tier.tier in cluster else "nodes",
            output.enum_name(tier, "state"),
            units.count(tier.pages),
            units.size(tier.logical_bytes),
            units.size(tier.stored_bytes),
            units.size(tier.limit_bytes),
            nodes.utilisation(tier),
        )
        for tier in sorted(usage.values(), key=lambda tier: (tier.rank, tier.tier))
    ]
    fill = sum(node.fill_pages for node in state.nodes)
    rows.append(("fill", "nodes", "active", units.count(fill), "-", "0 B", "-", "-"))
    columns = ("TIER", "SCOPE", "STATE", ">PAGES", ">LOGICAL", ">STORED", ">CAPACITY", ">LIVE")
    return output.table(columns, rows)
