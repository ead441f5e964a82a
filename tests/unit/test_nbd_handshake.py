"""The negotiation, byte by byte."""

from __future__ import annotations

import struct

import nbd_client as nbd
import pytest

from vswap.node.frontends.nbd.handshake import Handshake, Offer, Phase


class Exports:
    def names(self) -> list[str]:
        return ["other", "swap"]

    def find(self, name: str) -> Offer | None:
        return Offer(name, 1 << 30, 4096) if name in self.names() else None


def begin(flags: int = 3) -> Handshake:
    handshake = Handshake(Exports())
    handshake.replies.clear()
    assert handshake.feed(memoryview(struct.pack(">I", flags))) == 4
    return handshake


def ask(handshake: Handshake, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
    message = struct.pack(">QII", nbd.IHAVEOPT, option, len(data)) + data
    assert handshake.feed(memoryview(message)) == len(message)
    replies, rest = [], bytes(handshake.replies)
    handshake.replies.clear()
    while rest:
        magic, about, kind, length = struct.unpack(">QIII", rest[:20])
        assert (magic, about) == (nbd.OPTION_REPLY, option)
        replies.append((kind, rest[20 : 20 + length]))
        rest = rest[20 + length :]
    return replies


def test_greeting_is_fixed_newstyle() -> None:
    assert bytes(Handshake(Exports()).replies) == b"NBDMAGIC" + b"IHAVEOPT" + b"\0\3"


def test_list_names_every_export() -> None:
    assert ask(begin(), nbd.LIST) == [
        (nbd.SERVER, nbd.text("other")), (nbd.SERVER, nbd.text("swap")), (nbd.ACK, b""),
    ]  # fmt: skip


def test_go_tells_size_flags_and_block_sizes() -> None:
    handshake = begin()
    replies = ask(handshake, nbd.GO, nbd.info_query("swap"))
    assert [kind for kind, _ in replies] == [nbd.INFO_REPLY, nbd.INFO_REPLY, nbd.ACK]
    number, size, flags = struct.unpack(">HQH", replies[0][1])
    assert (number, size) == (0, 1 << 30)
    assert flags == 1 | 4 | 8 | 32 | 64 | 256 | 1024 | 2048
    assert struct.unpack(">HIII", replies[1][1]) == (3, 1, 4096, 32 << 20)
    assert handshake.phase is Phase.TRANSMISSION


def test_info_leaves_the_client_where_it_was() -> None:
    handshake = begin()
    replies = ask(handshake, nbd.INFO, nbd.info_query("swap", 1, 2))
    texts = {int.from_bytes(d[:2], "big"): d[2:] for k, d in replies if k == nbd.INFO_REPLY}
    assert texts[1] == b"swap"
    assert b"4096" in texts[2]
    assert handshake.phase is Phase.OPTIONS


@pytest.mark.parametrize("option", [nbd.GO, nbd.INFO])
def test_unknown_export_is_refused_and_another_may_be_tried(option: int) -> None:
    handshake = begin()
    [(kind, why)] = ask(handshake, option, nbd.info_query("nothing"))
    assert (kind, why) == (nbd.ERR_UNKNOWN, b"no such export")
    assert ask(handshake, option, nbd.info_query("swap"))[-1][0] == nbd.ACK


@pytest.mark.parametrize("no_zeroes", [True, False])
def test_export_name_is_the_old_way_in(no_zeroes: bool) -> None:
    handshake = begin(3 if no_zeroes else 1)
    message = struct.pack(">QII", nbd.IHAVEOPT, nbd.EXPORT_NAME, 4) + b"swap"
    handshake.feed(memoryview(message))
    assert len(handshake.replies) == (10 if no_zeroes else 134)
    assert handshake.phase is Phase.TRANSMISSION


@pytest.mark.parametrize("name", [b"nothing", b"\xff\xfe", b"x" * 70000])
def test_export_name_can_only_hang_up(name: bytes) -> None:
    handshake = begin()
    handshake.feed(memoryview(struct.pack(">QII", nbd.IHAVEOPT, nbd.EXPORT_NAME, len(name)) + name))
    assert handshake.phase is Phase.CLOSED
    assert not handshake.replies


@pytest.mark.parametrize(
    ("option", "data", "error"),
    [
        (nbd.STARTTLS, b"", nbd.ERR_POLICY),
        (11, b"", nbd.ERR_UNSUP),
        (77, b"whatever", nbd.ERR_UNSUP),
        (nbd.LIST, b"x", nbd.ERR_INVALID),
        (nbd.STRUCTURED_REPLY, b"x", nbd.ERR_INVALID),
        (nbd.GO, b"", nbd.ERR_INVALID),
        (nbd.GO, struct.pack(">I", 5000) + b"x", nbd.ERR_INVALID),
        (nbd.GO, nbd.text("swap"), nbd.ERR_INVALID),
        (nbd.GO, nbd.info_query("swap", 1) + b"x", nbd.ERR_INVALID),
        (nbd.GO, nbd.text("swap") + b"\0\7\0\1", nbd.ERR_INVALID),
        (nbd.GO, struct.pack(">I", 2) + b"\xff\xfe\0\0", nbd.ERR_INVALID),
        (nbd.GO, bytes(70000), nbd.ERR_TOO_BIG),
        (nbd.SET_META, nbd.meta_query("swap", "base:allocation"), nbd.ERR_INVALID),
    ],
)
def test_nonsense_gets_an_error_and_the_negotiation_goes_on(
    option: int, data: bytes, error: int
) -> None:
    handshake = begin()
    assert [kind for kind, _ in ask(handshake, option, data)] == [error]
    assert handshake.phase is Phase.OPTIONS
    assert ask(handshake, nbd.LIST)[-1][0] == nbd.ACK


@pytest.mark.parametrize("data", [b"", b"x", bytes(70000)])
def test_abort_is_acknowledged(data: bytes) -> None:
    handshake = begin()
    assert ask(handshake, nbd.ABORT, data) == [(nbd.ACK, b"")]
    assert handshake.phase is Phase.CLOSED


def test_meta_contexts() -> None:
    handshake = begin()
    ask(handshake, nbd.STRUCTURED_REPLY)
    listed = ask(handshake, nbd.LIST_META, nbd.meta_query("swap"))
    assert [d[4:] for _, d in listed[:-1]] == [b"base:allocation", b"vswap:tier"]
    assert ask(handshake, nbd.LIST_META, nbd.meta_query("swap", "vswap:"))[0][1][4:] == (
        b"vswap:tier"
    )
    assert ask(handshake, nbd.LIST_META, nbd.meta_query("swap", "x:y")) == [(nbd.ACK, b"")]
    chosen = ask(handshake, nbd.SET_META, nbd.meta_query("swap", "vswap:tier", "x:y", "base:"))
    assert chosen == [(nbd.META_CONTEXT, struct.pack(">I", 2) + b"vswap:tier"), (nbd.ACK, b"")]
    assert [k for k, _ in ask(handshake, nbd.SET_META, nbd.meta_query("nothing", "x:y"))] == [
        nbd.ERR_UNKNOWN
    ]
    assert handshake.contexts == frozenset(), "what failed still replaces what was chosen before"
    ask(handshake, nbd.SET_META, nbd.meta_query("swap", "vswap:tier"))
    ask(handshake, nbd.GO, nbd.info_query("swap"))
    assert handshake.contexts == {"vswap:tier"}


@pytest.mark.parametrize(
    ("option", "data"), [(nbd.GO, nbd.info_query("swap")), (nbd.EXPORT_NAME, b"swap")]
)
def test_contexts_of_another_export_do_not_count(option: int, data: bytes) -> None:
    for chosen, counts in (("other", set()), ("swap", {"vswap:tier"})):
        handshake = begin()
        ask(handshake, nbd.STRUCTURED_REPLY)
        ask(handshake, nbd.SET_META, nbd.meta_query(chosen, "vswap:tier"))
        handshake.feed(memoryview(struct.pack(">QII", nbd.IHAVEOPT, option, len(data)) + data))
        assert handshake.phase is Phase.TRANSMISSION
        assert handshake.contexts == counts


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (nbd.meta_query("swap", "x:y") + b"junk", nbd.ERR_INVALID),
        (nbd.meta_query("swap", "vswap:tier", "nocolon"), nbd.ERR_INVALID),
        (nbd.meta_query("nothing", "vswap:tier"), nbd.ERR_UNKNOWN),
        (bytes(70000), nbd.ERR_TOO_BIG),
    ],
    ids=["junk", "one-of-two", "unknown", "too-big"],
)
def test_contexts_that_could_not_be_set_leave_none(data: bytes, error: int) -> None:
    handshake = begin()
    ask(handshake, nbd.STRUCTURED_REPLY)
    ask(handshake, nbd.SET_META, nbd.meta_query("swap", "vswap:tier"))
    assert [kind for kind, _ in ask(handshake, nbd.SET_META, data)] == [error]
    ask(handshake, nbd.GO, nbd.info_query("swap"))
    assert handshake.contexts == frozenset()


