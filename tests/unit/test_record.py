"""Records and segments: every damage is seen, and a move changes nothing but the place."""

from __future__ import annotations

from uuid import uuid4

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vswap.tiers import ram, record, segment
from vswap.tiers.backend import SegmentName
from vswap.tiers.record import Records
from vswap.wire.errors import PageCorrupt

NAME = SegmentName(uuid4(), uuid4(), 7)


def make_records(lengths: list[int], seed: int = 0) -> Records:
    rng = np.random.default_rng(seed)
    n = len(lengths)
    return record.pack(
        [rng.bytes(length) for length in lengths],
        rng.integers(0, 4, n).astype(np.uint8),
        space=rng.integers(1, 3, n).astype(np.uint32),
        slot=np.arange(n, dtype=np.uint32),
        sequence=rng.integers(1, 1 << 40, n).astype(np.uint64),
        page_shift=np.full(n, 12, np.uint64),
    )


lengths = st.lists(st.integers(1, 5000), min_size=1, max_size=40)


@given(lengths)
def test_a_segment_reads_back_as_it_was_built(sizes: list[int]) -> None:
    records = make_records(sizes)
    built = segment.build([records], NAME)
    read, loc = segment.parse(built.data.tobytes(), NAME)
    assert read.valid().all()
    assert (loc == built.loc).all()
    assert [bytes(e) for e in read.encoded()] == [bytes(e) for e in records.encoded()]
    for column in ("space", "slot", "meta", "sums"):
        assert (getattr(read, column) == getattr(records, column)).all()


@given(lengths, st.data())
def test_no_flipped_bit_goes_unseen(sizes: list[int], data: st.DataObject) -> None:
    built = segment.build([make_records(sizes)], NAME)
    bit = data.draw(st.integers(0, len(built.data) * 8 - 1))
    damaged = built.data.copy()
    damaged[bit >> 3] ^= 1 << (bit & 7)
    with pytest.raises(PageCorrupt):
        segment.parse(damaged.tobytes(), NAME)
    # At most one record suffers, and it knows.
    records = make_records(sizes)
    read = record.read_records(
        damaged[: built.payload_bytes],
        record.loc_offset(built.loc),
        record.loc_size(built.loc),
        records.space,
        records.slot,
        record.salt(segment.shard_key(NAME.shard), NAME.serial),
    )
    assert np.count_nonzero(read.valid()) >= len(sizes) - 1


def test_a_read_of_another_slot_space_sequence_or_segment_fails() -> None:
    records = make_records([100, 200, 300])
    for column, other in (("slot", 9), ("space", 9), ("meta", 1 << 20)):
        wrong = records.take(slice(None))
        setattr(
            wrong, column, getattr(records, column) ^ getattr(records, column).dtype.type(other)
        )
        assert not wrong.valid().any()
    built = segment.build([records], NAME)
    stale = record.read_records(
        built.data[: built.payload_bytes],
        record.loc_offset(built.loc),
        record.loc_size(built.loc),
        records.space,
        records.slot,
        record.salt(segment.shard_key(NAME.shard), NAME.serial + 1),
    )
    assert not stale.valid().any()


@pytest.mark.parametrize(
    "other",
    [SegmentName(uuid4(), NAME.shard, 7), SegmentName(NAME.cluster, uuid4(), 7),
     SegmentName(NAME.cluster, NAME.shard, 8)],
)  # fmt: skip
def test_a_segment_under_a_wrong_name_is_refused(other: SegmentName) -> None:
    built = segment.build([make_records([100])], NAME)
    with pytest.raises(PageCorrupt, match="another name"):
        segment.parse(built.data.tobytes(), other)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**60 - 1))
def test_one_salt_is_as_many(key: int, serial: int) -> None:
    assert record.salt(key, serial) == record.salts(key, np.array([serial], np.uint64))[0]


def test_another_version_is_refused() -> None:
    data = segment.build([make_records([100])], NAME).data.copy()
    data[len(data) - segment.TRAILER_BYTES + 8] = segment.VERSION + 1
    with pytest.raises(PageCorrupt, match="version"):
        segment.parse(data.tobytes(), NAME)


@given(lengths, st.lists(st.booleans(), min_size=40, max_size=40))
def test_moving_a_selection_keeps_bytes_and_identity(sizes: list[int], keep: list[bool]) -> None:
    records = make_records(sizes)
    mask = np.array(keep[: len(sizes)])
    chosen = records.take(mask)
    moved = segment.parse(segment.build([chosen], NAME).data.tobytes(), NAME)[0]
    assert moved.valid().all()
    assert [bytes(e) for e in moved.encoded()] == [bytes(e) for e in chosen.encoded()]
    joined = record.concatenate([chosen, records.take(~mask)])
    assert joined.valid().all()
    assert len(joined) == len(records)


@given(lengths, st.integers(1, 20))
def test_a_ram_block_filled_in_steps_reads_back(sizes: list[int], step: int) -> None:
    records = make_records(sizes)
    block = np.zeros(1 << 18, np.uint8)
    own = record.salt(segment.shard_key(NAME.shard), NAME.serial)
    payload = count = 0
    locs = []
    for start in range(0, len(records), step):
        part = records.take(slice(start, start + step))
        locs.append(ram.append(block, part, payload=payload, count=count, own=own))
        payload, count = payload + int(part.size.sum()), count + len(part)
    read, loc = ram.read_block(block, count, NAME)
    assert read.valid().all()
    assert (loc == np.concatenate(locs)).all()
    assert [bytes(e) for e in read.encoded()] == [bytes(e) for e in records.encoded()]


@given(lengths, st.integers(0, 6000), st.integers(6000, 20000))
def test_cut_fills_each_run_and_loses_nothing(sizes: list[int], first: int, room: int) -> None:
    cost = np.array(sizes, np.int64)
    runs = record.cut(cost, first, room)
    assert [i for run in runs for i in range(run.start, run.stop)] == list(range(len(sizes)))
    for i, run in enumerate(runs):
        limit = first if i == 0 else room
        assert cost[run].sum() <= limit
        if i + 1 < len(runs):
            assert cost[run].sum() + cost[run.stop] > limit
