"""`vswap attach` on a pretended machine: whatever step fails, what was done is undone in order."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from vswap.cli.device import attach as module
from vswap.cli.device import checks, driver, export, machine, memory_group
from vswap.cli.device.attach import Wanted, attach, detach
from vswap.cli.device.journal import Journal, Users
from vswap.cli.device.wanted import device_bytes
from vswap.wire.errors import Refused

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
        ["mkswap", "group", "relay", "nbd"],
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
