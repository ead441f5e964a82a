"""Undoing what `vswap attach` did: in order, from the file, however the first command ended."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vswap.cli.device.journal import Journal, Step, attached
from vswap.wire.errors import Refused, StateInvalid


def begin(directory: Path) -> None:
    with Journal("swap@n1", directory) as journal:
        for kind in ("directory", "mount", "loop"):
            journal.begin(kind, what=kind)
        journal.amend(journal.steps[1], pid=7)


def test_steps_are_undone_last_first_and_by_another_process(tmp_path: Path) -> None:
    begin(tmp_path)
    assert attached(tmp_path) == ["swap@n1"]
    undone: list[Step] = []
    with Journal("swap@n1", tmp_path) as journal:
        assert journal.find("mount") == {"kind": "mount", "what": "mount", "pid": 7}
        journal.undo(dict.fromkeys(("directory", "mount", "loop"), undone.append))
    assert [step["kind"] for step in undone] == ["loop", "mount", "directory"]
    assert attached(tmp_path) == []
    with Journal("swap@n1", tmp_path) as journal:
        assert journal.steps == []


def test_a_step_that_cannot_be_undone_keeps_what_is_under_it(tmp_path: Path) -> None:
    begin(tmp_path)
    undone: list[str] = []

    def busy(step: Step) -> None:
        raise Refused("still in use")

    undoers = {"loop": lambda s: undone.append("loop"), "mount": busy, "directory": busy}
    with Journal("swap@n1", tmp_path) as journal, pytest.raises(Refused, match="in use"):
        journal.undo(undoers)
    assert undone == ["loop"]
    with Journal("swap@n1", tmp_path) as journal:
        assert [step["kind"] for step in journal.steps] == ["directory", "mount"]
        journal.undo(dict.fromkeys(("directory", "mount"), lambda s: undone.append(s["kind"])))
    assert undone == ["loop", "mount", "directory"]


def test_two_commands_on_one_attachment_are_refused(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from vswap.cli.device.journal import Journal\n"
        f"with Journal('swap@n1', Path({str(tmp_path)!r})): print('held', flush=True); "
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(Refused, match="another command"), Journal("swap@n1", tmp_path):
            pass
        other.communicate(b"")
    with Journal("swap@n1", tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 1}', json.dumps({"version": 9})])
def test_a_damaged_file_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "swap@n1.json").write_text(content)
    with pytest.raises(StateInvalid), Journal("swap@n1", tmp_path):
        pass
