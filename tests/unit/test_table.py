"""The swap table: sparse, punched when empty, and right."""

from __future__ import annotations

import tempfile
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vswap.node.table import CHUNK_SLOTS, MAX_SLOTS, SwapTable
from vswap.tiers.region import Region
from vswap.wire.errors import StateInvalid

SHARD = UUID(int=7)


def slots(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.uint64)


def put(table: SwapTable, where: np.ndarray, words: np.ndarray) -> None:
    table.reserve(where)
    table.set(where, words, table.get(where))


@given(
    st.lists(
        st.tuples(st.sets(st.integers(0, 5 * CHUNK_SLOTS - 1), max_size=30), st.booleans()),
        max_size=20,
    )
)
@settings(deadline=None, max_examples=60)
def test_behaves_like_a_dict(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[set[int], bool]]
) -> None:
    region = Region(tmp_path_factory.mktemp("t"))
    table = SwapTable(region, "t", 5 * CHUNK_SLOTS, SHARD, create=True)
    model: dict[int, int] = {}
    for turn, (chosen, free) in enumerate(steps):
        where = slots(*sorted(chosen))
        words = np.zeros(len(where), np.uint64) if free else where + np.uint64(turn + 1)
        put(table, where, words)
        model.update(zip(where.tolist(), words.tolist(), strict=True))
        every = np.arange(5 * CHUNK_SLOTS, dtype=np.uint64)
        expected = np.zeros(len(every), np.uint64)
        for slot, word in model.items():
            expected[slot] = word
        assert (table.get(every) == expected).all()
        used = {slot // CHUNK_SLOTS for slot, word in model.items() if word}
        assert used <= set(table.chunks().tolist())
    table.close()


def test_an_empty_table_of_the_largest_size_costs_a_page_even_when_read(tmp_path: Path) -> None:
    table = SwapTable(Region(tmp_path), "t", MAX_SLOTS, SHARD, create=True)
    rng = np.random.default_rng(0)
    for _ in range(100):
        assert not table.get(rng.integers(0, MAX_SLOTS, 4096).astype(np.uint64)).any()
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir()) == 4096
    table.close()


def test_freed_chunks_are_given_back(tmp_path: Path) -> None:
    table = SwapTable(Region(tmp_path), "t", 1 << 28, SHARD, create=True)
    where = np.arange(10 * CHUNK_SLOTS, dtype=np.uint64)
    put(table, where, where + np.uint64(1))
    assert table.allocated_bytes == 10 * CHUNK_SLOTS * 9
    put(table, where, np.zeros(len(where), np.uint64))
    assert table.allocated_bytes == 0
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir()) == 4096
    table.close()


def test_reopens_with_its_entries_and_grows(tmp_path: Path) -> None:
    region = Region(tmp_path)
    table = SwapTable(region, "t", 100_000, SHARD, create=True)
    put(table, slots(3, 99_999), slots(7, 8))
    table.grow(1 << 30)
    put(table, slots(1 << 29), slots(9))
    table.close()
    again = SwapTable(region, "t", 1 << 30, SHARD, create=False)
    assert again.get(slots(3, 4, 99_999, 1 << 29)).tolist() == [7, 0, 8, 9]
    again.close()


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_table_longer_than_said_is_refused(tmp_path: Path) -> None:
    """And its file is closed once: the second time it may be somebody else's."""
    region = Region(tmp_path)
    table = SwapTable(region, "t", 1 << 20, SHARD, create=True)
    put(table, slots(1 << 19), slots(1))
    table.close()
    with pytest.raises(StateInvalid, match="longer"):
        SwapTable(region, "t", 100, SHARD, create=False)


def test_a_growth_that_was_not_noted_is_no_damage(tmp_path: Path) -> None:
    region = Region(tmp_path)
    table = SwapTable(region, "t", 100, SHARD, create=True)
    put(table, slots(1, 99), slots(7, 8))
    table.grow(1 << 20)
    table.close()
    again = SwapTable(region, "t", 100, SHARD, create=False)
    assert again.get(slots(1, 2, 99)).tolist() == [7, 0, 8]
    again.close()


def test_a_kill_in_the_middle_of_a_change_is_no_damage(tmp_path: Path) -> None:
    class Killed:
        def __setitem__(self, where: object, words: object) -> None:
            entries[5] = 9
            raise KeyboardInterrupt

    region = Region(tmp_path)
    table = SwapTable(region, "t", 100, SHARD, create=True)
    put(table, slots(1, 99), slots(7, 8))
    entries, table._words = table._words, Killed()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        table.set(slots(5, 6), slots(9, 9), slots(0, 0))
    table.close()
    for _ in range(2):
        again = SwapTable(region, "t", 100, SHARD, create=False)
        assert again.counted(0) == 3
        again.close()


def test_what_an_earlier_life_left_is_touched_where_memory_is_locked(tmp_path: Path) -> None:
    """Or it could be swapped out, perhaps to the very node that it belongs to."""
    old = Region(tmp_path).create("t", 64 << 20)
    for start in (0, 40 << 20):
        old.reserve(start, 1 << 20)
        old.bytes[start : start + (1 << 20)] = 1
    allocated = old.allocated_bytes
    old.close()
    del old
    again = Region(tmp_path, resident=True).open("t", 64 << 20)
    in_memory = 0
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.endswith(str(tmp_path / "t")):
            in_memory += next(int(x.split()[1]) for x in lines if x.startswith("Rss:")) * 1024
    assert in_memory >= 2 << 20
    assert again.allocated_bytes == allocated, "a hole was touched"
    again.close()


def test_a_chunk_that_was_punched_is_not_allocated_by_looking() -> None:
    """Who walks over chunks gives way in between, and the last slot of one may be freed there."""
    # On disk, reading a hole allocates nothing.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        table = SwapTable(Region(Path(directory)), "t", 5 * CHUNK_SLOTS, SHARD, create=True)
        put(table, slots(3), slots(9))
        [chunk] = table.chunks().tolist()
        put(table, slots(3), slots(0))
        found, words = table.scan(chunk)
        assert len(found) == len(words) == 0
        blocks = (Path(directory) / "t.table").stat().st_blocks
        assert blocks * 512 <= 4096, "the hole was allocated"
