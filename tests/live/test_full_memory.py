"""A node whose shared memory is smaller than it was told: full is an error, not a bus error."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from processes import Daemon
from shards import pages

from vswap.client import Client
from vswap.wire.errors import OutOfTiers, SlotNotFound

pytestmark = pytest.mark.live

CONFIG = """
[[tiers]]
name = "ram"
url = "ram://"
codec = "none"
capacity_bytes = 67108864
[[spaces]]
name = "s"
"""


@pytest.fixture
def small_memory(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 16 MiB."""
    assert os.geteuid() == 0, "mounting needs root"
    where = tmp_path / "shm"
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", where], check=True)
    try:
        yield where
    finally:
        subprocess.run(["umount", "--lazy", where], check=True)


def test_full_shared_memory_refuses_stores_and_keeps_pages(
    tmp_path: Path, small_memory: Path
) -> None:
    config = tmp_path / "node.toml"
    config.write_text(CONFIG)
    daemon = Daemon("node", small_memory / "state", "--name", "n", "--config", str(config))
    with daemon, Client(daemon.address, retry_s=0) as client:
        space = client.space("s")
        stored = 0
        with pytest.raises(OutOfTiers):
            while stored < 8192:
                part = np.arange(stored, stored + 256, dtype=np.uint64)
                space.store(part, pages(part, 1))
                stored += 256
        assert stored >= 2048
        # The table finds no room either: slots far apart need chunks of their own.
        refused = 0
        for slot in range(1 << 27, 1 << 28, 1 << 20):
            try:
                space.store([slot], np.zeros((1, 4096), np.uint8))
            except OutOfTiers:
                refused += 1
                with pytest.raises(SlotNotFound):
                    space.load([slot])
        assert refused
        for start in range(0, stored, 256):
            part = np.arange(start, start + 256, dtype=np.uint64)
            assert (space.load(part) == pages(part, 1)).all()
        with pytest.raises(SlotNotFound):
            space.load([stored])
        space.free(np.arange(0, 1024, dtype=np.uint64))
        part = np.arange(256, dtype=np.uint64)
        space.store(part, pages(part, 2))
        assert (space.load(part) == pages(part, 2)).all()
        assert daemon.stop() == 0
        assert "Traceback" not in daemon.output


@pytest.mark.parametrize("left_bytes", [0, 4096, 8192, 16384])
def test_shared_memory_that_is_full_at_the_start_is_one_clear_line(
    tmp_path: Path, small_memory: Path, left_bytes: int
) -> None:
    config = tmp_path / "node.toml"
    config.write_text(CONFIG)
    with open(small_memory / "other", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 16 * 2**20 - left_bytes)
    daemon = Daemon("node", small_memory / "state", "--name", "n", "--config", str(config))
    daemon.log = tmp_path / "log"
    assert daemon.launch().wait() == 3, daemon.output
    assert "full" in daemon.output or "No space left" in daemon.output
    assert daemon.output.count("\n") == 1
    assert "Traceback" not in daemon.output
    # The next start finds half of a first start and begins anew.
    (small_memory / "other").unlink()
    with daemon, Client(daemon.address) as client:
        assert client.status().pages == 0
