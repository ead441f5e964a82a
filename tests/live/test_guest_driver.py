"""A guest kernel swaps through its own nbd driver, which few test machines have.

The guest sees the files of this machine, so it runs this very Python and this very vswap: a node,
`vswap attach` and what swaps are all in there (guest_driver.py).
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from guest import add_modules, boot, fetch_kernel, pack
from swapping import build

pytestmark = [pytest.mark.live, pytest.mark.timeout(700)]

HERE = Path(__file__).parent
PROGRAM = HERE / "guest_driver.py"
MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay", "nbd")


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not the one for clouds, which cannot see the files of its host."""
    return fetch_kernel("linux-image-amd64", tmp_path_factory.mktemp("kernel"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of the program, wherever Python and vswap come from here."""
    found = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)]),
        "PYTHONPYCACHEPREFIX": str(tmp_path_factory.mktemp("compiled")),
        "OPENBLAS_NUM_THREADS": "1",
    }
    # Compiles what it imports: under emulation that takes long.
    imports = [sys.executable, "-c", "import guest_driver, vswap.cli.device.relay"]
    subprocess.run(imports, env=found, check=True)
    return found


@pytest.fixture(scope="module")
def initramfs(
    kernel: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    root = tmp_path_factory.mktemp("root")
    add_modules(kernel, root, *MODULES)
    build(root, "-static")
    lines = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    lines.append(f"set -- {shlex.quote(sys.executable)} {shlex.quote(str(PROGRAM))}")
    (root / "environment").write_text("\n".join(lines) + "\n")
    return pack(root, HERE / "guest_driver_init.sh")


def test_a_kernel_swaps_through_its_nbd_driver(kernel: Path, initramfs: Path) -> None:
    assert os.geteuid() == 0
    console = boot(
        kernel, initramfs, "-smp", "2", "-cpu", "max",
        "-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap",
        "-device", "virtio-9p-pci,fsdev=host,mount_tag=host",
        mib=1024, timeout_s=600,
    )  # fmt: skip
    print("\n".join(re.findall(r"GUEST .*", console)))
    assert "GUEST exit 0" in console, console[-6000:]
