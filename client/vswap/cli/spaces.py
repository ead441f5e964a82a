"""`vswap space`: the virtual swap spaces of a node."""

from __future__ import annotations

from typing import Annotated

import typer

from vswap.cli import options, output, units
from vswap.v1 import node_pb2
from vswap.wire.errors import InvalidRequest, UnknownSpace

app = typer.Typer(help="See and change the spaces of a node.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="Name of the space.")]
Quota = Annotated[
    int | None,
    typer.Option(
        "--quota",
        parser=options.parsed(units.parse_size),
        metavar="SIZE",
        help="Stored bytes at most; 0: no quota.",
    ),
]
Tiers = Annotated[
    list[str] | None,
    typer.Option("--tier", metavar="NAME", help="A tier it may use; repeat. None given: all."),
]
TierMax = Annotated[
    list[str] | None,
    typer.Option("--tier-max", metavar="NAME=SIZE", help="Stored bytes at most in a tier; repeat."),
]


@app.command("list")
def list_spaces(
    node: options.NodeName = None,
    node_address: options.NodeAddress = None,
    coordinator: options.Coordinator = options.DEFAULT_COORDINATOR,
    as_json: options.Json = False,
) -> None:
    """List the spaces of a node."""
    with options.node_client(coordinator, node, node_address) as client:
        spaces = client.spaces()
    if as_json:
        output.print_json([output.plain(space) for space in spaces])
        return
    rows = [
        (
            space.name,
            units.size(space.page_bytes),
            units.count(space.pages),
            units.count(space.fill_pages),
            units.size(space.live_bytes),
            units.size(space.limits.quota_bytes) if space.limits.quota_bytes else "-",
            ", ".join(space.limits.tiers) or "all",
        )
        for space in spaces
    ]
    columns = ("SPACE", ">PAGE", ">PAGES", ">FILL", ">STORED", ">QUOTA", "TIERS")
    output.stdout().print(output.table(columns, rows))
    output.remarks(
        f"{space.name}: {units.count(space.unreadable_pages)} pages are lost or damaged"
        for space in spaces
        if space.unreadable_pages
    )


@app.command()
def create(
    name: Name,
    page_size: Annotated[
        int,
        typer.Option(
            "--page-size",
            parser=options.parsed(units.parse_size),
            metavar="SIZE",
            help="Power of two, 4 KiB to 64 KiB.",
        ),
    ] = 4096,
    max_slots: Annotated[int, typer.Option("--max-slots", help="Slots at most.")] = 2**28,
    quota: Quota = None,
    tier: Tiers = None,
    tier_max: TierMax = None,
    exist_ok: Annotated[
        bool, typer.Option("--exist-ok", help="Do not fail if there is one alike.")
    ] = False,
    node: options.NodeName = None,
    node_address: options.NodeAddress = None,
    coordinator: options.Coordinator = options.DEFAULT_COORDINATOR,
) -> None:
    """Create a space on a node."""
    with options.node_client(coordinator, node, node_address) as client:
        client.create_space(
            name,
            page_bytes=page_size,
            max_slots=max_slots,
            quota_bytes=quota or 0,
            tiers=tier or (),
            tier_max_bytes=_tier_max(tier_max),
            exist_ok=exist_ok,
        )
    typer.echo(f"space {name}: {units.size(page_size)} pages, {units.count(max_slots)} slots")


@app.command("set")
def set_space(
    name: Name,
    quota: Quota = None,
    tier: Tiers = None,
    all_tiers: Annotated[bool, typer.Option("--all-tiers", help="Let it use all tiers.")] = False,
    tier_max: TierMax = None,
    max_slots: Annotated[
        int, typer.Option("--max-slots", help="Slots at most; may only grow.")
    ] = 0,
    node: options.NodeName = None,
    node_address: options.NodeAddress = None,
    coordinator: options.Coordinator = options.DEFAULT_COORDINATOR,
    as_json: options.Json = False,
) -> None:
    """Change limits of a space; what is not given stays."""
    if tier and all_tiers:
        raise InvalidRequest("--tier and --all-tiers exclude each other")
    with options.node_client(coordinator, node, node_address) as client:
        now = _find(client.spaces(), name).limits
        space = client.set_space(
            name,
            quota_bytes=now.quota_bytes if quota is None else quota,
            tiers=tier or ([] if all_tiers else now.tiers),
            tier_max_bytes={**now.tier_max_bytes, **_tier_max(tier_max)},
            max_slots=max_slots,
        )
    if as_json:
        output.print_json(output.plain(space))
        return
    quota_text = units.size(space.limits.quota_bytes) if space.limits.quota_bytes else "none"
    limits = "".join(
        f", at most {units.size(most)} in {tier}"
        for tier, most in sorted(space.limits.tier_max_bytes.items())
    )
    typer.echo(
        f"space {name}: {units.count(space.max_slots)} slots, quota {quota_text}, "
        f"tiers {', '.join(space.limits.tiers) or 'all'}{limits}"
    )


@app.command()
def delete(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    node: options.NodeName = None,
    node_address: options.NodeAddress = None,
    coordinator: options.Coordinator = options.DEFAULT_COORDINATOR,
) -> None:
    """Delete a space with all its pages."""
    with options.node_client(coordinator, node, node_address) as client:
        if not yes:
            pages = _find(client.spaces(), name).pages
            typer.confirm(f"Delete space {name} with {pages} pages?", abort=True)
        pages = client.delete_space(name)
    typer.echo(f"deleted space {name} with {units.count(pages)} pages")


def _find(spaces: list[node_pb2.Space], name: str) -> node_pb2.Space:
    for space in spaces:
        if space.name == name:
            return space
    there = ", ".join(space.name for space in spaces) or "none"
    raise UnknownSpace(f"no space {name!r} (there: {there})", space=name)


def _tier_max(items: list[str] | None) -> dict[str, int]:
    limits = {}
    for item in items or []:
        name, equals, size = item.partition("=")
        if not equals or not name:
            raise InvalidRequest(f"--tier-max wants NAME=SIZE, got {item!r}")
        try:
            limits[name] = units.parse_size(size)
        except ValueError as error:
            raise InvalidRequest(f"--tier-max {name}: {error}") from None
    return limits
