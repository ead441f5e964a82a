"""Spaces when their file cannot be written, and first starts that were cut short."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from shards import open_shard, pages, ram, slots

from vswap.node.handles import Handles, boot_id, erase
from vswap.node.spaces import Limits
from vswap.tiers.region import Region
from vswap.wire.errors import OutOfTiers, StateInvalid, UnknownSpace


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


async def test_a_change_that_cannot_be_written_did_not_happen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_shard(tmp_path / "s", ram()) as shard:
        kept = shard.spaces.create("kept", max_slots=100)
        await shard.pager.store(kept, slots(1), pages(slots(1), 1))
        files = sorted(path.name for path in (tmp_path / "s").iterdir())
        with monkeypatch.context() as patch:
            patch.setattr("vswap.node.spaces.json.dump", full)
            with pytest.raises(OutOfTiers, match="is full"):
                shard.spaces.create("new")
            with pytest.raises(OutOfTiers):
                shard.spaces.change("kept", Limits(quota_bytes=1), max_slots=1 << 21)
            with pytest.raises(OutOfTiers):
                await shard.delete_space("kept")
        assert sorted(path.name for path in (tmp_path / "s").iterdir()) == files
        assert (kept.limits, kept.max_slots) == (Limits(), 100)
        with pytest.raises(UnknownSpace):
            shard.spaces.get("new")
        # The space lives on, and what failed can be done again.
        await shard.pager.store(kept, slots(2), pages(slots(2), 1))
        shard.spaces.create("new")
        shard.spaces.change("kept", Limits(), max_slots=1 << 21)
    async with open_shard(tmp_path / "s", ram()) as shard:
        assert {space.name: space.max_slots for space in shard.spaces}["kept"] == 1 << 21
        assert await shard.delete_space("kept") == 1


async def test_a_kill_between_the_table_and_the_file_only_delays_the_growth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_shard(tmp_path / "s", ram()) as shard:
        space = shard.spaces.create("s", max_slots=100)
        await shard.pager.store(space, slots(99), pages(slots(99), 1))

        def kill() -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(shard.spaces, "_save", kill)
            shard.spaces.change("s", Limits(), max_slots=1 << 21)
    async with open_shard(tmp_path / "s", ram()) as shard:
        space = shard.spaces.change("s", Limits(), max_slots=1 << 21)
        far = slots(99, (1 << 21) - 1)
        await shard.pager.store(space, far[1:], pages(far[1:], 1))
        assert (await shard.pager.load(space, far) == pages(far, 1)).all()


async def test_half_of_a_first_start_is_begun_anew(tmp_path: Path) -> None:
    directory = tmp_path / "s"
    directory.mkdir()
    (directory / "unbegun").touch()
    (directory / "shard").touch()
    async with open_shard(directory, ram()) as shard:
        assert shard.incarnation == 1
    # The header stands, nothing else does yet.
    erase(Region(directory))
    Handles(Region(directory), fresh=(uuid4(), boot_id())).close()
    async with open_shard(directory, ram()) as shard:
        assert shard.incarnation == 1
    # From the first life on a missing file is damage.
    (directory / "spaces.json").unlink()
    with pytest.raises(StateInvalid, match="--fresh"):
        async with open_shard(directory, ram()):
            pytest.fail("opened")


async def test_a_ram_tier_keeps_its_size_while_it_holds_pages(tmp_path: Path) -> None:
    where = slots(*range(300))
    async with open_shard(tmp_path / "s", ram(mib=8)) as shard:
        await shard.pager.store(shard.spaces.create("s"), where, pages(where, 1))
    for mib in (4, 64):
        with pytest.raises(StateInvalid, match="set capacity_bytes back"):
            async with open_shard(tmp_path / "s", ram(mib=mib)):
                pytest.fail("opened")
    # A little more is the same blocks and some more of them.
    async with open_shard(tmp_path / "s", ram(mib=9)) as shard:
        assert (await shard.pager.load(shard.spaces.get("s"), where) == pages(where, 1)).all()
