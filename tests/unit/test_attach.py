"""`vswap attach` on a pretended machine: whatever step fails, what was done is undone in order."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import typer

from vswap.cli import options
from vswap.cli.device import attach as module
from vswap.cli.device import checks, commands, driver, execute, export, machine, memory_group
from vswap.cli.device.attach import Wanted, attach, detach
from vswap.cli.device.journal import Journal, Users
from vswap.cli.device.wanted import device_bytes, what_to_attach
from vswap.client import Client
from vswap.v1 import node_pb2
from vswap.wire.errors import InvalidRequest, Refused

PAGE = 4096
GIB = 2**30
DONE = {
    False: ["group", "nbdfuse", "losetup", "mkswap", "swapon"],
    True: ["group", "relay", "greeting", "connect", "mkswap", "swapon"],
}
"""By whether the kernel has the nbd driver."""
UNDONE = {
    False: ["swapoff", "losetup -d", "umount", "rmdir", "group away"],
    True: ["swapoff", "disconnect", "relay ends", "group away"],
}


class Pretended:
    """A machine on which one step fails; with or without the kernel's nbd driver."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fails: str = "", nbd: bool = False
    ) -> None:
        self.events: list[str] = []
        self.fails = fails
        self.error: BaseException = Refused("injected")
        states = ("group", "mounted", "loop", "relay", "connected", "swap")
        self.state = dict.fromkeys(states, False)
        mounts = tmp_path / "mounts"
        monkeypatch.setattr(module, "_MOUNTS", mounts)
        monkeypatch.setattr(driver, "usable", lambda: nbd)
        monkeypatch.setattr(driver, "connect", self.connect)
        monkeypatch.setattr(module, "_start", self.relay)
        monkeypatch.setattr(module, "_spare", lambda *_: None)
        monkeypatch.setattr(export, "take_greeting", self.greeting)
        monkeypatch.setattr(module, "_group_without_swap", self.group)
        monkeypatch.setattr(module, "_fuse", self.fuse)
        monkeypatch.setattr(machine, "need", lambda *_: None)
        monkeypatch.setattr(machine, "run", self.run)
        self.undo = {
            "swap": lambda step: self.undone("swapoff", "swap"),
            "loop": lambda step: self.undone("losetup -d", "loop"),
            "mount": lambda step: self.undone("umount", "mounted"),
            "directory": lambda step: self.rmdir(step["path"]),
            "nbd": lambda step: self.undone("disconnect", "connected"),
            "relay": lambda step: self.undone("relay ends", "relay"),
            "group": lambda step: self.undone("group away", "group"),
        }
        monkeypatch.setattr(module, "UNDO", self.undo)

    def step(self, name: str, state: str = "") -> None:
        if name == self.fails:
            raise self.error
        self.events.append(name)
        if state:
            self.state[state] = True

    def undone(self, name: str, state: str) -> None:
        # As the real ones: what was not done needs no undoing.
        if self.state[state]:
            self.events.append(name)
            self.state[state] = False

    def group(self, wanted: Wanted, journal: Journal) -> None:
        journal.begin("group", name="group")
        self.step("group", "group")

    def fuse(self, wanted: Wanted, journal: Journal, group: object) -> Path:
        mount = module._MOUNTS / wanted.name
        journal.begin("directory", path=str(mount))
        mount.mkdir(parents=True)
        step = journal.begin("mount", path=str(mount), pid=None)
        self.step("nbdfuse", "mounted")
        journal.amend(step, pid=7)
        return mount / "nbd"

    def relay(self, command: list[str], stdin: int, *_: object) -> SimpleNamespace:
        assert command[1:] == [
            "-m", "vswap.cli.device.relay", WANTED.nbd, WANTED.space, str(WANTED.size_bytes)
        ]  # fmt: skip
        assert socket.socket(fileno=os.dup(stdin)).family == socket.AF_UNIX
        self.step("relay", "relay")
        return SimpleNamespace(pid=7)

    def greeting(self, connection: socket.socket) -> export.Offer:
        self.step("greeting")
        return export.Offer(WANTED.size_bytes, 0x2D)

    def connect(self, connection: socket.socket, *, size_bytes: int, flags: int, owner: str) -> str:
        assert (size_bytes, flags, owner) == (WANTED.size_bytes, 0x2D, "vswap swap@n1")
        assert connection.getblocking()
        self.step("connect", "connected")
        return "/dev/nbd9"

    def rmdir(self, path: str) -> None:
        Path(path).rmdir()
        self.events.append("rmdir")

    def run(self, program: str, *_: str) -> str:
        self.step(program, {"losetup": "loop", "swapon": "swap"}.get(program, ""))
        return "/dev/loop9\n" if program == "losetup" else ""

    @property
    def clean(self) -> bool:
        return not any(self.state.values())


