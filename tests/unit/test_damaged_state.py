"""State that is damaged, of another version or not a node's is refused, and left as it is."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from shards import objects, open_shard, pages, ram

from vswap.node.shard import Shard
from vswap.wire.errors import StateInvalid

SLOTS = np.arange(300, dtype=np.uint64)
_VERSION_AT, _ROWS_AT, _ROW_BYTES = 8, 4096, 64


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


def _rows_freed(state: Path) -> None:
    """Entries now point at segments that nobody has."""
    _overwrite("shard", _ROWS_AT, bytes(64 * _ROW_BYTES))(state)


DAMAGES = {
    "foreign": (_overwrite("shard", 0, b"SOMEWHAT"), "not the state of a vswap node"),
    "newer": (_overwrite("shard", _VERSION_AT, b"\x63\0\0\0"), "format version 99"),
    "shard gone": (_without("shard"), "is missing, though tables are there"),
    "rows gone": (_rows_freed, "entries point at segments that do not exist"),
    "spaces newer": (_json("spaces.json", version=99), "format version 99"),
    "spaces cut": (_cut("spaces.json"), "missing or damaged"),
    "spaces gone": (_without("spaces.json"), "missing or damaged"),
    "spaces empty": (_json("spaces.json", spaces=[{}]), "damaged"),
    "tiers newer": (_json("tiers.json", version=99), "format version 99"),
    "tiers cut": (_cut("tiers.json"), "missing or damaged"),
    "tiers empty": (_json("tiers.json", tags=None), "damaged"),
    "table gone": (_without("space-1.table"), "missing"),
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
    damage(state)
    before = _content(state)
    with pytest.raises(StateInvalid, match=says):
        await Shard.open(state, tiers)
    assert _content(state) == before
    async with open_shard(state, *tiers, fresh=True) as shard:
        assert (shard.pages, len(shard.spaces)) == (0, 0)
        await shard.pager.store(shard.spaces.create("a"), SLOTS, pages(SLOTS, 2))
