"""A guest kernel swaps on a virtio disk that is a space: QEMU is the NBD client."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from guest import add_modules, boot, fetch_kernel, pack
from nbd_node import MIB, NbdNode
from swapping import build

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]

HERE = Path(__file__).parent
GUEST_MIB = 96


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fetch_kernel("linux-image-cloud-amd64", tmp_path_factory.mktemp("kernel"))


@pytest.fixture(scope="module")
def initramfs(kernel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the guest runs: the drivers of its disk, and the hog."""
    root = tmp_path_factory.mktemp("root")
    add_modules(kernel, root, "virtio_pci", "virtio_blk")
    build(root, "-static")
    return pack(root, HERE / "guest_init.sh")


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NbdNode]:
    made = NbdNode(tmp_path, 512 * MIB)
    yield made
    made.close()


def test_a_guest_swaps_on_a_space(node: NbdNode, kernel: Path, initramfs: Path) -> None:
    assert os.geteuid() == 0
    console = boot(
        kernel, initramfs, "-drive",
        f"file=nbd+unix:///disk?socket={node.socket},if=virtio,format=raw,discard=unmap",
        mib=GUEST_MIB, timeout_s=240,
    )  # fmt: skip
    told = dict(re.findall(r"GUEST (\S+(?: exit)?) (\S+)", console))
    assert told.get("hog exit") == "0", console[-3000:]
    passes = re.findall(r"pass (\d+) bad (\d+)", console)
    assert len(passes) >= 3, console[-3000:]
    assert all(bad == "0" for _, bad in passes), passes
    # The guest had more pages than RAM, so they went out, and came back.
    assert int(told["pswpout"]) > (160 - GUEST_MIB) * 256, told
    assert int(told["pswpin"]) > (160 - GUEST_MIB) * 256, told
    assert told.get("swapoff") == "done"
    counters = node.client.status().counters
    print(f"{told}, {counters['nbd_write']} writes, {counters['nbd_read']} reads, {node.tiers()}")
    assert sum(pages > 0 for pages in node.tiers().values()) == 3, node.tiers()
