"""``make mutants``: takes the handling of each failure out, and sees whether its test notices.

Works on copies. A test counts only where it passes without the mutation: each is run so first, and
once; of the simulation, the seed that failed is run again. A test that hangs is no verdict, unless
hanging is what the mutation does (``hangs`` in its row). ``NAME ...`` runs some of them, ``--doc``
writes the tables of docs/faults.md. Exits 1 unless every one is caught by a test that is sound.
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path

from mutants.table import PAGE, ROOT, Mutant, page, read

_WINGS = ("proto", "tiers", "node", "coordinator", "client")
_TIMEOUT_S = 300
_SIM_TIMEOUT_S = 3600


class End(enum.Enum):
    """How the run of a test ended."""

    PASSED = enum.auto()
    FAILED = enum.auto()
    HUNG = enum.auto()
    BROKE = enum.auto()
    """It came to no verdict: nothing was collected, or the source cannot be imported."""


Result = tuple[End, str]
"""With the last that was said."""


@contextlib.contextmanager
def _tree(mutant: Mutant | None = None) -> Iterator[Path]:
    """A copy of the source, mutated."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as directory:
        root = Path(directory)
        for part in (*_WINGS, "tests"):
            shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("__pycache__"))
        for part in ("pyproject.toml", "benchmarks"):
            (root / part).symlink_to(ROOT / part)
        if mutant is not None:
            mutant.apply(root)
        yield root


def _python(root: Path, arguments: list[str], timeout_s: float) -> tuple[int | None, str]:
    """Exit code (None: it did not end in time) and output of a module, run on that source."""
    paths = [str(root / part) for part in (*_WINGS, "tests")]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    try:
        done = subprocess.run(
            [sys.executable, "-m", *arguments], cwd=root, env=environ, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout_s, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None, f"did not end within {timeout_s:.0f} s"
    return done.returncode, done.stdout.strip()


def _pytest(test: str, root: Path) -> Result:
    code, said = _python(root, ["pytest", "-q", "-x", "-p", "no:cacheprovider", test], _TIMEOUT_S)
    if code is None or (code == 1 and "from pytest-timeout" in said):
        return End.HUNG, said[-200:]
    told = re.search(r"^(FAILED|ERROR) .*", said, re.MULTILINE)
    return {0: End.PASSED, 1: End.FAILED}.get(code, End.BROKE), told[0] if told else said[-200:]


def _simulate(root: Path, *seeds: str) -> Result:
    """Until the first seed that fails."""
    code, said = _python(root, ["sim", *seeds, "--jobs", "1", "--until-failed"], _SIM_TIMEOUT_S)
    if code is None:
        return End.HUNG, said
    failed = re.search(r"^seed \d+ FAILED.*", said, re.MULTILINE)
    if failed:
        return End.FAILED, failed[0]
    return End.BROKE if code else End.PASSED, said[-200:]


def sound(test: str) -> Result:
    """How the test ends where nothing is mutated."""
    with _tree() as root:
        return _pytest(test, root)


@cache
def _sound_seed(seed: str) -> Result:
    with _tree() as root:
        return _simulate(root, "--first", seed, "--seeds", "1")


def run(mutant: Mutant, sounds: dict[str, Future[Result]]) -> tuple[Mutant, str, str]:
    """The mutant, what came of it in a word ("caught" is good), and the last that was said."""
    before: Result = End.PASSED, ""
    if mutant.test in sounds:
        before = sounds[mutant.test].result()
    if before[0] is End.PASSED:
        with _tree(mutant) as root:
            if mutant.test.startswith("sim:"):
                end, said = _simulate(root, "--seeds", mutant.test[4:])
                if end is End.FAILED:
                    before = _sound_seed(said.split()[1])
            else:
                end, said = _pytest(mutant.test, root)
    if before[0] is not End.PASSED:
        return mutant, "UNSOUND", f"without the mutation, {before[0].name.lower()}: {before[1]}"
    if end is End.FAILED or (end is End.HUNG and mutant.hangs):
        return mutant, "caught", said
    return mutant, "SURVIVED" if end is End.PASSED else end.name, said


def main() -> int:
    parser = argparse.ArgumentParser(prog="make mutants ARGS=...", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--doc", action="store_true")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if args.doc:
        PAGE.write_text(page(PAGE.read_text()))
        return 0
    every = [mutant for mutants in read().values() for mutant in mutants]
    unknown = set(args.names) - {mutant.name for mutant in every}
    if unknown:
        parser.error(f"no mutant is called {', '.join(sorted(unknown))}")
    chosen = [mutant for mutant in every if not args.names or mutant.name in args.names]
    bad = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        # Queued before the mutants, which wait for them.
        tests = dict.fromkeys(m.test for m in chosen if not m.test.startswith("sim:"))
        sounds = {test: pool.submit(sound, test) for test in tests}
        for mutant, word, said in pool.map(lambda mutant: run(mutant, sounds), chosen):
            bad += word != "caught"
            print(f"{word:9} {mutant.name}: {said[:120]}", flush=True)
    print(f"{len(chosen)} mutants, {bad} not caught")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