@pytest.mark.parametrize("option", [nbd.LIST_META, nbd.SET_META])
@pytest.mark.parametrize("query", ["", "base", ":tier"])
def test_a_query_has_a_namespace_and_a_colon(option: int, query: str) -> None:
    handshake = begin()
    ask(handshake, nbd.STRUCTURED_REPLY)
    assert [k for k, _ in ask(handshake, option, nbd.meta_query("swap", query))] == [
        nbd.ERR_INVALID
    ]


@pytest.mark.parametrize("flags", [4, 0x80000003])
def test_unknown_client_flags_hang_up(flags: int) -> None:
    assert begin(flags).phase is Phase.CLOSED


def test_wrong_magic_and_endless_negotiation_hang_up() -> None:
    handshake = begin()
    handshake.feed(memoryview(struct.pack(">QII", 1, nbd.LIST, 0)))
    assert handshake.phase is Phase.CLOSED
    handshake = begin()
    for _ in range(300):
        handshake.feed(memoryview(struct.pack(">QII", nbd.IHAVEOPT, nbd.LIST, 0)))
    assert handshake.phase is Phase.CLOSED


def test_bytes_may_come_one_at_a_time() -> None:
    handshake = Handshake(Exports())
    handshake.replies.clear()
    message = struct.pack(">I", 3)
    for option, data in ((nbd.LIST, b""), (77, bytes(9)), (nbd.GO, nbd.info_query("swap", 1))):
        message += struct.pack(">QII", nbd.IHAVEOPT, option, len(data)) + data
    pending = b""
    for byte in message:
        pending += bytes([byte])
        pending = pending[handshake.feed(memoryview(pending)) :]
    assert not pending
    assert handshake.phase is Phase.TRANSMISSION