WANTED = Wanted(
    name="swap@n1", space="swap", nbd="unix:/nowhere", size_bytes=GIB, space_bytes=GIB,
    swap=True, priority=5,
)  # fmt: skip


@pytest.mark.parametrize("nbd", [False, True])
def test_all_is_done_and_undone_in_order(
    nbd: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretended = Pretended(monkeypatch, tmp_path, nbd=nbd)
    with Journal("swap@n1", tmp_path) as journal:
        assert attach(WANTED, journal) == ("/dev/nbd9" if nbd else "/dev/loop9")
    assert pretended.events == DONE[nbd]
    pretended.events.clear()
    with Journal("swap@n1", tmp_path) as journal:
        detach(journal)
    assert pretended.events == UNDONE[nbd]
    assert pretended.clean


@pytest.mark.parametrize("error", [Refused("injected"), KeyboardInterrupt(), OSError(5, "x")])
@pytest.mark.parametrize(("nbd", "fails"), [(nbd, name) for nbd in DONE for name in DONE[nbd]])
def test_a_step_that_fails_undoes_those_before(
    nbd: bool, fails: str, error: BaseException, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretended = Pretended(monkeypatch, tmp_path, fails, nbd)
    pretended.error = error
    with Journal("swap@n1", tmp_path) as journal, pytest.raises((type(error), Refused)):
        attach(WANTED, journal)
    undone = [event for event in pretended.events if event in UNDONE[nbd]]
    assert undone == [event for event in UNDONE[nbd] if event in undone]
    assert pretended.clean
    assert not list(tmp_path.glob("*.json"))
    assert not list((tmp_path / "mounts").glob("*"))


def test_the_steps_to_a_device_of_the_driver_are_on_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each before it is done; the device under a name by which the kernel knows it."""
    pretended = Pretended(monkeypatch, tmp_path, nbd=True)
    found: list[list[str]] = []
    step = pretended.step

    def noted(name: str, state: str = "") -> None:
        found.append([name, *(known["kind"] for known in journal.steps)])
        step(name, state)

    monkeypatch.setattr(pretended, "step", noted)
    with Journal("swap@n1", tmp_path) as journal:
        attach(WANTED, journal)
        assert journal.find("relay") == {"kind": "relay", "pid": 7}
        assert journal.find("nbd") == {"kind": "nbd", "owner": "vswap swap@n1"}
    assert found == [
        ["group", "group"],
        ["relay", "group", "relay"],
        ["greeting", "group", "relay"],
        ["connect", "group", "relay", "nbd"],
        ["mkswap", "group", "relay", "nbd", "swap"],
        ["swapon", "group", "relay", "nbd", "swap"],
    ]


def test_what_cannot_be_undone_is_told_and_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretended = Pretended(monkeypatch, tmp_path, "swapon")

    def busy(step: object) -> None:
        raise Refused("still in use")

    pretended.undo["loop"], loop_off = busy, pretended.undo["loop"]
    told = pytest.raises(Refused, match=r"injected.*still in use.*vswap detach swap")
    with Journal("swap@n1", tmp_path) as journal, told:
        attach(WANTED, journal)
    pretended.undo["loop"] = loop_off
    with Journal("swap@n1", tmp_path) as journal:
        assert [step["kind"] for step in journal.steps] == ["group", "directory", "mount", "loop"]
        detach(journal)
    assert pretended.clean


def test_a_sigterm_undoes_like_a_ctrl_c() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), machine.ended_politely():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_last_user_is_alone(tmp_path: Path) -> None:
    with Users("swap@n1", tmp_path) as first:
        with Users("swap@n1", tmp_path) as second:
            assert first.others()
            assert second.others()
        assert not first.others()


def test_missing_programs_are_told_with_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda program: None)
    with pytest.raises(Refused, match="apt-get install fuse3 libnbd-bin"):
        machine.need("nbdfuse", "fusermount3")


def test_only_root_attaches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Refused, match="root"):
        machine.need_root()


def test_swap_on_a_huge_space_takes_a_part_of_it() -> None:
    assert device_bytes(1024 * GIB, None, swap=True) == 64 * GIB
    assert device_bytes(1024 * GIB, None, swap=False) == 1024 * GIB
    assert device_bytes(1024 * GIB, 128 * GIB, swap=True) == 128 * GIB
    assert device_bytes(GIB, 10_000, swap=False) == 8192


class Node:
    """What a client tells of a node on another machine, and what it was asked to create."""

    def __init__(self) -> None:
        self.known: list[node_pb2.Space] = []

    def status(self) -> node_pb2.NodeStatus:
        return node_pb2.NodeStatus(name="n1", nbd=["192.0.2.1:10809"])

    def spaces(self) -> list[node_pb2.Space]:
        return self.known

    def create_space(self, name: str, page_bytes: int, max_slots: int) -> None:
        self.known.append(node_pb2.Space(name=name, page_bytes=page_bytes, max_slots=max_slots))


def wanted_of(node: Node, size: int | None, *, swap: bool = False) -> Wanted:
    client = cast(Client, node)
    return what_to_attach(client, "swap", size, swap=swap, priority=None, strict=True)


@pytest.mark.parametrize(
    ("size", "swap"), [(0, False), (1024, False), (4095, False), (0, True), (40_959, True)]
)
def test_a_size_of_less_than_there_can_be(size: int, swap: bool) -> None:
    node = Node()
    with pytest.raises(InvalidRequest, match="at least"):
        wanted_of(node, size, swap=swap)
    assert not node.known, "nothing was created"
    node.create_space("swap", PAGE, 1000)
    with pytest.raises(InvalidRequest, match="at least"):
        wanted_of(node, size, swap=swap)


def test_a_size_that_is_no_multiple_of_a_page_is_rounded_down_everywhere() -> None:
    node = Node()
    wanted = wanted_of(node, 2 * PAGE - 1)
    assert [space.max_slots for space in node.known] == [1]
    assert (wanted.size_bytes, wanted.space_bytes) == (PAGE, PAGE)
    assert wanted_of(node, 2 * PAGE - 1).size_bytes == PAGE, "and with the space that is there now"
    with pytest.raises(Refused, match="grow"):
        wanted_of(node, 2 * PAGE)


def test_swap_needs_a_space_that_mkswap_takes() -> None:
    node = Node()
    node.create_space("swap", PAGE, 9)
    assert wanted_of(node, None).size_bytes == 9 * PAGE
    with pytest.raises(InvalidRequest, match="at least"):
        wanted_of(node, None, swap=True)


def swap_attached(command: str, node: Node, *, overwrite: bool) -> None:
    if command == "attach":
        commands.attach("swap", swap=True, overwrite=overwrite)
        return
    with pytest.raises(typer.Exit):
        execute.execute(["true"], PAGE, "swap", overwrite=overwrite)


@pytest.mark.parametrize("command", ["attach", "exec"])
def test_swap_destroys_nothing_without_being_told_so(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    made: list[str] = []

    def make(wanted: Wanted, journal: Journal) -> str:
        made.append(wanted.name)
        journal.log.write_text("vswap: no io flusher: not permitted\n")
        return "/dev/loop9"

    node = Node()
    node.create_space("swap", PAGE, 1000)
    monkeypatch.setattr(options, "node_client", lambda *_: nullcontext(node))
    monkeypatch.setattr(machine, "need_root", lambda: None)
    monkeypatch.setattr(module, "need_programs", lambda *, swap: None)
    monkeypatch.setattr(module, "attach", make)
    monkeypatch.setattr(module, "detach", lambda journal: journal.undo(module.UNDO))
    monkeypatch.setattr(execute, "_check_swapping", lambda *_: None)
    monkeypatch.setattr(execute, "_run_in_group", lambda *_: 0)
    for at in (commands, execute):
        monkeypatch.setattr(at, "Journal", partial(Journal, directory=tmp_path))
        monkeypatch.setattr(at, "Users", partial(Users, directory=tmp_path))
    swap_attached(command, node, overwrite=False)
    node.known[0].pages = 1
    with pytest.raises(Refused, match="--overwrite"):
        swap_attached(command, node, overwrite=False)
    assert made == ["swap@n1"]
    assert not list(tmp_path.glob("*.json"))
    swap_attached(command, node, overwrite=True)
    assert made == ["swap@n1"] * 2
    assert capsys.readouterr().err.count("relay: no io flusher: not permitted") == 2


@pytest.mark.parametrize("swapping", [True, False])
@pytest.mark.parametrize("header", [b"SWAPSPACE2", b"somebody's"])
def test_what_mkswap_made_is_freed_and_nothing_else(
    header: bytes, swapping: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also of an `attach` that was killed between mkswap and swapon."""
    device = tmp_path / "device"
    device.write_bytes(header.rjust(PAGE) + bytes(PAGE))
    ran: list[str] = []
    monkeypatch.setattr(machine, "run", lambda *command, **_: ran.append(command[0]))
    monkeypatch.setattr(machine, "swaps", lambda: [str(device)] * swapping)
    machine.swap_off(str(device))
    ours = swapping or header == b"SWAPSPACE2"
    assert ran == ["swapoff"] * swapping + ["blkdiscard"] * ours
    monkeypatch.setattr(machine, "swaps", list)
    ran.clear()
    machine.swap_off(str(tmp_path / "gone"))
    assert not ran


@pytest.mark.parametrize(
    ("groups", "files", "may"),
    [
        ("0::/a/b\n", {}, True),
        ("0::/a/b\n", {"a/b/memory.swap.max": "max\n"}, True),
        ("0::/a/b\n", {"a/b/memory.swap.max": "0\n"}, False),
        ("0::/a/b\n", {"a/memory.swap.max": "0\n", "a/b/memory.swap.max": "max\n"}, False),
        ("4:cpu:/x\n3:memory:/a\n0::/\n", {"memory/a/memory.swappiness": "60\n"}, True),
        ("4:cpu:/x\n3:memory:/a\n0::/\n", {"memory/a/memory.swappiness": "0\n"}, False),
    ],
)
def test_which_groups_keep_a_process_in_ram(
    groups: str, files: dict[str, str], may: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    told = tmp_path / "told"
    told.write_text(groups)
    monkeypatch.setattr(memory_group, "_V1", tmp_path / "memory")
    monkeypatch.setattr(memory_group, "_V2", tmp_path)
    assert memory_group.groups_let_swap(told) is may


def test_a_node_on_this_machine_must_stay_in_ram(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.could_wait_for_itself(0) == "", "it is on another machine"
    assert checks.missing(0, None) == []
    for locked, may, safe in ((0, True, False), (4096, True, True), (0, False, True)):
        monkeypatch.setattr(checks, "locked_bytes", lambda pid, locked=locked: locked)
        monkeypatch.setattr(checks, "may_be_swapped", lambda pid, may=may: may)
        told = checks.could_wait_for_itself(os.getpid())
        assert ("--swap-safe" in told) != safe


@pytest.mark.parametrize("locked", [0, 4096])
def test_what_a_node_lacks_is_told(
    locked: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(checks, "locked_bytes", lambda pid: locked)
    monkeypatch.setattr(checks, "may_be_swapped", lambda pid: True)
    monkeypatch.setattr(checks, "is_swappable", lambda path, mounts: path == tmp_path)
    for flusher in (True, False):
        monkeypatch.setattr(checks, "is_io_flusher", lambda told, flusher=flusher: flusher)
        told = "; ".join(checks.missing(os.getpid(), None))
        assert ("PR_SET_IO_FLUSHER" in told) != flusher
        assert ("CAP_SYS_RESOURCE" in told) == (bool(locked) and not flusher)
        assert "noswap" not in told
    told = checks.missing(os.getpid(), tmp_path)[-1]
    assert "noswap" in told
    assert ("while it restarts" in told) == bool(locked)


@pytest.mark.parametrize(
    ("flags", "is_one"), [(0x400000, False), (0x80000, False), (0x100000, False), (0x580000, True)]
)
def test_who_does_io_for_the_kernel(flags: int, is_one: bool, tmp_path: Path) -> None:
    told = tmp_path / "stat"
    told.write_text(f"7 (a ) b) S 1 7 7 0 -1 {flags} 99 0")
    assert checks.is_io_flusher(told) == is_one
    assert not checks.is_io_flusher(Path("/proc/self/stat"))


def test_which_directories_can_be_swapped_out(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "root / ext4 rw 0 0\ntmpfs /shm tmpfs rw,relatime 0 0\ntmpfs /shm/n tmpfs rw,noswap 0 0\n"
    )
    swappable = {path: checks.is_swappable(Path(path), mounts) for path in ("/", "/shm", "/shm/n")}
    assert swappable == {"/": False, "/shm": True, "/shm/n": False}


RELAY = """
from vswap.cli.device import relay
relay.harden = lambda: {"io flusher": "not permitted"}
raise SystemExit(relay.main("unix:/nowhere", "swap", "4096"))
"""


def test_what_a_relay_lacks_is_told(tmp_path: Path) -> None:
    """By the relay itself, to its log."""
    log = tmp_path / "log"
    mine, its = socket.socketpair()
    with mine, its, open(log, "w") as output:
        command = [sys.executable, "-c", RELAY]
        done = subprocess.run(command, stdin=its.fileno(), stderr=output, check=False)
        assert done.returncode == 1
    assert checks.relay_lacks(log) == ["of the device's relay: no io flusher: not permitted"]


def test_groups_of_version_2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory_group, "_V1", tmp_path / "memory")
    monkeypatch.setattr(memory_group, "_V2", tmp_path)
    with pytest.raises(Refused, match="no memory control groups"):
        memory_group.MemoryGroup.at("some")
    (tmp_path / "cgroup.subtree_control").write_text("cpu\n")
    group = memory_group.MemoryGroup.at("some")
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+memory"
    group.make(4096)
    group.forbid_swap()
    group.enter(7)
    told = {file.name: file.read_text() for file in (tmp_path / "some").iterdir()}
    assert told == {"memory.max": "4096", "memory.swap.max": "0", "cgroup.procs": "7"}
