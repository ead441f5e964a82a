"""``make bench``: alternatives interleaved in one run, each ratio with its floor and aim.

``ARGS="codec redis drain redundancy outage scrub restart memory"`` chooses parts, ``--quick``
shortens, ``--json FILE`` writes. Exits 1 if a figure is below its floor.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks import codec, drain, memory, outage, redis_keys, redundancy, restart, scrub
from benchmarks.common import Result

Run = Callable[[], Coroutine[Any, Any, list[Result]]]
PARTS: dict[str, tuple[Run, Run]] = {
    "codec": (codec.run, lambda: codec.run(3, 2048)),
    "redis": (redis_keys.run, lambda: redis_keys.run(2, 4096)),
    "drain": (drain.run, lambda: drain.run(1, 16384)),
    "redundancy": (redundancy.run, lambda: redundancy.run(1, 8192)),
    "outage": (outage.run, lambda: outage.run(2, 1.0)),
    "scrub": (scrub.run, lambda: scrub.run(2, 1.0)),
    "restart": (restart.run, lambda: restart.run(2, 1_500_000, 200_000)),
    "memory": (memory.run, lambda: memory.run(3_000_000, 300_000)),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench ARGS=...", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="default: all")
    parser.add_argument("--quick", action="store_true", help="smaller and less exact")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    sys.setswitchinterval(5e-5)
    results: list[Result] = []
    for name in args.parts or PARTS:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        results += uvloop.run(PARTS[name][args.quick]())
    table = Table(
        title=f"{len(os.sched_getaffinity(0))} CPUs, not pinned; medians of interleaved rounds"
    )
    for column in ("what", "measured", "floor", "aim", "", "detail"):
        table.add_column(column)
    for r in results:
        sign = ">=" if r.up else "<="
        table.add_row(
            r.what, f"{r.value:.2f} {r.unit}", f"{sign} {r.floor}" if r.floor else "-",
            f"{sign} {r.aim}" if r.aim else "-", r.verdict if r.aim or r.floor else "", r.note,
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 170).print(table)
    if args.json:
        args.json.write_text(json.dumps([r.as_dict() for r in results], indent=1))
    return int(any(r.verdict == "BELOW FLOOR" for r in results))


if __name__ == "__main__":
    sys.exit(main())
