"""The `vswap` command."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from vswap.cli import check, exits, health, jobs, load, nodes, run, spaces, status, tiers
from vswap.cli.demo import command
from vswap.cli.device import commands as device
from vswap.cli.device import execute
from vswap.wire.errors import VswapError

app = typer.Typer(
    name="vswap",
    help="A virtual swap space for a cluster.",
    epilog=exits.help_text(),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(run.app, name="run")
app.add_typer(nodes.app, name="node")
app.add_typer(tiers.app, name="tier")
app.add_typer(spaces.app, name="space")
app.add_typer(jobs.app, name="job")
app.command("status")(status.status)
app.command("health")(health.health)
app.command("check")(check.check)
app.command("drain")(jobs.drain)
app.command("activate")(tiers.activate)
app.command("migrate")(jobs.migrate)
app.command("compact")(jobs.compact)
app.command("repair")(jobs.repair)
app.command("scrub")(nodes.scrub)
app.command("attach")(device.attach)
app.command("detach")(device.detach)
app.command("exec")(execute.execute)
app.command("loadgen")(load.loadgen)
app.command("demo")(command.demo)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"vswap {version('vswap')}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """A virtual swap space for a cluster: pages move, slot numbers never change."""


def main() -> None:
    """Run the command; every error ends as one line on stderr and a code of `exits`."""
    try:
        app()
    except VswapError as error:
        _fail(str(error), exits.exit_code(error), error)
    except KeyboardInterrupt:
        sys.exit(exits.INTERRUPTED)
    except BrokenPipeError:
        # The reader has gone; nothing more can be told to it, and the interpreter must not try.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(exits.INTERNAL)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}", exits.INTERNAL, error)
    except Exception as error:
        _fail(
            f"internal error: {type(error).__name__}: {error} (VSWAP_DEBUG=1 shows where)",
            exits.INTERNAL,
            error,
        )


def _fail(message: str, code: int, error: BaseException) -> None:
    if os.environ.get("VSWAP_DEBUG"):
        raise error
    print(f"vswap: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
