"""Cutting a stream into requests, and a million streams that are none."""

from __future__ import annotations

import errno
import random
import struct

import nbd_client as nbd
import pytest

from vswap.node.frontends.nbd.handshake import Handshake, Offer, Phase
from vswap.node.frontends.nbd.requests import Parser, ProtocolError

SIZE = 1 << 20


class Exports:
    def names(self) -> list[str]:
        return ["swap"]

    def find(self, name: str) -> Offer | None:
        return Offer(name, SIZE, 4096) if name == "swap" else None


def make(*, size_bytes: int = SIZE, structured: bool = True) -> Parser:
    return Parser(
        size_bytes=size_bytes, page_bytes=4096, structured=structured, has_contexts=structured
    )


def request(
    command: int, offset: int = 0, length: int = 0, *, flags: int = 0, cookie: int = 7
) -> bytes:
    return struct.pack(">IHHQQI", nbd.REQUEST, flags, command, cookie, offset, length)


def feed(parser: Parser, data: bytes) -> int:
    return parser.feed(memoryview(data))


def test_reads_and_others_are_sorted_out() -> None:
    parser = make()
    stream = (
        request(nbd.READ, 4096, 4096) + request(nbd.READ, 1, 3, flags=nbd.DF)
        + request(nbd.TRIM, 0, 8192) + request(nbd.FLUSH)
        + request(nbd.WRITE_ZEROES, 0, SIZE, flags=nbd.NO_HOLE | nbd.FUA)
        + request(nbd.BLOCK_STATUS, 0, SIZE, flags=nbd.REQ_ONE) + request(nbd.CACHE, 0, 4096)
        + request(nbd.READ, SIZE, 0)
    )  # fmt: skip
    assert feed(parser, stream) == len(stream)
    assert parser.reads == [(7, 4096, 4096, 0), (7, 1, 3, nbd.DF)]
    assert [(o[0], o[2], o[3]) for o in parser.others] == [
        (nbd.TRIM, 0, 8192), (nbd.FLUSH, 0, 0), (nbd.WRITE_ZEROES, 0, SIZE),
        (nbd.BLOCK_STATUS, 0, SIZE), (nbd.CACHE, 0, 4096), (nbd.READ, SIZE, 0),
    ]  # fmt: skip
    assert not parser.errors


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (request(nbd.READ, SIZE - 1, 2), errno.EINVAL),
        (request(nbd.READ, 1 << 63, 4096), errno.EINVAL),
        (request(nbd.READ, (1 << 64) - 1, 4096), errno.EINVAL),
        (request(nbd.TRIM, SIZE, 1), errno.EINVAL),
        (request(nbd.CACHE, SIZE, 1), errno.EINVAL),
        (request(nbd.WRITE_ZEROES, SIZE - 4096, 8192), errno.ENOSPC),
        (request(nbd.BLOCK_STATUS, 0, 0), errno.EINVAL),
        (request(nbd.BLOCK_STATUS, SIZE, 1), errno.EINVAL),
        (request(nbd.FLUSH, 1, 0), errno.EINVAL),
        (request(nbd.READ, 0, 4096, flags=nbd.NO_HOLE), errno.EINVAL),
        (request(nbd.TRIM, 0, 4096, flags=1 << 14), errno.EINVAL),
        (request(99), errno.EINVAL),
        (request(65535, 5, 5, flags=65535), errno.EINVAL),
        (request(nbd.WRITE, SIZE - 1, 2) + b"xy", errno.ENOSPC),
        (request(nbd.WRITE, 0, 2, flags=nbd.DF) + b"xy", errno.EINVAL),
    ],
)
def test_nonsense_is_refused_and_the_next_request_is_found(bad: bytes, error: int) -> None:
    parser = make()
    stream = bad + request(nbd.READ, 0, 4096, cookie=8)
    assert feed(parser, stream) == len(stream)
    assert [(e[0], e[1]) for e in parser.errors] == [(7, error)]
    assert parser.reads == [(8, 0, 4096, 0)]


