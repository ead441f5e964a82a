"""Pages come back as they were, and nothing else comes back as a page."""

from __future__ import annotations

import os
import random
import threading
import tracemalloc

import lz4.block
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from vswap.tiers.codec import LZ4, RAW, RAW_INCOMPRESSIBLE, ZSTD, Codec, decode, decode_many
from vswap.tiers.record import U8
from vswap.wire.errors import BadConfig, PageCorrupt

PAGE = 4096
CODECS = ["zstd:1", "zstd:-5", "zstd:19", "lz4", "none"]


def make_pages(count: int, page_bytes: int = PAGE, seed: int = 1) -> U8:
    """Compressible pages; every fourth is random bytes."""
    rng = np.random.default_rng(seed)
    pages = rng.integers(0, 4, (count, page_bytes), np.uint8)
    pages[::4] = rng.integers(0, 256, (len(pages[::4]), page_bytes), np.uint8)
    return pages


@pytest.mark.parametrize("page_bytes", [4096, 16384, 65536])
@pytest.mark.parametrize("text", CODECS)
def test_pages_come_back(text: str, page_bytes: int) -> None:
    pages = make_pages(9, page_bytes)
    encoded, ids = Codec.parse(text).encode(pages)
    assert [bytes(page) for page in decode_many(ids.tolist(), encoded, page_bytes)] == [
        page.tobytes() for page in pages
    ]
    for i, page in enumerate(pages):
        assert decode(int(ids[i]), encoded[i], page_bytes) == page.tobytes()


@pytest.mark.parametrize(("text", "kind"), [("zstd:1", ZSTD), ("lz4", LZ4)])
def test_what_does_not_shrink_is_kept_raw_and_marked(text: str, kind: int) -> None:
    pages = make_pages(8)
    encoded, ids = Codec.parse(text).encode(pages)
    assert ids.tolist() == [RAW_INCOMPRESSIBLE, kind, kind, kind] * 2
    assert [len(data) == PAGE for data in encoded] == [True, False, False, False] * 2
    assert all(np.shares_memory(np.frombuffer(encoded[i], np.uint8), pages) for i in (0, 4))


def test_the_limit_is_a_sixteenth() -> None:
    """Pages of a random head and an empty tail: their encodings lie on both sides of the limit."""
    rng = random.Random(1)
    heads = [PAGE * 13 // 16 + 16 * step for step in range(48)]
    rows = [rng.randbytes(head) + bytes(PAGE - head) for head in heads]
    pages = np.frombuffer(b"".join(rows), np.uint8).reshape(-1, PAGE)
    bare = zstandard.ZstdCompressor(level=1, write_content_size=False).compress
    _, ids = Codec.parse("zstd:1").encode(pages)
    for row, codec_id in zip(rows, ids.tolist(), strict=True):
        worth = len(bare(row)) <= PAGE - PAGE // 16
        assert codec_id == (ZSTD if worth else RAW_INCOMPRESSIBLE)
    assert set(ids.tolist()) == {ZSTD, RAW_INCOMPRESSIBLE}


def test_none_copies_nothing() -> None:
    pages = make_pages(3)
    encoded, ids = Codec.parse("none").encode(pages)
    assert ids.tolist() == [RAW] * 3
    assert Codec.parse("none").is_none
    assert all(np.shares_memory(np.frombuffer(data, np.uint8), pages) for data in encoded)


@pytest.mark.parametrize("text", ["", "zstd", "zstd:", "zstd:x", "zstd:23", "lz4:1", "gzip", "raw"])
def test_unknown_codecs_are_named(text: str) -> None:
    with pytest.raises(BadConfig, match="codec"):
        Codec.parse(text)


def test_mixed_batches_keep_their_order() -> None:
    pages = make_pages(12)
    ids: list[int] = []
    encoded = []
    for i in range(12):
        data, kind = Codec.parse(("zstd:1", "lz4", "none")[i % 3]).encode(pages[i : i + 1])
        encoded += data
        ids += kind.tolist()
    assert set(ids) == {RAW, RAW_INCOMPRESSIBLE, ZSTD, LZ4}
    decoded = decode_many(ids, encoded, PAGE)
    assert [bytes(page) for page in decoded] == [page.tobytes() for page in pages]
    assert decode_many([], [], PAGE) == []


@pytest.mark.parametrize("kind", range(16))
@pytest.mark.parametrize("data", [b"", b"x", bytes(PAGE - 1), bytes(PAGE + 1), b"\xff" * 100])
def test_garbage_is_corrupt(kind: int, data: bytes) -> None:
    with pytest.raises(PageCorrupt):
        decode(kind, data, PAGE)


@pytest.mark.parametrize("kind", range(LZ4 + 1, 16))
def test_an_unknown_id_is_corrupt_even_where_the_length_fits(kind: int) -> None:
    with pytest.raises(PageCorrupt):
        decode(kind, bytes(PAGE), PAGE)


@pytest.mark.parametrize(("text", "kind"), [("zstd:1", ZSTD), ("lz4", LZ4)])
def test_every_truncation_is_corrupt(text: str, kind: int) -> None:
    [data], _ = Codec.parse(text).encode(np.frombuffer(os.urandom(64) * 64, np.uint8)[None])
    for length in range(len(data)):
        with pytest.raises(PageCorrupt):
            decode(kind, bytes(data)[:length], PAGE)


@settings(deadline=None)
@given(st.sampled_from([ZSTD, LZ4]), st.integers(0, 2**32), st.integers(1, 8))
def test_damage_gives_a_page_or_an_error_never_another_length(
    kind: int, seed: int, flips: int
) -> None:
    """That the page is the right one is for the record's checksum to say."""
    rng = random.Random(seed)
    text = "zstd:1" if kind == ZSTD else "lz4"
    page = np.frombuffer(rng.randbytes(200) * 20 + bytes(96), np.uint8)
    damaged = bytearray(Codec.parse(text).encode(page[None])[0][0])
    for _ in range(flips):
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    try:
        decoded = decode(kind, damaged, PAGE)
    except PageCorrupt:
        return
    assert len(decoded) == PAGE


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (ZSTD, zstandard.ZstdCompressor().compress(bytes(64 << 20))),
        (ZSTD, zstandard.ZstdCompressor(write_content_size=False).compress(bytes(64 << 20))),
        (LZ4, lz4.block.compress(bytes(64 << 20), store_size=False)),
        # A header that states an exbibyte.
        (ZSTD, b"\x28\xb5\x2f\xfd\xe0" + (1 << 60).to_bytes(8, "little") + bytes(40)),
    ],
)
def test_a_bomb_does_not_unfold(kind: int, data: bytes) -> None:
    decode_many([ZSTD], Codec.parse("zstd:1").encode(make_pages(2)[1:])[0], PAGE)
    tracemalloc.start()
    try:
        with pytest.raises(PageCorrupt):
            decode(kind, data, PAGE)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_threads_share_a_codec() -> None:
    """Two compressions at once in one zstd context give garbage or crash."""
    codec = Codec.parse("zstd:1")
    wrong: list[int] = []

    def work(seed: int) -> None:
        pages = make_pages(64, seed=seed)
        for _ in range(20):
            encoded, ids = codec.encode(pages)
            decoded = decode_many(ids.tolist(), encoded, PAGE)
            if b"".join(map(bytes, decoded)) != pages.tobytes():
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
