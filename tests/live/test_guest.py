"""A guest kernel swaps on a virtio disk that is a space: QEMU is the NBD client."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from nbd_node import MIB, NbdNode, run
from swapping import build

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]

HERE = Path(__file__).parent
MODULES = ("virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci",
           "virtio_blk")  # fmt: skip
GUEST_MIB = 96


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with Debian's kernel for clouds, as ``boot/`` and ``lib/modules/``."""
    assert platform.machine() == "x86_64", "the guest test knows x86-64 guests only"
    where = tmp_path_factory.mktemp("kernel")
    depends = run("apt-cache", "depends", "linux-image-cloud-amd64")
    found = re.search(r"Depends: (linux-image-\S+)", depends)
    assert found, depends
    subprocess.run(["apt-get", "-qq", "download", found[1]], cwd=where, check=True)
    [package] = where.glob("*.deb")
    run("dpkg-deb", "-x", package, where)
    return where


@pytest.fixture(scope="module")
def initramfs(kernel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the guest runs: busybox, the drivers of its disk, the hog."""
    root = tmp_path_factory.mktemp("root")
    for name in ("bin", "modules"):
        (root / name).mkdir()
    shutil.copy("/bin/busybox", root / "bin/busybox")
    shutil.copy(HERE / "guest_init.sh", root / "init")
    (root / "init").chmod(0o755)
    for module in MODULES:
        [path] = (kernel / "lib/modules").rglob(f"{module}.ko")
        shutil.copy(path, root / "modules")
    build(root, "-static")
    packed = root.parent / "initramfs"
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    with open(packed, "wb") as file:
        subprocess.run(
            ["cpio", "-o", "-H", "newc", "--quiet"], input=names.encode(), stdout=file, cwd=root,
            check=True,
        )  # fmt: skip
    return packed


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NbdNode]:
    made = NbdNode(tmp_path, 512 * MIB)
    yield made
    made.close()


def test_a_guest_swaps_on_a_space(node: NbdNode, kernel: Path, initramfs: Path) -> None:
    assert os.geteuid() == 0
    [image] = (kernel / "boot").glob("vmlinuz-*")
    console = run(
        "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-m", f"{GUEST_MIB}M", "-nographic",
        "-no-reboot", "-nodefaults", "-serial", "stdio", "-kernel", image, "-initrd", initramfs,
        "-append", "console=ttyS0 quiet panic=-1", "-drive",
        f"file=nbd+unix:///disk?socket={node.socket},if=virtio,format=raw,discard=unmap",
        timeout_s=240,
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