def test_too_long_requests() -> None:
    parser = make(size_bytes=1 << 40)
    feed(parser, request(nbd.READ, 0, (32 << 20) + 1))
    feed(parser, request(nbd.READ, 0, (32 << 20) + 1, flags=nbd.DF))
    assert [e[1] for e in parser.errors] == [errno.EINVAL, errno.EOVERFLOW]
    feed(parser, request(nbd.WRITE, 0, (32 << 20) + 1))
    left = (32 << 20) + 1
    while left:
        step = min(left, 1 << 20)
        assert feed(parser, bytes(step)) == step
        left -= step
    feed(parser, request(nbd.READ, 0, 1))
    assert len(parser.reads) == 1
    assert not parser.pieces


@pytest.mark.parametrize("length", [512, 4096, (32 << 20) + 1])
def test_replies_that_are_not_structured_cannot_be_asked_for_in_one_piece(length: int) -> None:
    parser = make(size_bytes=1 << 40, structured=False)
    feed(parser, request(nbd.READ, 0, length, flags=nbd.DF))
    assert [e[1] for e in parser.errors] == [errno.EINVAL]
    assert not parser.reads


def test_a_write_arrives_in_pieces_cut_at_pages() -> None:
    parser = make()
    data = random.Random(1).randbytes(10000)
    stream = request(nbd.WRITE, 100, len(data)) + data + request(nbd.READ, 0, 1)
    got, pending = bytearray(SIZE), b""
    for start in range(0, len(stream), 777):
        pending += stream[start : start + 777]
        used = feed(parser, pending)
        for write, offset, view in parser.pieces:
            got[offset : offset + len(view)] = view
            assert (offset + len(view)) % 4096 == 0 or not write.left
        parser.pieces.clear()
        pending = pending[used:]
        assert len(pending) < 28 + 4096
    assert got[100:10100] == data
    assert len(parser.reads) == 1


