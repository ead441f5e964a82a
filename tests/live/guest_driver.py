"""What runs in the guest of test_guest_driver.py: a node, `vswap attach`, and a program that swaps.

Commands are forks of this process, since importing all of vswap takes long under emulation. A node
that is killed is a process that is killed all the same.
"""

from __future__ import annotations

import importlib
import mmap
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from nbd_node import run
from swapping import MIB, Hog, swapped_in

from vswap.cli import main
from vswap.cli.device import driver, machine
from vswap.cli.device.checks import locked_bytes
from vswap.cli.device.journal import DIRECTORY
from vswap.cli.device.memory_group import MemoryGroup, may_be_swapped
from vswap.client import Client

# `vswap run node` imports it late; here it is done once, for all that are forked.
importlib.import_module("vswap.node.daemon")

ATTACHED = DIRECTORY / "swap@here.json"
STATE = Path("/dev/shm/n")
SPACE_MIB, SWAP_MIB, HOG_MIB, LIMIT_MIB = 128, 64, 24, 16
CONFIG = f"""
[[tiers]]
name = "ram"
url = "ram://"
codec = "zstd:1"
capacity_bytes = {128 * MIB}
[[spaces]]
name = "swap"
max_slots = {SPACE_MIB * 256}
"""


def say(what: str) -> None:
    """With the seconds since the kernel began."""
    print(f"GUEST {time.monotonic():5.1f} s: {what}", flush=True)


# -------------------------------------------------------------------- commands


def start(*arguments: str, output: int, first: Callable[[], None] = lambda: None) -> int:
    """`vswap ARGUMENTS` in a process of its own, in which ``first`` is done first; its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = ["vswap", *arguments]
        first()
        main.main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        sys.stdout.flush()
        os._exit(code)


def vswap(*arguments: str, code: int = 0, first: Callable[[], None] = lambda: None) -> str:
    """What a command says, which ends with ``code``."""
    with tempfile.TemporaryFile("w+") as output:
        _, status = os.waitpid(start(*arguments, output=output.fileno(), first=first), 0)
        output.seek(0)
        told = output.read()
    assert os.waitstatus_to_exitcode(status) == code, (arguments, status, told)
    say(f"vswap {arguments[0]}: {told.strip()}")
    return told


class Node:
    """A node of this machine, with the space."""

    def __init__(self) -> None:
        Path("/run/node.toml").write_text(CONFIG)

    def start(self) -> None:
        with open("/run/node.log", "ab") as log:
            self._pid = start(
                "run", "node", "--name", "here", "--state", str(STATE), "--swap-safe",
                "--config", "/run/node.toml", "--listen", "127.0.0.1:7171", output=log.fileno(),
            )  # fmt: skip
        wait_for(lambda: (STATE / "address").exists(), Path("/run/node.log").read_text)
        say("a node")

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        (STATE / "address").unlink()


ATTACH = ("attach", "swap", "--size", f"{SWAP_MIB}MiB", "--swap",
          "--node-address", "127.0.0.1:7171")  # fmt: skip


# -------------------------------------------------------------------- what is there


def wait_for(what: Callable[[], bool], why: Callable[[], object], timeout_s: float = 120) -> None:
    until_s = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < until_s, why()
        time.sleep(0.05)


def relays() -> list[int]:
    found = subprocess.run(
        ["pgrep", "-f", "vswap.cli.device.relay"], capture_output=True, text=True
    )
    return [int(pid) for pid in found.stdout.split()]


def connected() -> list[str]:
    return [path.parent.name for path in Path("/sys/block").glob("nbd*/backend")]


def check_nothing_left() -> None:
    assert not machine.swaps()
    assert not connected()
    assert not ATTACHED.exists()
    assert not MemoryGroup.at("vswap-device-swap@here").path.exists()
    wait_for(lambda: not relays(), relays)


# -------------------------------------------------------------------- what is tested


def check_a_killed_attach() -> None:
    """Killed when it has just made the device, and has told nobody: detach undoes it."""
    connect = driver.connect

    def killed(*arguments: object, **how: object) -> str:
        connect(*arguments, **how)  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    def first() -> None:
        driver.connect = killed

    vswap(*ATTACH, first=first, code=-signal.SIGKILL)
    assert ATTACHED.exists()
    [name] = connected()
    check_a_disk(Path("/dev") / name)
    vswap("detach", "swap")
    check_nothing_left()


def check_a_disk(device: Path) -> None:
    fd = os.open(device, os.O_RDWR | os.O_DIRECT | os.O_DSYNC | os.O_EXCL)
    with mmap.mmap(-1, 8192) as page:
        page[:] = os.urandom(8192)
        there = SWAP_MIB * MIB - 8192
        assert os.pwritev(fd, [page], there) == 8192
        wrote = page[:]
        page[:] = bytes(8192)
        assert os.preadv(fd, [page], there) == 8192
        assert page[:] == wrote
    assert os.lseek(fd, 0, os.SEEK_END) == SWAP_MIB * MIB
    assert "in use" in vswap("detach", "swap", code=3)
    os.close(fd)


def check_swapping(node: Node) -> None:
    # What was written to the device before is still stored.
    attached = vswap(*ATTACH, "--overwrite")
    [device] = re.findall("^/dev/nbd.*$", attached, re.MULTILINE)
    assert machine.swaps() == [device]
    queue = Path("/sys/block") / Path(device).name / "queue"
    told = {
        name: (queue / name).read_text().strip()
        for name in ("logical_block_size", "write_cache", "fua", "discard_granularity")
    }
    assert told == {
        "logical_block_size": "4096", "write_cache": "write back", "fua": "1",
        "discard_granularity": "4096",
    }  # fmt: skip
    [relay] = relays()
    assert locked_bytes(relay)
    assert not may_be_swapped(relay)
    assert Path(f"/proc/{relay}/oom_score_adj").read_text() == "-1000\n"
    before = swapped_in()
    with Hog(Path("/hog"), Path("/run"), mib=HOG_MIB, limit_mib=LIMIT_MIB) as hog:
        hog.wait_for_passes(1, 240)
        say(f"{hog.told.strip()}; {swapped_in() - before} pages swapped in; the node is killed")
        node.kill()
        time.sleep(2)
        passes = hog.passes
        time.sleep(1)
        assert hog.passes == passes, "it needs no page of the node's"
        node.start()
        hog.wait_for_passes(passes + 1, 240)
        said = hog.finish().splitlines()
    say(f"{said[-1]}; {swapped_in() - before} pages swapped in")
    assert all(line.endswith(" bad 0") for line in said)
    assert swapped_in() - before > HOG_MIB * 256
    vswap("detach", "swap")
    check_nothing_left()


def check() -> None:

    assert driver.usable()
    node = Node()
    node.start()
    check_a_killed_attach()
    check_swapping(node)
    with Client("127.0.0.1:7171") as client:
        assert client.status().pages == 0, "what was swapped means nothing any more"
    bad = [line for line in run("dmesg").splitlines() if "error" in line.lower()]
    assert not bad, bad


if __name__ == "__main__":
    say("imported")
    check()
    say("all is well")
