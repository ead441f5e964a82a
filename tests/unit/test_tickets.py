"""Tickets: an older operation never undoes a newer one that finished."""

from __future__ import annotations

import numpy as np

from vswap.node.tickets import Tickets


def won(tickets: Tickets, slots: list[int], ticket: int) -> list[bool]:
    mask = tickets.winners(1, slots, ticket)
    return [True] * len(slots) if mask is None else mask.tolist()


def test_the_older_loses_where_the_newer_has_finished() -> None:
    tickets = Tickets()
    tickets.begin(1, [1, 2, 3])
    tickets.begin(1, [2, 3, 4])
    tickets.flip(1, np.array([2, 3, 4], np.uint64), 20)
    tickets.end(1, [2, 3, 4])
    assert won(tickets, [1, 2, 3], 10) == [True, False, False]
    tickets.end(1, [1, 2, 3])


def test_the_older_wins_while_the_newer_may_still_fail() -> None:
    tickets = Tickets()
    tickets.begin(1, [1])
    tickets.begin(1, [1])
    assert won(tickets, [1], 10) == [True]
    tickets.flip(1, np.array([1], np.uint64), 10)
    tickets.end(1, [1])
    assert won(tickets, [1], 20) == [True]


def test_a_free_in_between_counts_as_newer() -> None:
    tickets = Tickets()
    tickets.begin(1, [5])
    tickets.flip(1, np.array([5], np.uint64), 11)
    assert won(tickets, [5], 10) == [False]


def test_an_edit_comes_right_after_what_it_found() -> None:
    tickets = Tickets()
    tickets.begin(1, [5])
    tickets.flip(1, np.array([5], np.uint64), 10)
    tickets.flip(1, np.array([5], np.uint64), 20, edit=True)
    assert won(tickets, [5], 9) == [False]
    assert won(tickets, [5], 15) == [True]
    assert tickets.newest(1, [5]) == [20]
    tickets.flip(1, np.array([5], np.uint64), 15)
    assert tickets.newest(1, [5]) == [15]
    assert won(tickets, [5], 12) == [False]


def test_nothing_is_remembered_once_all_are_done() -> None:
    tickets = Tickets()
    for ticket in range(1, 100):
        slots = list(range(ticket, ticket + 5))
        tickets.begin(1, slots)
        tickets.flip(1, np.array(slots, np.uint64), ticket)
        tickets.end(1, slots)
    assert not tickets._open[1]
    assert not tickets._flipped[1]
    assert not tickets._last[1]


def test_spaces_do_not_meet() -> None:
    tickets = Tickets()
    tickets.begin(1, [1])
    tickets.flip(2, np.array([1], np.uint64), 99)
    assert won(tickets, [1], 10) == [True]