@pytest.mark.parametrize("seed", range(20))
def test_a_run_is_what_its_requests_are(seed: int) -> None:
    """However the stream is cut, and whatever stands in the middle of a run."""
    rng = random.Random(seed)
    stream, expected = b"", []
    kinds = [nbd.READ] * 8 + [nbd.WRITE] * 8
    kind = nbd.READ
    for cookie in range(600):
        kind = rng.choice(kinds) if rng.random() < 0.1 else kind
        offset, length, flags = rng.randrange(SIZE // 4096) * 4096, 4096, 0
        odd = rng.random()
        if odd < 0.02:
            offset, length = offset + 1, 4095
        elif odd < 0.04:
            offset = SIZE + rng.randrange(2) * ((1 << 64) - 2 * SIZE)
        elif odd < 0.06:
            flags = nbd.FUA
        elif odd < 0.08:
            length = min(8192, SIZE - offset)
        stream += request(kind, offset, length, flags=flags, cookie=(cookie << 40) + 3)
        data = rng.randbytes(length) if kind == nbd.WRITE else b""
        stream += data
        expected.append(((cookie << 40) + 3, kind, offset, data, offset + length <= SIZE))
    parser, pending = make(), b""
    told: dict[int, tuple[int, int, bytes, bool]] = {}
    runs = 0
    while stream:
        step = rng.choice([100, 4096, 50_000, 200_000])
        pending, stream = pending + stream[:step], stream[step:]
        used = feed(parser, pending)
        for what, found in ((nbd.READ, parser.runs_read), (nbd.WRITE, parser.runs_written)):
            for run in found:
                runs += 1
                listed = run.requests(4096)
                assert [offset >> 12 for _, offset in listed] == run.slots.tolist()
                assert run.offsets.byteswap().tolist() == [offset for _, offset in listed]
                for (cookie, offset), page in zip(listed, run.pages, strict=True):
                    told[cookie] = what, offset, page.tobytes(), True
            found.clear()
        for cookie, offset, _, _ in parser.reads:
            told[cookie] = nbd.READ, offset, b"", True
        for write, offset, view in parser.pieces:
            _, start, before, _ = told.get(write.cookie, (0, offset, b"", True))
            told[write.cookie] = nbd.WRITE, start, before + bytes(view), True
        for cookie, _, _ in parser.errors:
            told[cookie] = -1, 0, b"", False
        for said in (parser.reads, parser.pieces, parser.errors):
            said.clear()
        pending = pending[used:]
    assert not pending
    assert runs > 8
    for cookie, what, offset, data, fine in expected:
        assert told.pop(cookie) == ((what, offset, data, True) if fine else (-1, 0, b"", False))
    assert not told


def test_wrong_magic_ends_it() -> None:
    with pytest.raises(ProtocolError):
        feed(make(), bytes(28))


def test_nothing_counts_after_goodbye() -> None:
    parser = make()
    feed(parser, request(nbd.DISC) + request(nbd.READ, 0, 1))
    assert parser.disconnect
    assert not parser.reads


# -------------------------------------------------------------------- fuzz

_INPUTS = 1_000_000


def _mutate(rng: random.Random, seed: bytes) -> bytes:
    data = bytearray(seed)
    for _ in range(rng.randrange(1, 4)):
        kind = rng.randrange(4)
        at = rng.randrange(len(data) + 1)
        if kind == 0 and at < len(data):
            data[at] = rng.randrange(256)
        elif kind == 1:
            data[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif kind == 2:
            del data[at : at + rng.randrange(1, 40)]
        elif at < len(data):
            data[at] ^= 1 << rng.randrange(8)
    return bytes(data)


@pytest.mark.timeout(300)
def test_a_million_streams_of_garbage() -> None:
    """Half of them at the negotiation, half at the requests: nothing but a refusal or an error that
    the protocol knows; nothing is consumed twice, nothing handed out is out of range."""
    rng = random.Random(20261123)
    options = [
        struct.pack(">QII", nbd.IHAVEOPT, option, len(data)) + data
        for option, data in (
            (nbd.LIST, b""), (nbd.STRUCTURED_REPLY, b""), (nbd.INFO, nbd.info_query("swap", 1, 3)),
            (nbd.SET_META, nbd.meta_query("swap", "base:allocation", "vswap:")),
            (nbd.GO, nbd.info_query("swap")), (nbd.EXPORT_NAME, b"swap"), (nbd.ABORT, b""),
        )
    ]  # fmt: skip
    requests = [
        request(command, offset, length, flags=flags)
        for command in (*range(9), 200)
        for offset, length in ((0, 4096), (100, 50), (SIZE - 512, 512), (SIZE, 1))
        for flags in (0, nbd.FUA, nbd.DF)
    ]
    exports = Exports()
    for _ in range(_INPUTS // 2):
        handshake = Handshake(exports)
        handshake.feed(b"\0\0\0\3")  # type: ignore[arg-type]
        data = _mutate(rng, rng.choice(options) + rng.choice(options))
        used = handshake.feed(memoryview(data))
        assert 0 <= used <= len(data)
        assert handshake.phase in Phase
        assert len(handshake.replies) < 4096
    for _ in range(_INPUTS // 2):
        parser = make()
        first = rng.choice(requests)
        payload = bytes(int.from_bytes(first[-4:], "big")) if first[7] == nbd.WRITE else b""
        again = rng.choice((0, 0, 5))  # a run
        data = _mutate(rng, (first + payload) * again + first + payload + rng.choice(requests))
        try:
            used = parser.feed(memoryview(data))
        except ProtocolError:
            continue
        assert 0 <= used <= len(data)
        for _, offset, length, _ in parser.reads:
            assert length > 0
            assert offset + length <= SIZE
        for run in parser.runs_read + parser.runs_written:
            assert (run.slots < SIZE // 4096).all()
        for write, offset, view in parser.pieces:
            assert offset + len(view) + write.left <= SIZE
        for _, error, _ in parser.errors:
            assert error in (errno.EINVAL, errno.ENOSPC, errno.EOVERFLOW)
