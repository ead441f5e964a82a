"""Asking one node, or each node of the cluster in turn, what takes it a while to find out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import typer
from google.protobuf.message import Message

from vswap.cli import output
from vswap.client import Client
from vswap.wire.errors import VswapError

T = TypeVar("T", bound=Message)


class Told(dict[str, T]):
    """The last word of each node, by name. ``errors``: why the others have none."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: dict[str, str] = {}


def survey(
    nodes: Sequence[tuple[str, str]],
    ask: Callable[[Client], Iterator[T]],
    progress: Callable[[T], str],
) -> Told[T]:
    """Asks nodes, given by name and address, one after the other, so that the servers they share
    are not read by all at once. Of several nodes one that fails does not hide the others; the
    error of a single one is raised."""
    told: Told[T] = Told()
    with output.stderr().status("") as status:
        for name, address in nodes:
            try:
                with Client(address, retry_s=0) as client:
                    for seen in ask(client):
                        told[name] = seen
                        status.update(f"{name} {progress(seen)}".strip())
            except VswapError as error:
                if len(nodes) == 1:
                    raise
                told.pop(name, None)
                told.errors[name] = str(error)
    return told


def print_told(told: Told[T], *, every: bool, as_json: bool, tell: Callable[[T], None]) -> None:
    """Prints it: of one node its own; of every node a list by name, in JSON too."""
    if as_json:
        plain = [{"node": name, "error": "", **output.plain(seen)} for name, seen in told.items()]
        plain += [{"node": name, "error": error} for name, error in told.errors.items()]
        output.print_json(plain if every else output.plain(*told.values()))
        return
    for name, seen in told.items():
        if every:
            typer.echo(f"{name}:")
        tell(seen)
    for name, error in told.errors.items():
        typer.echo(f"{name}: not asked: {error}", err=True)
