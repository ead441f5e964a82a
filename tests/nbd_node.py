"""A node with a block device, for live tests: pages spill from RAM to compressed RAM to disk."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from nbd_client import TRIM, Nbd
from processes import Daemon

from vswap.client import Client

MIB = 2**20


def run(*command: str | Path, timeout_s: float = 120) -> str:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False,
        timeout=timeout_s,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


class NbdNode:
    """Three tiers, so small that pages spill from each to the next; the space is "disk".

    ``fastest`` is "ram", whose pages are stored as they are and received where they will lie, or
    "zram".
    """

    def __init__(self, root: Path, size_bytes: int, *, fastest: str = "ram") -> None:
        self.socket = Path(f"/dev/shm/vswap-nbd-{os.getpid()}.sock")
        config = root / "node.toml"
        config.write_text(
            f"""
name = "conformance"
nbd = ["unix:{self.socket}", "127.0.0.1:0"]
[[tiers]]
name = "ram"
url = "ram://"
codec = "none"
capacity_bytes = {8 * MIB}
rank = {10 * (fastest != "ram")}
[[tiers]]
name = "zram"
url = "ram://"
codec = "zstd:1"
capacity_bytes = {8 * MIB}
rank = {10 * (fastest == "ram")}
[[tiers]]
name = "disk"
url = "file://{root}/disk"
codec = "zstd:1"
capacity_bytes = {600 * MIB}
rank = 50
[[spaces]]
name = "disk"
max_slots = {size_bytes // 4096}
"""
        )
        self.daemon = Daemon("node", root / "state", "--config", str(config)).start()
        self.client = Client(self.daemon.address)
        self.unix = f"nbd+unix:///disk?socket={self.socket}"
        self.tcp = f"nbd://{self.client.status().nbd[1]}/disk"
        with Nbd(f"unix:{self.socket}") as disk:
            disk.go("disk").write(0, b"not a fill page" + bytes(4081))
            assert self.tiers() == {"ram": 0, "zram": 0, "disk": 0} | {fastest: 1}
            disk.do(TRIM, 0, 4096)

    def close(self) -> None:
        """Stops it; it must end well."""
        try:
            assert self.client.status().counters.get("corrupt_pages", 0) == 0
            self.client.close()
            assert self.daemon.stop() == 0, self.daemon.output
        finally:
            if self.daemon.process is not None and self.daemon.process.poll() is None:
                self.daemon.kill()
            self.socket.unlink(missing_ok=True)

    def tiers(self) -> dict[str, int]:
        return {usage.tier: usage.pages for usage in self.client.status().tiers}

    @property
    def pages(self) -> int:
        return int(self.client.status().pages)
