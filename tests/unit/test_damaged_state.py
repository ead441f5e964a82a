"""State that is damaged, of another version or not a node's is refused, and left as it is.

What a kill leaves is none of that, wherever it strikes.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from shards import objects, open_shard, pages, ram

from vswap.node.shard import Shard
from vswap.node.spaces import Limits, Spaces
from vswap.tiers.region import Region
from vswap.wire.errors import StateInvalid

SLOTS = np.arange(300, dtype=np.uint64)
_VERSION_AT, _BOOT_AT, _INCARNATION_AT, _NEXT_SERIAL_AT = 8, 48, 64, 72
_ROWS_AT, _ROW_BYTES = 4096, 64
_WORDS_AT = 4096


def _overwrite(file: str, at: int, data: bytes) -> Callable[[Path], None]:
    def damage(state: Path) -> None:
        with open(state / file, "r+b") as opened:
            opened.seek(at)
            opened.write(data)

    return damage


def _json(file: str, **changes: object) -> Callable[[Path], None]:
    def damage(state: Path) -> None:
        path = state / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def _cut(file: str) -> Callable[[Path], None]:
    def damage(state: Path) -> None:
        path = state / file
        path.write_text(path.read_text()[:-20])

    return damage


def _without(file: str) -> Callable[[Path], None]:
    return lambda state: (state / file).unlink()


def _only_tables(state: Path) -> None:
    for path in state.iterdir():
        if path.suffix != ".table":
            path.unlink()


def _rows_freed(state: Path) -> None:
    """Entries now point at segments that nobody has."""
    _overwrite("shard", _ROWS_AT, bytes(64 * _ROW_BYTES))(state)


def _other_table(state: Path) -> None:
    """In the place of ours."""
    (state / "space-1.table").write_bytes((state / "space-2.table").read_bytes())


def _forgets_a(state: Path) -> None:
    """An older ``spaces.json``, say."""
    found = json.loads((state / "spaces.json").read_text())["spaces"]
    _json("spaces.json", spaces=[space for space in found if space["name"] != "a"])(state)


DAMAGES = {
    "foreign": (_overwrite("shard", 0, b"SOMEWHAT"), "not the state of a vswap node"),
    "newer": (_overwrite("shard", _VERSION_AT, b"\x63\0\0\0"), "format version 99"),
    "shard gone": (_without("shard"), "is missing, though other files"),
    "shard empty": (lambda state: os.truncate(state / "shard", 0), "has 0 bytes"),
    "shard cut": (lambda state: os.truncate(state / "shard", 1 << 20), "has 1048576 bytes"),
    "shard zeroed": (_overwrite("shard", 0, bytes(4096)), "not the state of a vswap node"),
    "another boot": (_overwrite("shard", _BOOT_AT, b"\1" * 16), "its header"),
    "no life": (_overwrite("shard", _INCARNATION_AT, bytes(8)), "its header"),
    "serials back": (_overwrite("shard", _NEXT_SERIAL_AT, b"\1" + bytes(7)), "is next"),
    "all but tables gone": (_only_tables, "is missing, though other files"),
    "rows gone": (_rows_freed, "entries point at segments that do not exist"),
    "spaces newer": (_json("spaces.json", version=99), "format version 99"),
    "spaces cut": (_cut("spaces.json"), "missing or damaged"),
    "spaces gone": (_without("spaces.json"), "missing or damaged"),
    "spaces empty": (_json("spaces.json", spaces=[{}]), "damaged"),
    "tiers newer": (_json("tiers.json", version=99), "format version 99"),
    "tiers cut": (_cut("tiers.json"), "missing or damaged"),
    "tiers empty": (_json("tiers.json", tags=None), "damaged"),
    "space forgotten": (_forgets_a, "does not know space-1.table"),
    "table gone": (_without("space-1.table"), "missing"),
    "table empty": (lambda state: os.truncate(state / "space-1.table", 0), "has 0 bytes"),
    "table cut": (lambda state: os.truncate(state / "space-1.table", 8192), "has 8192 bytes"),
    "table zeroed": (_overwrite("space-1.table", 0, bytes(8192)), "does not begin as"),
    "entries zeroed": (_overwrite("space-1.table", _WORDS_AT, bytes(800)), "200 slots are in use"),
    "another table": (_other_table, "does not begin as"),
    "arena gone": (_without("tier-2.arena"), "is missing"),
    "arena shorter": (lambda state: os.truncate(state / "tier-2.arena", 1 << 19), "is shorter"),
}


def _content(state: Path) -> dict[str, bytes]:
    """Of what may be large only what is at the beginning."""
    files = {}
    for path in state.iterdir():
        with open(path, "rb") as file:
            files[path.name] = file.read(1 << 16)
    return files


@pytest.mark.parametrize("name", DAMAGES)
async def test_is_refused_and_left_as_it_is(name: str, tmp_path: Path) -> None:
    damage, says = DAMAGES[name]
    state, tiers = tmp_path / "s", (ram(mib=4), objects(tmp_path / "o"))
    async with open_shard(state, *tiers) as shard:
        await shard.pager.store(shard.spaces.create("a"), SLOTS, pages(SLOTS, 1))
        shard.spaces.create("b")
    damage(state)
    before = _content(state)
    with pytest.raises(StateInvalid, match=says):
        await Shard.open(state, tiers)
    assert _content(state) == before
    async with open_shard(state, *tiers, fresh=True) as shard:
        assert (shard.pages, len(shard.spaces)) == (0, 0)
        await shard.pager.store(shard.spaces.create("a"), SLOTS, pages(SLOTS, 2))


class _Killed(BaseException):
    pass


class _Killer:
    """Kills at the n-th line of what writes or erases state; not at all if there are fewer."""

    def __init__(self, line: int, names: str) -> None:
        self._left = line
        self._names = names.split()
        self.struck = False

    def __enter__(self) -> _Killer:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_name not in self._names or "vswap" not in frame.f_code.co_filename:
            return None
        if event == "line" and not self.struck:
            self._left -= 1
            if self._left < 0:
                self.struck = True
                raise _Killed
        return self._trace


@pytest.mark.parametrize("first", [True, False])
async def test_a_kill_while_a_shard_begins_is_no_damage(first: bool, tmp_path: Path) -> None:
    """The first one, or one that takes the place of another."""
    names = "_open erase _start replace_json begin_life"
    for line in range(0, 1000, 2):
        state = tmp_path / (str(line) if first else "s")
        state.mkdir(exist_ok=True)
        if not first:
            async with open_shard(state, ram(mib=4)) as shard:
                space = shard.spaces.create("a", exist_ok=True)
                await shard.pager.store(space, SLOTS, pages(SLOTS, 1))
        with _Killer(line, names) as killer, contextlib.suppress(_Killed):
            begun = await Shard.open(state, [ram(mib=4)], fresh=True)
        if not killer.struck:
            assert line > 40
            await begun.close()
            return
        async with open_shard(state, ram(mib=4)) as shard:
            # All of it is gone, or nothing, where nothing had been done yet.
            assert shard.pages == 300 * len(shard.spaces)


@pytest.mark.parametrize("what", ["create", "change", "remove"])
def test_a_kill_while_a_space_comes_or_goes_is_no_damage(what: str, tmp_path: Path) -> None:
    region, shard = Region(tmp_path), UUID(int=7)
    for line in range(1000):
        spaces = Spaces(region, shard, fresh=True)
        table = spaces.create("a", max_slots=100).table
        table.exchange(SLOTS[:9], SLOTS[1:10])
        spaces.create("b", max_slots=100)
        names = f"{what} __init__ grow _save replace_json close"
        with _Killer(line, names) as killer, contextlib.suppress(_Killed):
            match what:
                case "create":
                    spaces.create("c")
                case "change":
                    spaces.change("b", Limits(), max_slots=1 << 20)
                case "remove":
                    spaces.remove(spaces.get("b"))
        spaces = Spaces(region, shard, fresh=False)
        assert spaces.get("a").table.get(SLOTS[:10]).tolist() == [*range(1, 10), 0]
        spaces.create("c", exist_ok=True)
        if what != "remove":
            spaces.change("b", Limits(), max_slots=1 << 20)
        spaces.close()
        if not killer.struck:
            assert line > 15
            return
        for path in tmp_path.iterdir():
            path.unlink()
