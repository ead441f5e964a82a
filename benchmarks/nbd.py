"""``make bench-nbd``: block devices against nbdkit's memory plugin and qemu-nbd.

One run, all servers up at once, every measurement of a round taken of each in turn: fio over unix
sockets, random reads and writes, depth 1 and 32, 4 KiB and 128 KiB. vswap twice: raw pages in an
uncompressed RAM tier (checksums are verified on every read), and real memory pages in a compressed
one. What compression adds is held against what it adds to a server that does nothing else
(:mod:`benchmarks.bare_nbd`), in CPU of the server; writes of real pages are nbdcopy's. ``--rounds
N``, ``--seconds S``, ``--json FILE``. Exits 1 if a figure is below its floor.
"""

from __future__ import annotations

import argparse
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
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import zstandard
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
    pid: int


@dataclass(frozen=True)
class Figures:
    """Of one fio run."""

    iops: float
    p50_us: float
    p99_us: float
    cpu_us: float
    """Of the server, per I/O."""


@contextmanager
def _process(command: list[str], socket: Path) -> Iterator[int]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until_s = time.monotonic() + 20
        while not socket.is_socket():
            if process.poll() is not None or time.monotonic() > until_s:
                raise SystemExit(f"{command[0]} does not start: {' '.join(command)}")
            time.sleep(0.05)
        yield process.pid
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
    with _process(command, socket) as pid:
        yield Server(name, f"nbd+unix:///s?socket={socket}", pid)


@contextmanager
def _nbdkit(root: Path) -> Iterator[Server]:
    socket = root / "nbdkit.sock"
    with _process(["nbdkit", "-f", "-U", str(socket), "memory", str(SIZE)], socket) as pid:
        yield Server("nbdkit memory", f"nbd+unix:///?socket={socket}", pid)


@contextmanager
def _qemu_nbd(root: Path) -> Iterator[Server]:
    socket, image = root / "qemu.sock", root / "qemu.img"
    image.write_bytes(b"")
    os.truncate(image, SIZE)
    command = ["qemu-nbd", "-k", str(socket), "-f", "raw", "-t", "-e", "8", "--cache=writeback",
               str(image)]  # fmt: skip
    with _process(command, socket) as pid:
        yield Server("qemu-nbd", f"nbd+unix:///?socket={socket}", pid)


@contextmanager
def _bare(root: Path, codec: str) -> Iterator[Server]:
    socket = root / f"bare-{codec}.sock"
    command = [sys.executable, "-m", "benchmarks.bare_nbd", str(socket), str(SIZE), codec]
    with _process(command, socket) as pid:
        yield Server(f"bare {codec}", f"nbd+unix:///s?socket={socket}", pid)


def _fill(server: Server, image: Path) -> None:
    subprocess.run(["nbdcopy", str(image), server.uri], check=True)


def _fio(server: Server, rw: str, size: str, depth: int, seconds: float, compress: bool) -> Figures:
    command = [
        "fio", "--name=x", "--ioengine=nbd", f"--uri={server.uri}", f"--rw=rand{rw}",
        f"--bs={size}", f"--iodepth={depth}", f"--size={SIZE}", "--time_based",
        f"--runtime={seconds}", "--norandommap", "--output-format=json",
    ]  # fmt: skip
    if compress:
        command += ["--buffer_compress_percentage=60", "--buffer_compress_chunk=4096"]
    process = psutil.Process(server.pid)
    before = process.cpu_times()
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    after = process.cpu_times()
    job = json.loads(out[out.index("{") :])["jobs"][0][rw]
    percentiles = job["clat_ns"]["percentile"]
    cpu_s = after.user + after.system - before.user - before.system
    return Figures(
        iops=job["iops"], p50_us=percentiles["50.000000"] / 1e3,
        p99_us=percentiles["99.000000"] / 1e3, cpu_us=cpu_s / max(job["total_ios"], 1) * 1e6,
    )  # fmt: skip


def _copy_us(server: Server, image: Path, size_bytes: int) -> float:
    """What a write of an image costs the server, in CPU: fio has no real pages to write."""
    process = psutil.Process(server.pid)
    before = process.cpu_times()
    subprocess.run(
        ["nbdcopy", f"--request-size={size_bytes}", "--requests=32", "--connections=1",
         "--sparse=0", str(image), server.uri],
        check=True,
    )  # fmt: skip
    after = process.cpu_times()
    cpu_s = after.user + after.system - before.user - before.system
    return cpu_s / (SIZE / size_bytes) * 1e6


