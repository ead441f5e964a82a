"""`vswap tier`: the backends that the cluster shares."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated
from urllib.parse import urlsplit

import typer

from vswap.cli import options, output, units
from vswap.cli.nodes import utilisation
from vswap.v1 import common_pb2, coordinator_pb2
from vswap.wire.errors import InvalidRequest

app = typer.Typer(help="See and change the tiers that nodes share.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="Name of the tier.")]
Capacity = Annotated[
    int | None,
    typer.Option(
        "--capacity",
        parser=options.parsed(units.parse_size),
        metavar="SIZE",
        help="Bytes vswap may store there; default: the server's own limit.",
    ),
]
Rank = Annotated[int | None, typer.Option("--rank", help="Fast to slow: lower is faster.")]
High = Annotated[
    float | None,
    typer.Option("--high", min=0, max=1, help="Above this share pages are moved on..."),
]
Low = Annotated[float | None, typer.Option("--low", min=0, max=1, help="...until this share.")]


@app.command("list")
def list_tiers(
    coordinator: options.Coordinator = options.DEFAULT_COORDINATOR, as_json: options.Json = False
) -> None:
    """List the cluster's tiers and what lies in them."""
    with options.operator(coordinator) as cluster:
        status = cluster.cluster()
    if as_json:
        output.print_json([output.plain(info) for info in status.tiers])
        return
    rows = [
        (
            info.tier.spec.name,
            str(info.tier.spec.rank),
            output.enum_name(info.tier, "state"),
            "\n".join(servers(info.tier.spec)),
            protection(info),
            info.tier.spec.codec,
            units.count(info.usage.pages),
            units.size(info.usage.stored_bytes),
            units.size(info.tier.spec.capacity_bytes),
            utilisation(info.usage),
        )
        for info in sorted(status.tiers, key=lambda i: (i.tier.spec.rank, i.tier.spec.name))
    ]
    columns = (
        "TIER",
        ">RANK",
        "STATE",
        "URL",
        "REDUNDANCY",
        "CODEC",
        ">PAGES",
        ">STORED",
        ">CAPACITY",
        ">LIVE",
    )
    output.stdout().print(output.table(columns, rows))
    output.remarks(unavailable(status))


@app.command()
def add(
    name: Name,
    url: Annotated[
        str | None,
        typer.Argument(help="redis://, rediss://, redis+unix://, file:///dir, s3://bucket/prefix"),
    ] = None,
    urls: Annotated[
        list[str] | None,
        typer.Option("--url", metavar="URL", help="One of several servers; say it for each."),
    ] = None,
    redundancy: Annotated[
        str,
        typer.Option(
            "--redundancy",
            metavar="none|mirror:N|rs:K+M",
            help="Over N servers, all alike, or K+M of which any K are enough.",
        ),
    ] = "none",
    capacity: Capacity = None,
    codec: Annotated[str, typer.Option("--codec", help="zstd:LEVEL, lz4 or none.")] = "zstd:1",
    rank: Rank = None,
    high: High = None,
    low: Low = None,
    assert_noeviction: Annotated[
        bool,
        typer.Option(
            "--assert-noeviction",
            help="You know that this Redis does not evict, though it forbids CONFIG.",
        ),
    ] = False,
    verify_writes: Annotated[
        bool, typer.Option("--verify-writes", help="Read each segment back before it is relied on.")
    ] = False,
    password_env: Annotated[
        str,
        typer.Option(
            "--password-env",
            metavar="VARIABLE",
            help="Variable that holds the password, in each daemon's environment.",
        ),
    ] = "",
    password_file: Annotated[
        str,
        typer.Option(
            "--password-file", metavar="FILE", help="File that holds it, on each daemon's host."
        ),
    ] = "",
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout",
            parser=options.parsed(units.parse_duration),
            metavar="TIME",
            help="An operation on the backend counts as failed after this.",
        ),
    ] = 5.0,
    coordinator: options.Coordinator = options.DEFAULT_COORDINATOR,
    as_json: options.Json = False,
) -> None:
    """Add a tier. Its backend is opened first and refused if it is not fit."""
    named = [*([url] if url else []), *(urls or [])]
    if not named:
        raise InvalidRequest("a tier needs a URL")
    if any(urlsplit(one).password for one in named):
        raise InvalidRequest(
            "a password in the URL would show in the process list: "
            "use --password-env or --password-file"
        )
    spec = common_pb2.TierSpec(
        name=name,
        url=named[0] if len(named) == 1 and redundancy == "none" else "",
        urls=named if len(named) > 1 or redundancy != "none" else [],
        redundancy=redundancy,
        codec=codec,
        capacity_bytes=capacity or 0,
        rank=100 if rank is None else rank,
        high=0.9 if high is None else high,
        low=0.8 if low is None else low,
        assert_noeviction=assert_noeviction,
        verify_writes=verify_writes,
        password_env=password_env,
        password_file=password_file,
        timeout_s=timeout,
    )
    with options.operator(coordinator) as cluster:
        _show(cluster.add_tier(spec), as_json)


