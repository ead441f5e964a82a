"""A program that swaps: the hog, in a control group of its own with too little memory for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from vswap.cli.device.memory_group import MemoryGroup

MIB = 2**20
HOG_MIB, LIMIT_MIB = 128, 40
_VSWAP = [sys.executable, "-m", "vswap.cli.main"]


def build(directory: Path, *options: str) -> Path:
    """Compiles the hog with gcc's ``options``; returns the program."""
    program = directory / "hog"
    source = Path(__file__).with_name("hog.c")
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", *options, "-o", program, source], check=True)
    return program


class Hog:
    """The hog in a control group of its own; use as a context."""

    def __init__(
        self, program: Path, root: Path, *, mib: int = HOG_MIB, limit_mib: int = LIMIT_MIB
    ) -> None:
        self._stop = root / "stop"
        self._out = root / "hog.out"
        self._group = MemoryGroup.at(f"vswap-test-{os.getpid()}")
        self._program = program
        self._mib, self._limit_mib = mib, limit_mib

    def __enter__(self) -> Hog:
        self._group.make(self._limit_mib * MIB)
        with open(self._out, "w") as out:
            self.process = subprocess.Popen(
                [str(self._program), str(self._mib), str(self._stop)], stdout=out,
                preexec_fn=lambda: self._group.enter(os.getpid()),
            )  # fmt: skip
        return self

    @property
    def told(self) -> str:
        return self._out.read_text()

    @property
    def passes(self) -> int:
        return self.told.count("\n")

    def wait_for_passes(self, count: int, timeout_s: float = 120) -> None:
        until_s = time.monotonic() + timeout_s
        while self.passes < count:
            assert self.process.poll() is None, f"{self.process.returncode}: {self.told}"
            assert time.monotonic() < until_s, f"too slow: {self.told}"
            time.sleep(0.05)

    def finish(self) -> str:
        self._stop.touch()
        assert self.process.wait(180) == 0, self._out.read_text()
        return self._out.read_text()

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._group.remove()


def swapped_in() -> int:
    """Pages, since the machine started."""
    for line in Path("/proc/vmstat").read_text().splitlines():
        if line.startswith("pswpin "):
            return int(line.split()[1])
    raise AssertionError("no pswpin in /proc/vmstat")


def missing() -> list[str]:
    """What a machine lacks that is to swap on a space; empty = nothing."""
    programs = ("nbdfuse", "losetup", "mkswap", "swapon", "gcc")
    found = [name for name in programs if shutil.which(name) is None]
    return [*(["root"] if os.geteuid() else []), *found]


class Swapping:
    """A hog that swaps on a space of a node while other things happen; use as a context, which
    swaps off and detaches in the end, whatever happened."""

    def __init__(self, node: str, address: str, space: str, root: Path) -> None:
        self._node = node
        self._address = address
        self._space = space
        self._hog = Hog(build(root), root, mib=64, limit_mib=24)

    def __enter__(self) -> Swapping:
        self._run("attach", self._space, "--swap", "--priority", "100",
                  "--node-address", self._address)  # fmt: skip
        try:
            self._hog.__enter__()
            self._hog.wait_for_passes(1)
        except BaseException:
            self.__exit__()
            raise
        return self

    def check(self) -> None:
        """Raises AssertionError if the hog found a wrong page, or died of a lost one."""
        assert self._hog.process.poll() is None, self._hog.told
        assert self._hog.told.splitlines()[-1].endswith(" bad 0"), self._hog.told

    def finish(self) -> str:
        """What the hog said last. Raises AssertionError as :meth:`check`."""
        last = self._hog.finish().splitlines()[-1]
        assert last.endswith(" bad 0"), last
        return last

    def __exit__(self, *_: object) -> None:
        self._hog.__exit__()
        self._run("detach", self._space, "--node", self._node)

    def _run(self, *arguments: str) -> None:
        done = subprocess.run(
            [*_VSWAP, *arguments], capture_output=True, text=True, check=False, timeout=400
        )
        assert done.returncode == 0, f"vswap {' '.join(arguments)}: {done.stdout}{done.stderr}"
