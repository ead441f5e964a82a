"""`vswap demo`: a whole cluster on this machine, from nothing to a summary."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vswap.cli import exits, output
from vswap.cli.demo import plan as plans


def demo(
    seconds: Annotated[
        float,
        typer.Option(
            "--seconds", min=1, max=3600, help="How long the load runs while a server is drained."
        ),
    ] = 10,
    nodes: Annotated[int, typer.Option("--nodes", min=1, max=8, help="Nodes.")] = 2,
    pages: Annotated[
        int, typer.Option("--pages", min=plans.LEAST_PAGES, help="Pages of 4 KiB to store.")
    ] = plans.PAGES,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave it running, and tell how to use and stop it.")
    ] = False,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write what was measured; -: stdout."),
    ] = None,
) -> None:
    """Run a cluster of separate processes: fill it, drain a server under load, compact, check.

    Everything is removed at the end, also on Ctrl-C. Exit code 5 if any page was wrong.
    """
    # Other commands must not wait for what only the demo imports.
    from vswap.cli.demo.play import play
    from vswap.cli.demo.story import Story

    output.check_writable(json_file)
    console = output.stderr() if str(json_file) == "-" else output.stdout()
    story = Story(console)
    result = play(story, seconds, nodes, pages, keep)
    output.write_json(json_file, result.as_json())
    broken = [claim for claim in result.claims() if not claim.holds]
    if broken:
        integrity = any(claim.integrity for claim in broken)
        raise typer.Exit(exits.INTEGRITY if integrity else exits.INTERNAL)