@app.command("set")
def set_tier(
    name: Name,
    capacity: Capacity = None,
    rank: Rank = None,
    high: High = None,
    low: Low = None,
    replace: Annotated[
        str | None,
        typer.Option(
            "--replace",
            metavar="OLD=NEW",
            help="Another server in the place of one of a redundant tier; then it is repaired.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace even if pages are lost by that.")
    ] = False,
    coordinator: options.Coordinator = options.DEFAULT_COORDINATOR,
    as_json: options.Json = False,
) -> None:
    """Change a tier while it is in use; what is not given stays."""
    if all(option is None for option in (capacity, rank, high, low, replace)):
        raise InvalidRequest(
            "nothing to change: give --capacity, --rank, --high, --low or --replace"
        )
    with options.operator(coordinator) as cluster:
        tier = cluster.set_tier(
            name, capacity_bytes=capacity, rank=rank, high=high, low=low,
            replace=_old_and_new(replace), force=force,
        )  # fmt: skip
    _show(tier, as_json)


@app.command()
def remove(name: Name, coordinator: options.Coordinator = options.DEFAULT_COORDINATOR) -> None:
    """Remove a tier that is drained or was never used."""
    with options.operator(coordinator) as cluster:
        cluster.remove_tier(name)
    typer.echo(f"removed tier {name}")


def activate(
    tier: Name,
    coordinator: options.Coordinator = options.DEFAULT_COORDINATOR,
    as_json: options.Json = False,
) -> None:
    """Let a drained tier take pages again."""
    with options.operator(coordinator) as cluster:
        _show(cluster.activate_tier(tier), as_json)


def unavailable(status: coordinator_pb2.ClusterStatus) -> Iterator[str]:
    """A line for each shared tier or server that some connected node cannot use, and why."""
    for info in status.tiers:
        if not info.usage.available:
            yield f"{info.tier.spec.name} is not available at {info.usage.error}"
        if info.usage.lost_pages:
            yield (
                f"{info.tier.spec.name}: {units.count(info.usage.lost_pages)} pages are lost; "
                "loads of them fail until their slots are stored again or freed"
            )
        for server in info.usage.servers:
            if not server.up:
                yield f"{info.tier.spec.name}: {server.url} is down at {server.error}"
        if info.usage.degraded_segments:
            size = units.size(info.usage.degraded_bytes)
            yield (
                f"{info.tier.spec.name}: {info.usage.degraded_segments} segments ({size}) are "
                "degraded: written again as soon as their servers are back or replaced"
            )


def servers(spec: common_pb2.TierSpec) -> list[str]:
    """The URLs of a tier: one, or those it is spread over."""
    return list(spec.urls) or [spec.url]


def protection(info: coordinator_pb2.TierInfo) -> str:
    """A tier's redundancy, and how much of it is not there now."""
    degraded = info.usage.degraded_segments
    missing = f", {units.count(degraded)} degraded" if degraded else ""
    return f"{info.tier.spec.redundancy or 'none'}{missing}"


def _old_and_new(text: str | None) -> tuple[str, str] | None:
    """OLD=NEW, where either may hold a = of its own."""
    if text is None:
        return None
    match = re.fullmatch(r"(.+?)=([a-z0-9+]+://.*)", text)
    if match is None:
        raise InvalidRequest("say --replace OLD=NEW, with the URLs of two servers")
    if urlsplit(match[2]).password:
        raise InvalidRequest("a password in the URL would show in the process list")
    return match[1], match[2]


def _show(tier: common_pb2.Tier, as_json: bool) -> None:
    if as_json:
        output.print_json(output.plain(tier))
        return
    spec = tier.spec
    typer.echo(
        f"tier {spec.name}: {output.enum_name(tier, 'state')}, {' '.join(servers(spec))}, "
        f"redundancy {spec.redundancy}, {spec.codec}, "
        f"capacity {units.size(spec.capacity_bytes)}, rank {spec.rank}, "
        f"moved on above {units.percent(spec.high)} until {units.percent(spec.low)}"
    )
