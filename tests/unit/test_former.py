"""A node that begins anew leaves nothing of its earlier state on its own tiers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
from shards import objects, open_shard, pages

from vswap.node import former, handles
from vswap.node.differences import Checked
from vswap.node.seams import Seams
from vswap.node.shard import Shard
from vswap.node.spaces import Limits
from vswap.wire.errors import TierUnavailable

SLOTS = np.arange(300, dtype=np.uint64)
SEAMS = Seams(late_s=0.05)


def _files(disk: Path) -> set[Path]:
    return {path for path in disk.rglob("*") if path.is_file()}


def _damage(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(b"\7" * 8)


async def _until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def _away(*_: object) -> int:
    raise TierUnavailable("away")


async def _fill(state: Path, disk: Path) -> None:
    async with open_shard(state, objects(disk)) as shard:
        await shard.pager.store(shard.spaces.create("a", exist_ok=True), SLOTS, pages(SLOTS, 1))


async def test_a_fresh_start_deletes_what_the_state_before_had_on_its_own_tiers(
    tmp_path: Path,
) -> None:
    state, disk = tmp_path / "s", tmp_path / "o"
    await _fill(tmp_path / "other", disk)
    others = _files(disk)
    await _fill(state, disk)
    assert _files(disk) > others
    async with open_shard(state, objects(disk), fresh=True, seams=SEAMS) as shard:
        await _until(lambda: not list(state.glob("former-*")))
        assert _files(disk) == others, "of a node that may live"
        # It is only told of.
        seen = await shard.check(Checked())
        assert (seen.found, seen.skipped) == (0, [])
        assert len(seen.others) == 1
    async with open_shard(tmp_path / "other", objects(disk)) as shard:
        assert (await shard.pager.load(shard.spaces.get("a"), SLOTS) == pages(SLOTS, 1)).all()


async def test_it_is_made_up_for_where_a_tier_was_away_or_the_node_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, disk = tmp_path / "s", tmp_path / "o"

    for _ in range(2):
        await _fill(state, disk)
        with monkeypatch.context() as patch:
            patch.setattr(former, "_delete", _away)
            shard = await Shard.open(state, [objects(disk)], fresh=True)
            await asyncio.sleep(0.05)
            await shard.close()
    assert len(list(state.glob("former-*"))) == 2
    await _fill(state, disk)
    async with open_shard(state, objects(disk), seams=SEAMS) as shard:
        await _until(lambda: not list(state.glob("former-*")))
        # What the shard has itself stays.
        assert (await shard.pager.load(shard.spaces.get("a"), SLOTS) == pages(SLOTS, 1)).all()
        await shard.pager.free(shard.spaces.get("a"), SLOTS)
        await _until(lambda: not _files(disk))


async def test_a_tier_that_is_away_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does a file that only looks like a note."""
    state, away = tmp_path / "s", tmp_path / "away"
    tiers = (objects(away, "away", rank=1), objects(tmp_path / "o"))
    async with open_shard(state, *tiers) as shard:
        for tier in ("away", "objects"):
            space = shard.spaces.create(tier, limits=Limits(tiers=(tier,)))
            await shard.pager.store(space, SLOTS, pages(SLOTS, 1))
    with monkeypatch.context() as patch:
        patch.setattr(former, "_delete", _away)
        # A life that knows its tiers, so that the next one starts without them.
        async with open_shard(state, *tiers, fresh=True):
            pass
    assert len(list(state.glob("former-*"))) == 1
    (state / "former-x").touch()
    away.rename(tmp_path / "elsewhere")
    away.touch()
    async with open_shard(state, *tiers, seams=SEAMS) as shard:
        assert not shard.tiers.get("away").opened
        await _until(lambda: not _files(tmp_path / "o"))
        assert len(list(state.glob("former-*"))) == 2
        away.unlink()
        (tmp_path / "elsewhere").rename(away)
        await _until(lambda: not _files(away))
        await _until(lambda: [path.name for path in state.glob("former-*")] == ["former-x"])


async def test_a_state_of_an_earlier_boot_counts_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, disk = tmp_path / "s", tmp_path / "o"
    await _fill(state, disk)
    boot = uuid4().bytes
    monkeypatch.setattr("vswap.node.shard.boot_id", lambda: boot)
    async with open_shard(state, objects(disk), seams=SEAMS) as shard:
        assert shard.pages == 0
        await _until(lambda: not _files(disk))


@pytest.mark.parametrize("at", [0, 8, 20, 48])
async def test_a_damaged_header_names_nobody(at: int, tmp_path: Path) -> None:
    state, disk = tmp_path / "s", tmp_path / "o"
    await _fill(state, disk)
    _damage(state / handles.FILE, at)
    before = _files(disk)
    async with open_shard(state, objects(disk), fresh=True, seams=SEAMS) as shard:
        assert not list(state.glob("former-*"))
        assert _files(disk) == before
        assert len((await shard.check(Checked())).others) == 1
