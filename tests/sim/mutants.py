"""Bugs to be planted by name: the simulation must find each of them. Tests of the test."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np

from vswap.node import handles
from vswap.node.evacuator import Evacuator
from vswap.node.ledger import Ledger, by_space
from vswap.node.reaper import Reaper
from vswap.node.tickets import Tickets
from vswap.tiers import ram, record, segment
from vswap.tiers.record import U64, Mask, Records

_write = Evacuator._write


async def _delete_before_flip(self: Evacuator, run: Any, tag: int, pieces: Any) -> None:
    """The source goes first."""
    if run.source.ram is None:
        names = [run.source.segment_name(piece.handle) for piece in pieces]
        with contextlib.suppress(Exception):
            await run.source.backend.delete(names)
    await _write(self, run, tag, pieces)


def _skip_compare(self: Ledger, records: Records, old: U64, words: U64) -> Mask:
    """Moves a slot whatever its entry says by now."""
    for number, index in by_space(records.space):
        space = self.spaces.by_number[number]
        slots = records.slot[index].astype(np.uint64)
        space.table.reserve(slots)
        self.flip(space, slots, words[index], space.table.get(slots))
    return np.ones(len(records), np.bool_)


def _no_salt(shard_key: int, serial: int) -> np.uint64:
    return np.uint64(0)


def _no_salts(shard_key: int, serials: U64) -> U64:
    return np.zeros_like(serials)


def _ignore_pins(self: Reaper, handle: int) -> None:
    """Deletes a segment that somebody is reading."""
    pins = self._handles.pins[handle]
    self._handles.pins[handle] = 0
    try:
        _consider(self, handle)
    finally:
        self._handles.pins[handle] = pins


_consider = Reaper.consider

MUTANTS: dict[str, list[tuple[Any, str, Any]]] = {
    "delete-before-flip": [(Evacuator, "_write", _delete_before_flip)],
    "skip-compare": [(Ledger, "flip_where", _skip_compare)],
    "no-tickets": [(Tickets, "winners", lambda self, space, slots, ticket: None)],
    "ignore-pins": [(Reaper, "consider", _ignore_pins)],
    "stale-checksum": [
        *((module, "salt", _no_salt) for module in (record, handles, ram, segment)),
        *((module, "salts", _no_salts) for module in (record, handles)),
    ],
}
"""Name to what is replaced: (owner, attribute, replacement)."""


@contextlib.contextmanager
def planted(name: str) -> Iterator[None]:
    """Within it the bug is there; an empty name plants nothing."""
    with contextlib.ExitStack() as stack:
        for owner, attribute, replacement in MUTANTS[name] if name else ():
            if hasattr(owner, attribute):
                stack.enter_context(mock.patch.object(owner, attribute, replacement))
        yield