def _zstd_us(server: Server, copy: Path, rw: str) -> float:
    """What compressing or decompressing a page that lies there now costs in a loop, in CPU: all of
    them in random order, and nothing else on the machine's other processor."""
    subprocess.run(["nbdcopy", server.uri, str(copy)], check=True)
    pages = np.fromfile(copy, np.uint8).reshape(-1, PAGE_BYTES)
    order = np.random.default_rng(2).permutation(len(pages))
    compress = zstandard.ZstdCompressor(level=1).compress
    work: Callable[[Any], bytes] = compress
    things: list[Any] = [page.data for page in pages]
    if rw == "read":
        decompress = zstandard.ZstdDecompressor().decompress
        work = lambda frame: decompress(frame, PAGE_BYTES)  # noqa: E731
        things = [compress(page) for page in things]
    start = time.process_time()
    for i in range(0, len(order), 32):
        _ = [work(things[k]) for k in order[i : i + 32].tolist()]
    return (time.process_time() - start) / len(order) * 1e6


Key = tuple[str, str, str, int]


@dataclass
class Measured:
    """Of each round."""

    runs: dict[Key, list[Figures]] = field(default_factory=lambda: defaultdict(list))
    """Per (server, rw, size, depth)."""
    cpu_us: dict[tuple[str, str, str], list[float]] = field(
        default_factory=lambda: defaultdict(list)
    )
    """Of the server per I/O at depth 32, per (server, rw, size); real pages where it compresses."""
    zstd_us: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    """What zstd costs a page in a loop at that time, per (rw, size)."""


_COMPARED = ("vswap zstd", "vswap raw", "bare zstd", "bare none")


def measure(rounds: int, seconds: float) -> Measured:
    found = Measured()
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        servers = [
            stack.enter_context(_node(root, "vswap raw", "none")),
            stack.enter_context(_nbdkit(root)),
            stack.enter_context(_node(root, "vswap zstd", "zstd:1")),
            stack.enter_context(_qemu_nbd(root)),
            stack.enter_context(_bare(root, "zstd")),
            stack.enter_context(_bare(root, "none")),
        ]
        compressing = [server for server in servers if "zstd" in server.name]
        real = real_pages(SIZE // PAGE_BYTES)
        image = root / "image"
        image.write_bytes(np.random.default_rng(1).bytes(SIZE))
        (root / "real").write_bytes(real.tobytes())
        images = {s: root / "real" if s in compressing else image for s in servers}
        for server in servers:
            _fill(server, images[server])
        for _ in range(rounds):
            for rw in ("read", "write"):
                for size in ("4k", "128k"):
                    for depth in (1, 32):
                        for server in servers:
                            if depth == 1 and server.name.startswith("bare"):
                                continue
                            found.runs[server.name, rw, size, depth].append(
                                _fio(server, rw, size, depth, seconds,
                                     rw == "write" and server in compressing)
                            )  # fmt: skip
                    for server in (s for s in servers if s.name in _COMPARED):
                        found.cpu_us[server.name, rw, size].append(
                            found.runs[server.name, rw, size, 32][-1].cpu_us if rw == "read"
                            else _copy_us(server, images[server], _BYTES[size])
                        )  # fmt: skip
                    found.zstd_us[rw, size].append(_zstd_us(compressing[0], root / "copy", rw))
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
        cpu = [np.array(measured.cpu_us[name, rw, size]) for name in _COMPARED]
        adds, bare = (cpu[0] - cpu[1]).tolist(), (cpu[2] - cpu[3]).tolist()
        loop = [cost * _BYTES[size] / PAGE_BYTES for cost in measured.zstd_us[rw, size]]
        found.append(
            Result(
                f"{rw} {size}, depth 32: CPU that zstd adds, over a bare server",
                ratio(adds, bare), floor=1.3,
                note=f"{median(adds):.1f} us an I/O, to a bare server {median(bare):.1f}; in a "
                f"loop by itself {median(loop):.1f}, of which it is {ratio(adds, loop):.2f} x",
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
