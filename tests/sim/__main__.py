"""``python -m sim``: runs seeds, several at once, and says which of them broke a promise.

A failure prints its seed; ``--seed N`` replays exactly that run and tells what happened in it.
``--mutant NAME`` plants a bug and ends with 0 once it is found.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice

from sim.mutants import MUTANTS, planted
from sim.run import Outcome, run_seed


def _one(work: tuple[int, str]) -> Outcome:
    seed, mutant = work
    with planted(mutant):
        return run_seed(seed)


def _outcomes(seeds: range, mutant: str, jobs: int, limit_s: float) -> Iterator[Outcome]:
    """In order of seeds; stops to begin new ones when the time is over."""
    until = time.monotonic() + limit_s if limit_s else float("inf")
    work = ((seed, mutant) for seed in seeds if time.monotonic() < until)
    if jobs == 1:
        yield from map(_one, work)
        return
    with ProcessPoolExecutor(jobs) as pool:
        while batch := list(islice(work, 8 * jobs)):
            yield from pool.map(_one, batch)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="replay this one, with all that is logged")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--limit-s", type=float, default=0, help="begin no seed after so long")
    parser.add_argument("--mutant", choices=[*MUTANTS], default="", help="plant this bug")
    parser.add_argument("--until-failed", action="store_true", help="end with the first that fails")
    parser.add_argument("--traces", action="store_true", help="print a fingerprint of each run")
    options = parser.parse_args()
    if options.seed is not None:
        with planted(options.mutant):
            outcome = run_seed(options.seed, verbose=True)
        print(_told(outcome))
        print(_trace(outcome))
        return 1 if outcome.problem else 0
    return _many(options)


def _many(options: argparse.Namespace) -> int:
    seeds = range(options.first, options.first + options.seeds)
    began, virtual_s, failed, done = time.monotonic(), 0.0, 0, 0
    counts: Counter[str] = Counter()
    for outcome in _outcomes(seeds, options.mutant, options.jobs, options.limit_s):
        done += 1
        virtual_s += outcome.virtual_s
        counts.update(outcome.counts)
        if options.traces:
            print(_trace(outcome))
        if outcome.problem:
            failed += 1
            print(_told(outcome), flush=True)
            if options.mutant:
                print(f"{options.mutant}: found after {done} seeds")
                return 0
            if options.until_failed:
                break
    took, each = time.monotonic() - began, 1000 / max(done, 1)
    print(
        f"{done} seeds, {failed} failed, {virtual_s / 60:.0f} simulated minutes in {took:.0f} s "
        f"({took * each:.0f} ms a seed, {_cpu_s() * each:.0f} of one processor)"
    )
    print(", ".join(f"{n} {name}" for name, n in sorted(counts.items()) if " " in name))
    return 1 if failed or options.mutant else 0


def _cpu_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _told(outcome: Outcome) -> str:
    what = f"FAILED: {outcome.problem}" if outcome.problem else "ok"
    again = f"make sim SEED={outcome.seed}"
    return f"seed {outcome.seed} {what}\n  {outcome.scenario}\n  again: {again}"


def _trace(outcome: Outcome) -> str:
    return f"seed {outcome.seed} trace {outcome.trace:016x} at {outcome.virtual_s:.6f}"


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":
        # Sets of names must have the same order in every run.
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "sim", *sys.argv[1:]])
    sys.exit(main())
