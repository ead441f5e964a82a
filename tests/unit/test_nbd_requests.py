"""Cutting a stream into requests, and a million options and requests that are none, or damaged."""

from __future__ import annotations

import errno
import functools
import random
import struct
from collections import Counter
from dataclasses import replace

import nbd_client as nbd
import pytest
from nbd_stream import Told, pieces, request, understand

from vswap.node.frontends.nbd import requests as parsing
from vswap.node.frontends.nbd.handshake import Handshake, Offer, Phase
from vswap.node.frontends.nbd.requests import Parser, ProtocolError, Write
from vswap.node.frontends.nbd.runs import Runs

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

_OPTIONS, _REQUESTS = 400_000, 600_000
"""What is sent, damaged or not: a million altogether."""


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


def _negotiate(parts: list[bytes]) -> tuple[bytes, Phase, Offer | None, bool, frozenset[str], int]:
    """All that a negotiation comes to, and how many bytes are left over for what follows."""
    handshake, pending = Handshake(_EXPORTS), b""
    handshake.replies.clear()
    for part in parts:
        pending += part
        used = handshake.feed(memoryview(pending))
        assert 0 <= used <= len(pending)
        pending = pending[used:]
    return (
        bytes(handshake.replies), handshake.phase, handshake.export, handshake.structured,
        handshake.contexts, len(pending) if handshake.phase is not Phase.CLOSED else 0,
    )  # fmt: skip


def _expected_replies(stream: bytes) -> list[int]:
    """The options, each of which has one last reply, as long as nothing ends the negotiation."""
    found, at = [], 0
    while len(stream) - at >= 16:
        magic, option, length = struct.unpack_from(">QII", stream, at)
        at += 16 + length
        whole = at <= len(stream) or length > 65536 or option == nbd.ABORT
        if magic != nbd.IHAVEOPT or option == nbd.EXPORT_NAME or not whole:
            break
        found.append(option)
        if option == nbd.ABORT:
            break
    return found


_EXPORTS = Exports()
_KINDS = {
    nbd.ACK, nbd.SERVER, nbd.INFO_REPLY, nbd.META_CONTEXT, nbd.ERR_UNSUP, nbd.ERR_POLICY,
    nbd.ERR_INVALID, nbd.ERR_UNKNOWN, nbd.ERR_TOO_BIG,
}  # fmt: skip


