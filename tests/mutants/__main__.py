"""``make mutants``: takes the handling of each failure out, and sees whether its test notices.

Works on copies. ``NAME ...`` runs some of them, ``--doc`` writes the tables of docs/faults.md.
Exits 1 if one survives.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutants.table import PAGE, ROOT, Mutant, page, read

_WINGS = ("proto", "tiers", "node", "coordinator", "client")
_TIMEOUT_S = 300


def run(mutant: Mutant) -> tuple[Mutant, bool, str]:
    """Whether the mutant is caught, and the last line of the test."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as directory:
        root = Path(directory)
        for part in (*_WINGS, "tests"):
            shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("__pycache__"))
        for part in ("pyproject.toml", "benchmarks"):
            (root / part).symlink_to(ROOT / part)
        mutant.apply(root)
        paths = [str(root / part) for part in (*_WINGS, "tests")]
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        if mutant.test.startswith("sim:"):
            return (mutant, *_simulate(mutant.test[4:], root, environ))
        command = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", mutant.test]
        try:
            done = subprocess.run(
                [sys.executable, *command], cwd=root, env=environ, capture_output=True, text=True,
                timeout=_TIMEOUT_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return mutant, True, f"did not end within {_TIMEOUT_S} s"
        lines = done.stdout.split("\n")
        # 1: a test failed; anything else is no verdict of a test.
        return mutant, done.returncode == 1, " ".join(lines[-2:]) or done.stderr[-200:]


def _simulate(seeds: str, root: Path, environ: dict[str, str]) -> tuple[bool, str]:
    """Until the first seed that fails."""
    command = [sys.executable, "-u", "-m", "sim", "--seeds", seeds, "--jobs", "1"]
    with subprocess.Popen(
        command, cwd=root, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as running:
        assert running.stdout is not None
        line = ""
        for line in running.stdout:
            if "FAILED" in line:
                running.kill()
                return True, line.strip()
    return False, line.strip()


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
    survived = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for mutant, caught, said in pool.map(run, chosen):
            survived += not caught
            print(f"{'caught' if caught else 'SURVIVED':9} {mutant.name}: {said[:100]}", flush=True)
    print(f"{len(chosen)} mutants, {survived} survived")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
