"""Full shared memory: an error, not a SIGBUS. Needs root for a tmpfs of its own (Docker's /dev/shm
has 64 MB by default)."""

from __future__ import annotations

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


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(tmp_path)], check=True)
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


@pytest.mark.parametrize("sparse", [False, True], ids=["arena", "tables"])
def test_a_full_tmpfs_is_out_of_tiers_and_loses_nothing(small_tmpfs: Path, sparse: bool) -> None:
    config = small_tmpfs / "node.toml"
    config.write_text(
        '[[tiers]]\nname="ram"\nurl="ram://"\ncodec="none"\ncapacity_bytes=1073741824\n'
        '[[spaces]]\nname="s"\n'
    )
    flags = ("--name", "n", "--config", str(config))
    with (
        Daemon("node", small_tmpfs / "state", *flags) as daemon,
        Client(daemon.address, retry_s=0) as client,
    ):
        space = client.space("s")
        stored: list[np.ndarray] = []
        with pytest.raises(OutOfTiers, match="shared memory"):
            for turn in range(1000):
                # One slot per chunk of a table fills the tables, neighbours fill the arena.
                part = np.arange(50, dtype=np.uint64) * np.uint64(8192 if sparse else 1)
                part += np.uint64(turn * 50 * (8192 if sparse else 1))
                space.store(part, pages(part, 1))
                stored.append(part)
        assert stored
        for part in stored:
            assert (space.load(part) == pages(part, 1)).all()
        failed = stored[-1] + np.uint64(50 * (8192 if sparse else 1))
        with pytest.raises(SlotNotFound):
            space.load(failed[:1])
        space.free(stored[0])
        assert client.status().pages == 50 * (len(stored) - 1)
