"""A guest machine under QEMU, for live tests: a kernel of Debian's, and an initramfs of ours."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from nbd_node import run

FASTER = "mitigations=off no5lvl no_timer_check"
"""Leaves out what costs an emulated processor much. And a timer that is late on a busy host is not
taken for a broken one."""


def fetch_kernel(package: str, where: Path) -> Path:
    """Unpacks Debian's ``package`` into ``where``, as ``boot/`` and ``lib/modules/``."""
    assert platform.machine() == "x86_64", "the guest tests know x86-64 guests only"
    found = re.search(r"Depends: (linux-image-\S+)", run("apt-cache", "depends", package))
    assert found, package
    subprocess.run(["apt-get", "-qq", "download", found[1]], cwd=where, check=True)
    [archive] = where.glob("*.deb")
    run("dpkg-deb", "-x", archive, where)
    return where


def add_modules(kernel: Path, root: Path, *names: str) -> None:
    """Copies drivers, and those that they need, to where modprobe finds them."""
    [source] = (kernel / "lib/modules").iterdir()
    target = root / "lib/modules" / source.name
    target.mkdir(parents=True, exist_ok=True)
    wanted = list(names)
    while wanted:
        name = wanted.pop()
        [path] = source.rglob(f"{name}.ko")
        shutil.copy(path, target)
        wanted += run("modinfo", "-F", "depends", path).strip().replace(",", " ").split()
    run("depmod", "-b", root, source.name)


def pack(root: Path, init: Path) -> Path:
    """An initramfs of what is in ``root``, busybox, and ``init`` as its first process."""
    (root / "bin").mkdir(exist_ok=True)
    shutil.copy("/bin/busybox", root / "bin/busybox")
    shutil.copy(init, root / "init")
    (root / "init").chmod(0o755)
    packed = root.with_suffix(".cpio")
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    with open(packed, "wb") as file:
        subprocess.run(
            ["cpio", "-o", "-H", "newc", "--quiet"], input=names.encode(), stdout=file, cwd=root,
            check=True,
        )  # fmt: skip
    return packed


def boot(kernel: Path, initramfs: Path, *options: str, mib: int, timeout_s: float) -> str:
    """Runs a guest until it powers off; returns its console."""
    [image] = (kernel / "boot").glob("vmlinuz-*")
    log = initramfs.with_suffix(".log")
    command = [
        "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-m", f"{mib}M", "-nographic",
        "-no-reboot", "-nodefaults", "-serial", "stdio", "-kernel", str(image),
        "-initrd", str(initramfs), "-append", f"console=ttyS0 quiet panic=-1 {FASTER}", *options,
    ]  # fmt: skip
    with open(log, "wb") as console:
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=console, stderr=console, check=False,
                timeout=timeout_s,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            said = log.read_text(errors="replace")[-3000:]
            pytest.fail(f"the guest did not end within {timeout_s:.0f} s: {said}")
    told = log.read_text(errors="replace")
    assert done.returncode == 0, told[-3000:]
    return told
