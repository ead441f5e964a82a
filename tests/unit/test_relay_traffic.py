"""What is under way between a device and its node, as bytes."""

from __future__ import annotations

import struct
from errno import EIO, ENOSPC, ESHUTDOWN

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vswap.cli.device.export import greeting
from vswap.cli.device.traffic import Malformed, Traffic

READ, WRITE, DISC, FLUSH, TRIM = range(5)


def request(command: int, cookie: int, length: int = 0, data: bytes = b"") -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, 0, command, cookie, 0, length) + data


def reply(cookie: int, data: bytes = b"", error: int = 0) -> bytes:
    return struct.pack(">IIQ", 0x67446698, error, cookie) + data


@given(st.lists(st.integers(1, 40), max_size=40))
def test_pieces_of_any_size_become_whole_requests_and_replies(cuts: list[int]) -> None:
    asked = request(READ, 1, 8) + request(WRITE, 2, 8, b"12345678") + request(TRIM, 3, 99)
    answered = reply(2) + reply(1, b"abcdefgh") + reply(3, error=EIO)
    traffic = Traffic()
    for stream, take in ((asked, traffic.asked), (answered, traffic.answered)):
        out, rest = b"", stream
        for cut in [*cuts, len(stream)]:
            out += take(rest[:cut])
            rest = rest[cut:]
        assert out == stream
    assert len(traffic) == 0


def test_what_was_not_answered_is_asked_again_once() -> None:
    traffic = Traffic()
    asked = [request(WRITE, n, 4, b"data") for n in range(3)] + [request(READ, 3, 8)]
    traffic.asked(b"".join(asked) + asked[0][:9])
    # Half a reply of a node that dies is no reply.
    assert traffic.answered(reply(1) + reply(3, b"half")) == reply(1)
    assert traffic.again() == asked[0] + asked[2] + asked[3]
    assert traffic.answered(reply(3, b"complete")) == reply(3, b"complete")
    assert traffic.again() == asked[0] + asked[2]


def test_errors_are_answers_but_that_the_node_shuts_down_is_none() -> None:
    traffic = Traffic()
    traffic.asked(request(WRITE, 1, 1, b"x") + request(READ, 2, 4) + request(FLUSH, 3))
    told = traffic.answered(reply(1, error=ENOSPC) + reply(2, error=ESHUTDOWN) + reply(3))
    assert told == reply(1, error=ENOSPC) + reply(3)
    assert traffic.leaving
    assert traffic.again() == request(READ, 2, 4)
    assert not traffic.leaving


def test_giving_up_answers_everything() -> None:
    traffic = Traffic()
    traffic.asked(request(WRITE, 1, 1, b"x") + request(READ, 2, 4))
    assert traffic.fail() == reply(1, error=EIO) + reply(2, error=EIO)
    assert traffic.fail() == b""
    assert traffic.again() == b""


def test_the_device_says_good_bye() -> None:
    traffic = Traffic()
    traffic.asked(request(FLUSH, 1) + request(DISC, 2))
    assert traffic.ended
    assert len(traffic) == 1


def test_garbage_is_noticed() -> None:
    with pytest.raises(Malformed):
        Traffic().asked(bytes(28))
    with pytest.raises(Malformed):
        Traffic().answered(reply(7))


def test_the_oldest_negotiation() -> None:
    told = greeting(1 << 40, 0b1101)
    assert len(told) == 152
    assert told[:16] == b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53"
    assert struct.unpack(">QI", told[16:28]) == (1 << 40, 0b1101)