@pytest.mark.timeout(300)
def test_many_negotiations() -> None:
    """Each option has one last reply, and however the stream is cut, the same comes of it."""
    rng = random.Random(20261123)
    options = [
        struct.pack(">QII", nbd.IHAVEOPT, option, len(data)) + data
        for option, data in (
            (nbd.LIST, b""), (nbd.STRUCTURED_REPLY, b""), (nbd.INFO, nbd.info_query("swap", 1, 3)),
            (nbd.SET_META, nbd.meta_query("swap", "base:allocation", "vswap:")),
            (nbd.GO, nbd.info_query("swap")), (nbd.EXPORT_NAME, b"swap"), (nbd.ABORT, b""),
        )
    ]  # fmt: skip
    phases = Counter[Phase]()
    for _ in range(_OPTIONS // 3):
        stream = _mutate(rng, b"".join(rng.choices(options, k=3)))
        outcome = _negotiate([b"\0\0\0\3", *pieces(rng, stream)])
        assert outcome == _negotiate([b"\0\0\0\3" + stream])
        replies, phase = outcome[:2]
        phases[phase] += 1
        last, at = [], 0
        while at < len(replies):
            if len(replies) - at == 10:
                # Of EXPORT_NAME: size and flags.
                assert phase is Phase.TRANSMISSION
                break
            magic, about, kind, length = struct.unpack_from(">QIII", replies, at)
            assert magic == nbd.OPTION_REPLY
            assert kind in _KINDS
            at += 20 + length
            if kind == nbd.ACK or kind >= 1 << 31:
                last.append(about)
        expected = _expected_replies(stream)
        assert last == (expected[: len(last)] if phase is Phase.TRANSMISSION else expected)
    assert min(phases[phase] for phase in Phase) > 1000, phases


def _parse(parser: Parser, parts: list[bytes]) -> tuple[list[Told], bool]:
    """What the parser makes of a stream, and whether it gave up."""
    told: list[Told] = []
    data: dict[Write, list[bytes]] = {}
    pending = b""
    for part in parts:
        pending += part
        try:
            used = parser.feed(memoryview(pending))
        except ProtocolError:
            used = -1
        for cookie, offset, length, flags in parser.reads:
            told.append(Told(cookie, nbd.READ, offset, length, flags))
        for command, cookie, offset, length, flags in parser.others:
            told.append(Told(cookie, command, offset, length, flags))
        for write, _, view in parser.pieces:
            data.setdefault(write, []).append(bytes(view))
            if not write.left:
                whole = b"".join(data[write])
                start = write.offset - len(whole)
                told.append(Told(write.cookie, nbd.WRITE, start, len(whole), 0, whole))
        for command, runs in ((nbd.READ, parser.runs_read), (nbd.WRITE, parser.runs_written)):
            for run in runs:
                for (cookie, offset), page in zip(run.requests(4096), run.pages, strict=True):
                    told.append(Told(cookie, command, offset, 4096, 0, page.tobytes()))
        for cookie, error, _ in parser.errors:
            told.append(Told(cookie, -1, error=error))
        if used < 0:
            return told, True
        for understood in (
            parser.reads, parser.others, parser.pieces, parser.runs_read, parser.runs_written,
            parser.errors,
        ):  # fmt: skip
            understood.clear()
        assert 0 <= used <= len(pending)
        pending = pending[used:]
    return told, False


def _plain(told: Told) -> Told:
    """As the parser tells of it: errors by cookie, and FUA of writes not at all."""
    if told.error:
        return Told(told.cookie, -1, error=told.error)
    return replace(told, flags=0) if told.command == nbd.WRITE and told.length else told


@pytest.mark.timeout(300)
def test_many_streams_of_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request is understood or refused as the protocol says, once, however the stream is cut;
    and garbage is noticed as soon as it can be."""
    # Making them takes longer than using them.
    monkeypatch.setattr(parsing, "Runs", functools.cache(Runs))
    rng = random.Random(20261124)
    requests = [
        (command, offset, length, flags)
        for command in (*range(9), 200)
        for offset, length in ((0, 4096), (100, 50), (SIZE - 512, 512), (SIZE, 1))
        for flags in (0, 0, nbd.FUA, nbd.DF, nbd.REQ_ONE)
    ] + [(nbd.READ, 0, (32 << 20) + 1, flags) for flags in (0, nbd.DF)]
    outcomes = Counter[object]()
    sent = number = 0
    while sent < _REQUESTS:
        number += 1
        first, last = rng.choice(requests), rng.choice(requests)
        stream = b""
        # Several that are alike may be a run.
        for command, offset, length, flags in [first] * rng.choice((1, 3, 6, 12)) + [last]:
            sent += 1
            stream += request(command, offset, length, flags=flags, cookie=len(stream))
            stream += bytes(length) if command == nbd.WRITE else b""
        if rng.random() < 0.8:
            stream = _mutate(rng, stream)
        structured, size_bytes = number % 2 == 0, (SIZE, 1 << 40)[number % 3 == 0]
        expected = understand(stream, size_bytes, structured=structured)
        parser = make(size_bytes=size_bytes, structured=structured)
        told, gave_up = _parse(parser, pieces(rng, stream))
        assert gave_up == expected.garbage
        if expected.begun and expected.begun.error and len(told) > len(expected.requests):
            # It may be refused before all of its data is there.
            expected.requests.append(expected.begun)
        assert sorted(told) == sorted(map(_plain, expected.requests)), stream.hex()
        outcomes[gave_up] += 1
        outcomes.update(one.error for one in told)
    assert set(outcomes) == {True, False, errno.EINVAL, errno.ENOSPC, errno.EOVERFLOW}, outcomes
