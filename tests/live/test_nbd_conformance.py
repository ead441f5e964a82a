"""Other people's NBD clients on a node whose pages lie in RAM, compressed RAM and on disk."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from nbd_node import MIB, NbdNode, run

pytestmark = [pytest.mark.live, pytest.mark.timeout(240)]

SIZE = 256 * MIB


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source tree: Python's own library."""
    where = tmp_path_factory.mktemp("source") / "tree"
    ignored = shutil.ignore_patterns("site-packages", "__pycache__", "test", "config-*")
    shutil.copytree(sysconfig.get_path("stdlib"), where, symlinks=True, ignore=ignored)
    return where


@pytest.fixture
def node(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[NbdNode]:
    made = NbdNode(tmp_path, SIZE, fastest=getattr(request, "param", "ram"))
    yield made
    made.close()


JOBS = {
    "random-4k": "rw=randwrite bs=4k iodepth=32",
    "sequential-4k": "rw=write bs=4k iodepth=32",
    "random-128k": "rw=randwrite bs=128k iodepth=16",
    "sequential-1m": "rw=write bs=1m iodepth=8",
    "mixed": "rw=randrw bsrange=4k-1m iodepth=16",
    "unaligned": "rw=randwrite bsrange=512-64k bs_unaligned=1 iodepth=16",
    "odd-offsets": "rw=write bs=3000 blockalign=1000 iodepth=8",
}


@pytest.mark.parametrize(("node", "where"), [("ram", "unix"), ("zram", "tcp")], indirect=["node"])
def test_fio_finds_what_it_wrote(node: NbdNode, where: str) -> None:
    """Compressible and not, and every byte of it checked with its checksum."""
    for name, job in JOBS.items():
        # Half of the buffer is random: some of it compresses, none of it away.
        out = run(
            "fio", f"--name={name}", "--ioengine=nbd", f"--uri={getattr(node, where)}",
            "--verify=crc32c", "--verify_fatal=1", "--verify_backlog=0",
            "--verify_state_save=0", f"--size={32 * MIB}",
            "--buffer_compress_percentage=50", "--refill_buffers", "--output-format=json",
            *(f"--{option}" for option in job.split()),
        )  # fmt: skip
        result = json.loads(out[out.index("{") :])["jobs"][0]
        assert result["error"] == 0
        assert result["read"]["total_ios"] > 0, "nothing was verified"
    assert all(pages > 0 for pages in node.tiers().values()), node.tiers()


def test_nbdcopy_brings_back_an_image(node: NbdNode, tree: Path, tmp_path: Path) -> None:
    image, back = tmp_path / "image", tmp_path / "back"
    with open(image, "wb") as file:
        file.truncate(SIZE)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-d", tree, image)
    run("nbdcopy", image, node.unix)
    run("nbdcopy", node.tcp, back)
    run("cmp", image, back)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", image, node.unix)
    # Holes are holes: not everything was stored.
    assert 0 < node.pages < SIZE // 4096


def test_qemu_io(node: NbdNode) -> None:
    def qemu_io(*commands: str) -> str:
        out = run("qemu-io", "-f", "raw", *(f"-c{command}" for command in commands), node.unix)
        assert "Pattern verification failed" not in out, out
        return out

    qemu_io("write -P 0x11 0 1M", "write -P 0x22 1M 512", "write -P 0x33 5000 3000")
    qemu_io(
        "read -P 0x11 0 5000", "read -P 0x33 5000 3000", "read -P 0x11 8000 100k",
        "read -P 0x22 1M 512", "read -P 0 1049088 4096",
    )  # fmt: skip
    qemu_io("write -z 4096 8192", "read -P 0 4096 8192", "write -z -u 64k 64k", "read -P 0 64k 64k")
    qemu_io("discard 256k 256k", "read -P 0 256k 256k", "read -P 0x11 512k 1024")
    qemu_io("aio_write -P 0x44 2M 4M", "aio_write -P 0x55 8M 8M", "aio_flush",
            "read -P 0x44 2M 4M", "read -P 0x55 8M 8M")  # fmt: skip
    qemu_io("write -f -P 0x66 100M 64k", "flush", "read -P 0x66 100M 64k")


def test_nbdinfo_tells_exports_and_extents(node: NbdNode) -> None:
    told = json.loads(run("nbdinfo", "--json", node.unix))["exports"][0]
    assert told["export-size"] == SIZE
    assert {"base:allocation", "vswap:tier"} <= set(told["contexts"])
    for can in ("can_trim", "can_zero", "can_fast_zero", "can_flush", "can_fua", "can_cache",
                "can_multi_conn", "can_df"):  # fmt: skip
        assert told[can], can
    assert 'export="disk"' in run("nbdinfo", "--list", node.unix)
    pattern = random.Random(1).randbytes(4 * MIB)
    image = node.daemon.state.parent / "pattern"
    image.write_bytes(pattern)
    run("nbdcopy", image, node.unix)
    run("qemu-io", "-f", "raw", "-c", "discard 1M 1M", node.unix)
    base = [line.split()[:3] for line in run("nbdinfo", "--map", node.unix).splitlines()]
    assert base == [
        ["0", str(MIB), "0"], [str(MIB), str(MIB), "3"], [str(2 * MIB), str(2 * MIB), "0"],
        [str(4 * MIB), str(SIZE - 4 * MIB), "3"],
    ]  # fmt: skip
    tiers = run("nbdinfo", "--map=vswap:tier", node.unix).splitlines()
    assert sum(int(line.split()[1]) for line in tiers) == SIZE
    assert {int(line.split()[2]) for line in tiers} - {0}, tiers


@pytest.fixture
def disk(node: NbdNode, tmp_path: Path) -> Iterator[str]:
    """The space as a block device of this machine."""
    where = tmp_path / "fuse"
    where.mkdir()
    process = subprocess.Popen(["nbdfuse", str(where / "nbd"), node.unix])
    device = ""
    try:
        until_s = time.monotonic() + 10
        while not (where / "nbd").exists():
            assert time.monotonic() < until_s
            assert process.poll() is None
            time.sleep(0.05)
        device = run("losetup", "--direct-io=on", "-f", "--show", where / "nbd").strip()
        yield device
    finally:
        if device:
            run("losetup", "-d", device)
        subprocess.run(["fusermount3", "-u", where], check=False)
        process.wait(10)


def test_a_file_system_lives_on_it(node: NbdNode, disk: str, tree: Path, tmp_path: Path) -> None:
    """Copied to, trimmed, unmounted, mounted again, compared and checked."""
    mount = tmp_path / "mount"
    mount.mkdir()
    run("mkfs.ext4", "-q", disk)
    run("mount", disk, mount)
    try:
        run("cp", "-a", tree, mount / "a")
        run("cp", "-a", tree, mount / "b")
        run("sync")
        full = node.pages
        run("rm", "-r", mount / "b")
        run("sync")
        run("fstrim", mount)
        assert node.pages < full * 0.75, "what a deleted file held was not freed"
        run("umount", mount)
        run("mount", disk, mount)
        run("diff", "-r", tree, mount / "a")
    finally:
        subprocess.run(["umount", mount], check=False)
    run("fsck.ext4", "-f", "-n", disk)
