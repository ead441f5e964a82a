"""``make bench-nbd``: block devices against nbdkit's memory plugin and qemu-nbd.

One run, all servers up at once, every measurement of a round taken of each in turn: fio over unix
sockets, random reads and writes, depth 1 and 32, 4 KiB and 128 KiB. vswap twice: raw pages in an
uncompressed RAM tier (checksums are verified on every read), and real memory pages in a compressed
one. What compression adds is held against what zstandard alone takes in a server that does nothing
else (:mod:`benchmarks.bare_nbd`), in CPU; writes of real pages are nbdcopy's. ``--rounds N``,
``--seconds S``, ``--json FILE``. Exits 1 if a figure is below its floor.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.common import MIB, PAGE_BYTES, Result, ratio, real_pages

SIZE = 128 * MIB
_BYTES = {"4k": 4096, "128k": 128 * 1024}
_PROGRAMS = ("fio", "nbdkit", "qemu-nbd", "nbdcopy")


@dataclass(frozen=True)
class Server:
    name: str
    uri: str
    cpu_s: Callable[[], float]
    """What it has spent so far; of a bare server, zstandard alone."""


@dataclass(frozen=True)
class Figures:
    """Of one fio run."""

    iops: float
    p50_us: float
    p99_us: float
    cpu_us: float
    """Of the server, per I/O."""


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


@contextmanager
def _process(command: list[str], socket: Path) -> Iterator[Callable[[], float]]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until_s = time.monotonic() + 20
        while not socket.is_socket():
            if process.poll() is not None or time.monotonic() > until_s:
                raise SystemExit(f"{command[0]} does not start: {' '.join(command)}")
            time.sleep(0.05)
        yield partial(_cpu_s, psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def _node(root: Path, name: str, codec: str) -> Iterator[Server]:
    """A node with one RAM tier, eight times as large as the device: blocks that random overwrites
    leave half empty are cleaned, as they would be in service."""
    short = name.replace(" ", "-")
    config, socket = root / f"{short}.toml", root / f"{short}.sock"
    config.write_text(
        f'name = "{short}"\nlisten = "127.0.0.1:0"\nstate_dir = "{root}/{short}"\n'
        f'nbd = ["unix:{socket}"]\nlog_level = "error"\n'
        f'[[tiers]]\nname = "ram"\nurl = "ram://"\ncodec = "{codec}"\n'
        f'capacity_bytes = {8 * SIZE}\n[[spaces]]\nname = "s"\nmax_slots = {SIZE // PAGE_BYTES}\n'
    )
    command = [sys.executable, "-m", "vswap.cli.main", "run", "node", "--config", str(config)]
    with _process(command, socket) as cpu_s:
        yield Server(name, f"nbd+unix:///s?socket={socket}", cpu_s)


@contextmanager
def _nbdkit(root: Path) -> Iterator[Server]:
    socket = root / "nbdkit.sock"
    with _process(["nbdkit", "-f", "-U", str(socket), "memory", str(SIZE)], socket) as cpu_s:
        yield Server("nbdkit memory", f"nbd+unix:///?socket={socket}", cpu_s)


@contextmanager
def _qemu_nbd(root: Path) -> Iterator[Server]:
    socket, image = root / "qemu.sock", root / "qemu.img"
    image.write_bytes(b"")
    os.truncate(image, SIZE)
    command = ["qemu-nbd", "-k", str(socket), "-f", "raw", "-t", "-e", "8", "--cache=writeback",
               str(image)]  # fmt: skip
    with _process(command, socket) as cpu_s:
        yield Server("qemu-nbd", f"nbd+unix:///?socket={socket}", cpu_s)


@contextmanager
def _bare(root: Path) -> Iterator[Server]:
    socket = root / "bare.sock"
    command = [sys.executable, "-m", "benchmarks.bare_nbd", str(socket), str(SIZE)]
    with _process(command, socket):
        spent = np.memmap(f"{socket}.spent", np.uint64, "r", shape=1)
        yield Server("bare zstd", f"nbd+unix:///s?socket={socket}", lambda: int(spent[0]) / 1e9)


def _fio(server: Server, rw: str, size: str, depth: int, seconds: float, compress: bool) -> Figures:
    command = [
        "fio", "--name=x", "--ioengine=nbd", f"--uri={server.uri}", f"--rw=rand{rw}",
        f"--bs={size}", f"--iodepth={depth}", f"--size={SIZE}", "--time_based",
        f"--runtime={seconds}", "--norandommap", "--output-format=json",
    ]  # fmt: skip
    if compress:
        command += ["--buffer_compress_percentage=60", "--buffer_compress_chunk=4096"]
    before_s = server.cpu_s()
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    cpu_s = server.cpu_s() - before_s
    job = json.loads(out[out.index("{") :])["jobs"][0][rw]
    percentiles = job["clat_ns"]["percentile"]
    return Figures(
        iops=job["iops"], p50_us=percentiles["50.000000"] / 1e3,
        p99_us=percentiles["99.000000"] / 1e3, cpu_us=cpu_s / max(job["total_ios"], 1) * 1e6,
    )  # fmt: skip


def _copy(server: Server, image: Path, size_bytes: int) -> float:
    """Writes an image, since fio has no real pages to write; the CPU of each write in us."""
    before_s = server.cpu_s()
    subprocess.run(
        ["nbdcopy", f"--request-size={size_bytes}", "--requests=32", "--connections=1",
         "--sparse=0", str(image), server.uri],
        check=True,
    )  # fmt: skip
    return (server.cpu_s() - before_s) / (SIZE / size_bytes) * 1e6


Key = tuple[str, str, str, int]


@dataclass
class Measured:
    """Of each round."""

    runs: dict[Key, list[Figures]] = field(default_factory=lambda: defaultdict(list))
    """Per (server, rw, size, depth)."""
    cpu_us: dict[tuple[str, str, str], list[float]] = field(
        default_factory=lambda: defaultdict(list)
    )
    """Per (server, rw, size): per I/O at depth 32, with real pages where it compresses."""


def measure(rounds: int, seconds: float) -> Measured:
    found = Measured()
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        servers = [
            stack.enter_context(_node(root, "vswap raw", "none")),
            stack.enter_context(_nbdkit(root)),
            stack.enter_context(_node(root, "vswap zstd", "zstd:1")),
            stack.enter_context(_qemu_nbd(root)),
            stack.enter_context(_bare(root)),
        ]
        compressing = [server for server in servers if "zstd" in server.name]
        (root / "real").write_bytes(real_pages(SIZE // PAGE_BYTES).tobytes())
        (root / "random").write_bytes(np.random.default_rng(1).bytes(SIZE))
        images = {s: root / ("real" if s in compressing else "random") for s in servers}
        for server in servers:
            _copy(server, images[server], _BYTES["128k"])

        for _ in range(rounds):
            for rw in ("read", "write"):
                for size in ("4k", "128k"):
                    for depth, server in itertools.product((1, 32), servers):
                        found.runs[server.name, rw, size, depth].append(
                            _fio(server, rw, size, depth, seconds,
                                 rw == "write" and server in compressing)
                        )  # fmt: skip
                    for server in servers:
                        found.cpu_us[server.name, rw, size].append(
                            found.runs[server.name, rw, size, 32][-1].cpu_us if rw == "read"
                            else _copy(server, images[server], _BYTES[size])
                        )  # fmt: skip
                print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return found


_HELD_BACK = {
    ("read", "4k"): "about 35 numpy calls a batch, whatever its length; then xxh3 and sendmsg",
    ("read", "128k"): "a view, a hash and an iovec for each of 32 pages; nbdkit sends one piece",
    (
        "write",
        "4k",
    ): "about 60 numpy calls a batch of about 16: entry, books, header, rows; at "
    "first fresh shared memory",
    ("write", "128k"): "a view, a hash and an iovec for each of 32 pages; the socket holds a write "
    "and a half",
}


def results(measured: Measured) -> list[Result]:
    """Ratios are medians over the rounds: what a round compares was measured side by side."""
    bounds = {("read", "4k"): (1.0, 1.5), ("read", "128k"): (0.5, 0.9),
              ("write", "4k"): (0.5, 0.8), ("write", "128k"): (0.5, 0.8)}  # fmt: skip
    found = []
    for (rw, size), (floor, aim) in bounds.items():
        ours = measured.runs["vswap raw", rw, size, 32]
        theirs = measured.runs["nbdkit memory", rw, size, 32]
        ratios = [mine.iops / its.iops for mine, its in zip(ours, theirs, strict=True)]
        busy = median(f.cpu_us * f.iops / 1e4 for f in ours)
        found.append(
            Result(
                f"{rw} {size}, depth 32, raw, over nbdkit memory", median(ratios), floor=floor,
                aim=aim, up=True,
                note=f"{min(ratios):.2f} to {max(ratios):.2f} x. The node is busy {busy:.0f} % of "
                f"the time: {_HELD_BACK[rw, size]}",
            )
        )  # fmt: skip
    for rw, size in bounds:
        compressed, raw, bare = (
            measured.cpu_us[name, rw, size] for name in ("vswap zstd", "vswap raw", "bare zstd")
        )
        adds = [a - b for a, b in zip(compressed, raw, strict=True)]
        found.append(
            Result(
                f"{rw} {size}, depth 32: CPU that compression adds, over bare zstd",
                ratio(adds, bare), floor=1.3,
                note=f"{median(raw):.1f} us raw, {median(compressed):.1f} us compressed, bare zstd "
                f"{median(bare):.1f} us an I/O",
            )
        )  # fmt: skip
    return found


def _medians(found: list[Figures]) -> Figures:
    return Figures(*(median(getattr(f, name) for f in found) for name in Figures.__annotations__))


def _show(runs: dict[Key, list[Figures]], found: list[Result]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 150)
    table = Table(title=f"fio, unix socket, {len(os.sched_getaffinity(0))} CPUs, not pinned")
    for column in ("what", "depth", "server", "I/O per s", "MB/s", "p50 us", "p99 us", "CPU us/IO"):
        table.add_column(column, justify="left" if column in ("what", "server") else "right")
    for rw in ("read", "write"):
        for size, kib in (("4k", 4), ("128k", 128)):
            for depth in (1, 32):
                for (name, *rest), figures in runs.items():
                    if rest == [rw, size, depth]:
                        f = _medians(figures)
                        table.add_row(
                            f"{rw} {size}", str(depth), name, f"{f.iops:.0f}",
                            f"{f.iops * kib * 1024 / 1e6:.0f}", f"{f.p50_us:.0f}",
                            f"{f.p99_us:.0f}", f"{f.cpu_us:.1f}",
                        )  # fmt: skip
                table.add_section()
    console.print(table)
    table = Table()
    for column in ("what", "measured", "floor", "aim", "", "held back by / detail"):
        table.add_column(column)
    for r in found:
        sign = ">=" if r.up else "<="
        table.add_row(
            r.what, f"{r.value:.2f} {r.unit}", f"{sign} {r.floor}" if r.floor else "-",
            f"{sign} {r.aim}" if r.aim else "-", r.verdict, r.note,
        )  # fmt: skip
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench-nbd ARGS=...", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if missing:
        raise SystemExit(f"{', '.join(missing)} not found: "
                         "apt-get install fio nbdkit qemu-utils libnbd-bin")  # fmt: skip
    measured = measure(args.rounds, args.seconds)
    found = results(measured)
    _show(measured.runs, found)
    if args.json:
        rows: list[dict[str, Any]] = [
            dict(zip(("server", "rw", "size", "depth"), key, strict=True)) | vars(_medians(figures))
            for key, figures in measured.runs.items()
        ]
        args.json.write_text(
            json.dumps({"runs": rows, "results": [r.as_dict() for r in found]}, indent=1)
        )
    return int(any(r.verdict == "BELOW FLOOR" for r in found))


if __name__ == "__main__":
    sys.exit(main())
