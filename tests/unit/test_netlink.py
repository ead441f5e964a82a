"""Generic netlink as bytes, and a word with the kernel itself."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vswap.cli.device import netlink
from vswap.cli.device.netlink import Family, Message


def test_a_request_as_the_kernel_wants_it() -> None:
    item = netlink.nested(1, netlink.u32(1, 9))
    told = netlink.request(
        27, 1, 5, netlink.u64(2, 2**40), netlink.text(10, "it"), netlink.nested(7, item)
    )
    assert told == b"".join(
        (
            # length, type, request and acknowledgement, sequence, port
            struct.pack("=IHHII", 16 + 4 + 12 + 8 + 16, 27, 0b101, 5, 0),
            struct.pack("=BBH", 1, 1, 0),
            struct.pack("=HHQ", 12, 2, 2**40),
            struct.pack("=HH", 7, 10) + b"it\0" + b"\0",
            struct.pack("=HH", 16, 0x8007) + struct.pack("=HH", 12, 0x8001),
            struct.pack("=HHI", 8, 1, 9),
        )
    )


@given(st.dictionaries(st.integers(1, 99), st.binary(max_size=9)))
def test_attributes_of_any_length_come_back(wanted: dict[int, bytes]) -> None:
    parts = [netlink.attribute(number, payload) for number, payload in wanted.items()]
    assert all(len(part) % 4 == 0 for part in parts)
    assert netlink.attributes(b"".join(parts)) == wanted
    assert netlink.attributes(netlink.nested(3, *parts)).keys() == {3}


def test_an_answer_and_its_acknowledgement_in_one_datagram() -> None:
    answer = netlink.request(27, 1, 5, netlink.u32(1, 3))
    header = struct.pack("=IHHII", 16 + 4 + 16, 2, 0, 5, 0)
    done = header + struct.pack("=i", 0) + answer[:16]
    failed = header + struct.pack("=i", -errno.EBUSY) + answer[:16]
    first, *rest = netlink.messages(answer + done + failed)
    assert first == Message(5, None, {1: struct.pack("=I", 3)})
    assert netlink.as_int(first.attributes[1]) == 3
    assert rest == [Message(5, 0, {}), Message(5, errno.EBUSY, {})]


@given(st.binary(max_size=80))
def test_garbage_is_noticed_or_means_something(data: bytes) -> None:
    try:
        list(netlink.messages(data))
    except ValueError:
        return


def test_half_a_message_is_noticed() -> None:
    whole = netlink.request(27, 1, 5, netlink.u32(1, 3))
    for size in range(1, len(whole)):
        with pytest.raises(ValueError, match="message"):
            list(netlink.messages(whole[:size]))


def test_the_kernel_knows_its_families() -> None:
    with Family("nlctrl") as controller:
        # CTRL_CMD_GETFAMILY by CTRL_ATTR_FAMILY_NAME.
        about = controller.ask(3, netlink.text(2, "nlctrl"))
        assert netlink.as_int(about[1]) == 16
        with pytest.raises(OSError, match="No such file") as refused:
            controller.ask(3, netlink.text(2, "no such"))
    assert refused.value.errno == errno.ENOENT
    with pytest.raises(FileNotFoundError):
        Family("no such")
