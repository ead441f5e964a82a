"""Where page content comes from: memory of running processes, text, noise, or a mixture.

A corpus is an array of base pages (m, page_bytes) of uint8. `vswap.loadgen.content` turns base
pages into the page of a slot. Pages that repeat one 32-bit word are left out: how many of those
there are is a setting of its own.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vswap.wire.errors import InvalidRequest

KINDS = ("mixed", "memory", "text", "random")
DEFAULT_PAGES = 8192
MIXED_MEMORY_SHARE = 0.6

_CHUNK_BYTES = 1 << 20

# An ordinary program at work: parsed modules, records, indices, numbers as text.
_CHILD = """
import ast, json, pathlib, random, sys, sysconfig
rng = random.Random(int(sys.argv[1]))
files = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
texts = [p.read_text(errors="replace") for p in files[:120]]
trees = [ast.parse(text) for text in rng.sample(texts, min(12, len(texts)))]
words = sorted({word for text in texts for word in text.split()})
rows = [{"id": i, "name": rng.choice(words), "at": rng.random(), "tags": rng.sample(words, 3)}
        for i in range(40000)]
index = {row["name"] + str(row["id"]): row for row in rows}
lines = [json.dumps(row) for row in rows]
print("ready", flush=True)
sys.stdin.read()
"""


def build(kind: str, page_bytes: int, seed: int, pages: int = DEFAULT_PAGES) -> NDArray[np.uint8]:
    """Base pages (m, page_bytes) of one of `KINDS`, at most ``pages``, in random order.

    ``text`` and ``random`` depend on the seed alone. ``memory`` holds pages as they are right now
    in this process and in a child that has built data structures: the order is seeded, the bytes
    are not. Takes about a second.
    """
    rng = np.random.default_rng(seed)
    if kind == "random":
        return rng.integers(0, 256, (pages, page_bytes), dtype=np.uint8)
    if kind == "text":
        return _text(page_bytes, rng, pages)
    if kind == "memory":
        return _memory(page_bytes, rng, pages)
    if kind == "mixed":
        memory = _memory(page_bytes, rng, round(pages * MIXED_MEMORY_SHARE))
        text = _text(page_bytes, rng, pages - len(memory))
        return rng.permutation(np.concatenate([memory, text]))
    raise InvalidRequest(f"unknown content {kind!r} (one of {', '.join(KINDS)})")


def without_fill(pages: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The pages (n, page_bytes) that do not repeat one 32-bit word."""
    words = pages.view(np.uint32)
    kept: NDArray[np.uint8] = pages[(words != words[:, :1]).any(axis=1)]
    return kept


def read_memory(pid: int, page_bytes: int) -> Iterator[NDArray[np.uint8]]:
    """Anonymous memory of a process, in arrays (n, page_bytes).

    The process is not stopped: regions that vanish meanwhile are passed over.
    """
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    try:
        for line in maps:
            fields = line.split()
            anonymous = fields[4] == "0" and (len(fields) == 5 or fields[5].startswith("["))
            if not anonymous or not fields[1].startswith("rw-p"):
                continue
            begin, end = (int(part, 16) for part in fields[0].split("-"))
            for at in range(begin, end, _CHUNK_BYTES):
                # EIO or EFAULT: unmapped since the list of regions was read.
                with contextlib.suppress(OSError):
                    data = os.pread(fd, min(_CHUNK_BYTES, end - at), at)
                    whole = len(data) // page_bytes * page_bytes
                    yield np.frombuffer(data[:whole], np.uint8).reshape(-1, page_bytes)
    finally:
        os.close(fd)


def _memory(page_bytes: int, rng: np.random.Generator, pages: int) -> NDArray[np.uint8]:
    found = [_sample(read_memory(os.getpid(), page_bytes), rng, pages // 2, page_bytes)]
    # Where ptrace is forbidden altogether this process's own memory must do.
    with _child(int(rng.integers(2**31))) as pid, contextlib.suppress(PermissionError):
        found.append(_sample(read_memory(pid, page_bytes), rng, pages, page_bytes))
    together = rng.permutation(np.concatenate(found))
    return together[:pages]


def _sample(
    chunks: Iterator[NDArray[np.uint8]], rng: np.random.Generator, pages: int, page_bytes: int
) -> NDArray[np.uint8]:
    kept = [without_fill(chunk) for chunk in chunks]
    every = np.concatenate([np.empty((0, page_bytes), np.uint8), *kept])
    chosen = rng.permutation(len(every))[:pages]
    return every[chosen]


@contextlib.contextmanager
def _child(seed: int) -> Iterator[int]:
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", _CHILD, str(seed)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
    finally:
        process.kill()
        process.communicate()


def _text(page_bytes: int, rng: np.random.Generator, pages: int) -> NDArray[np.uint8]:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("**/*.py"))
    texts: list[bytes] = []
    wanted = pages * page_bytes
    for at in rng.permutation(len(files)):
        texts.append(files[at].read_bytes())
        wanted -= len(texts[-1])
        if wanted <= 0:
            break
    data = b"\n".join(texts)
    while len(data) < page_bytes:
        data += b"There is no source text here, so this line has to do. "
    whole = len(data) // page_bytes
    array = np.frombuffer(data, np.uint8, whole * page_bytes).reshape(whole, page_bytes)
    return array[rng.permutation(whole)[:pages]]
