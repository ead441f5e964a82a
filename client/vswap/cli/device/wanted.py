"""What a command is to attach: the space, made if need be, and whether it is safe to swap on it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from vswap.cli import units
from vswap.cli.device import checks
from vswap.cli.device.attach import Wanted
from vswap.client import Client
from vswap.v1 import node_pb2
from vswap.wire.errors import InvalidRequest, Refused

_PAGE_BYTES = 4096
_MOST_SWAP_BYTES = 64 * 2**30
"""Swap on a larger space takes this much of it, unless told: the kernel keeps a byte or two of its
own memory for every page of a swap device."""
_LEAST_SWAP_BYTES = 10 * _PAGE_BYTES
"""mkswap makes no smaller area."""

errors = Console(stderr=True, soft_wrap=True, highlight=False)


def what_to_attach(
    client: Client, space: str, size: int | None, *, swap: bool, priority: int | None, strict: bool
) -> Wanted:
    """Looks at the node and its space, and creates the space if a size is given.

    ``strict`` refuses to swap on a node that could be swapped out to itself; else it is remarked,
    like all that is not as safe as it could be. Raises InvalidRequest, Refused.
    """
    if size is not None:
        size = whole_pages(size, swap=swap)
    status = client.status()
    nbd = _local_first(status)
    if swap:
        _check(status, nbd, strict=strict)
    found = _find(client, space)
    if found is None and size is not None:
        client.create_space(space, page_bytes=_PAGE_BYTES, max_slots=size // _PAGE_BYTES)
        found = _find(client, space)
    if found is None:
        raise InvalidRequest(
            f"no space named {space!r} at node {status.name}: say --size to create it"
        )
    if swap and found.page_bytes > _PAGE_BYTES:
        errors.print(
            f"[yellow]careful:[/] space {space} has pages of {found.page_bytes} bytes; "
            f"the kernel swaps {_PAGE_BYTES} at a time, and every write changes a part of a page"
        )
    space_bytes = found.page_bytes * found.max_slots
    if size is not None and size > space_bytes:
        raise Refused(
            f"space {space} has {units.size(space_bytes)}, not {units.size(size)}: "
            "`vswap space set` can let it grow"
        )
    return Wanted(
        name=f"{space}@{status.name}", space=space, nbd=nbd,
        size_bytes=device_bytes(space_bytes, size, swap=swap), space_bytes=space_bytes,
        swap=swap, priority=priority, force=not strict,
    )  # fmt: skip


def device_bytes(space_bytes: int, size: int | None, *, swap: bool) -> int:
    """How large the device becomes: whole pages. Raises InvalidRequest where that is too little."""
    default = min(space_bytes, _MOST_SWAP_BYTES) if swap else space_bytes
    return whole_pages(default if size is None else size, swap=swap)


def whole_pages(size: int, *, swap: bool) -> int:
    """The same size, down to a multiple of a page. Raises InvalidRequest if it is too little."""
    least = _LEAST_SWAP_BYTES if swap else _PAGE_BYTES
    if size < least:
        what = "swap" if swap else "a device"
        raise InvalidRequest(f"{what} of {units.size(size)}: at least {units.size(least)}")
    return size & ~(_PAGE_BYTES - 1)


def must_hold_nothing(client: Client, space: str) -> None:
    """Raises Refused if a space holds pages: they would not survive that it is swapped on.

    Also if they were swapped: perhaps by another machine, which still runs.
    """
    found = _find(client, space)
    if found is not None and found.pages:
        raise Refused(
            f"space {space} holds pages ({units.count(found.pages)}), which are lost if it is "
            "swapped on: name another space, or say --overwrite"
        )


def _check(status: node_pb2.NodeStatus, nbd: str, *, strict: bool) -> None:
    pid = _local_pid(status, nbd)
    danger = checks.could_wait_for_itself(pid)
    if danger and strict:
        raise Refused(f"{danger}; --force swaps all the same")
    careful([danger] * bool(danger) + checks.missing(pid, _state_dir(nbd)))


def careful(lines: Iterable[str]) -> None:
    """Remarks all that is not as safe as it could be."""
    for line in lines:
        errors.print(f"[yellow]careful:[/] {line}")


def _find(client: Client, space: str) -> node_pb2.Space | None:
    return next((known for known in client.spaces() if known.name == space), None)


def _local_first(status: node_pb2.NodeStatus) -> str:
    """Where to reach the node's block devices from here: its socket, else TCP."""
    here = [a for a in status.nbd if a.startswith("unix:") and Path(a[5:]).is_socket()]
    other = [a for a in status.nbd if not a.startswith("unix:")]
    if not here + other:
        raise Refused(
            f"node {status.name} serves no block devices that can be reached from here "
            f"(its addresses: {', '.join(status.nbd) or 'none'}; see --nbd of `vswap run node`)"
        )
    return str((here + other)[0])


def _local_pid(status: node_pb2.NodeStatus, nbd: str) -> int:
    return int(status.pid) if nbd.startswith("unix:") else 0


def _state_dir(nbd: str) -> Path | None:
    path = Path(nbd.removeprefix("unix:"))
    return path.parent if nbd.startswith("unix:") and (path.parent / "shard").exists() else None
