"""`vswap run`: the daemons."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from vswap.cli import options, units

app = typer.Typer(help="Run a daemon in the foreground.", no_args_is_help=True)

Listen = Annotated[
    str | None,
    typer.Option("--listen", metavar="ADDRESS", help="Loopback host:port (0: any) or unix:/path."),
]
State = Annotated[
    Path | None, typer.Option("--state", metavar="DIR", help="Directory of its state.")
]
Insecure = Annotated[
    bool | None,
    typer.Option("--insecure", help="Allow listening beyond this host, without encryption."),
]


@app.command()
def coordinator(
    listen: Listen = None,
    state: State = None,
    config: options.Config = None,
    lease: Annotated[
        float | None,
        typer.Option(
            "--lease",
            parser=options.parsed(units.parse_duration),
            metavar="TIME",
            help="A node that is silent for so long counts as absent.",
        ),
    ] = None,
    insecure: Insecure = None,
) -> None:
    """Run the coordinator. Flags win over VSWAP_COORDINATOR_* variables, these over the file."""
    from vswap.coordinator import daemon

    flags = _given(listen=listen, state_dir=_text(state), lease_s=lease, insecure=insecure)
    _end(daemon.run(daemon.load_config(config, os.environ, flags)))


@app.command()
def node(
    name: Annotated[
        str | None, typer.Option("--name", help="Unique in the cluster; default: the host's name.")
    ] = None,
    listen: Listen = None,
    coordinator: Annotated[
        str | None,
        typer.Option(
            "--coordinator",
            metavar="ADDRESS",
            help="Coordinator to join (also VSWAP_COORDINATOR); none: the node works alone.",
        ),
    ] = None,
    state: State = None,
    config: options.Config = None,
    insecure: Insecure = None,
    nbd: Annotated[
        list[str] | None,
        typer.Option(
            "--nbd",
            metavar="ADDRESS",
            help="Where spaces are block devices: loopback host:port or unix:/path; repeatable. "
            "Default: unix:STATE/nbd.sock.",
        ),
    ] = None,
    swap_safe: Annotated[
        bool | None,
        typer.Option("--swap-safe", help="Lock memory, so that this machine may swap on the node."),
    ] = None,
    fault: options.Faults = None,
    allow_faults: Annotated[
        bool | None,
        typer.Option("--allow-faults", help="Fault plans may be set while the node runs."),
    ] = None,
    fresh: Annotated[
        bool | None, typer.Option("--fresh", help="Start empty; drop pages of an earlier run.")
    ] = None,
) -> None:
    """Run a node. Flags win over VSWAP_NODE_* variables, these over the file."""
    from vswap.node import daemon

    flags = _given(
        name=name,
        listen=listen,
        coordinator=coordinator,
        nbd=nbd or None,
        state_dir=_text(state),
        insecure=insecure,
        fresh=fresh,
        swap_safe=swap_safe,
        faults=options.fault_plans(fault) or None,
        allow_faults=allow_faults,
    )
    _end(daemon.run(daemon.load_config(config, os.environ, flags)))


def _end(code: int) -> NoReturn:
    """Without what Python does at its end: nothing of it is needed, and it takes 0.2 s in which a
    kernel that swaps on the node waits for the next one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _given(**flags: Any) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if value is not None}


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
