"""A client of a space as a block device, which connects again and asks again by itself."""

from __future__ import annotations

import random
import time

import numpy as np
from chaos import pages
from chaos.load import Record, versions
from linearizable import LOAD, STORE, Operation
from nbd_client import READ, TRIM, WRITE, Answer, Nbd

_PAGE = 4096
_MOST_PAGES = 8
_PATIENCE_S = 30.0


class Disk:
    """One connection at a time; not thread-safe."""

    def __init__(self, address: str, export: str) -> None:
        self._address = address
        self._export = export
        self._nbd: Nbd | None = None

    def ask(self, command: int, slot: int, count: int, data: bytes = b"") -> tuple[Answer, bool]:
        """The answer, and whether the request had to be repeated. Raises OSError in the end."""
        until_s = time.monotonic() + _PATIENCE_S
        repeated = False
        while True:
            try:
                if self._nbd is None:
                    self._nbd = Nbd(self._address, timeout_s=10).go(self._export)
                return self._nbd.ask(command, slot * _PAGE, count * _PAGE, data), repeated
            except (OSError, AssertionError):
                if time.monotonic() > until_s:
                    raise
                repeated = True
                self.close()
                time.sleep(0.01)

    def close(self) -> None:
        if self._nbd is not None:
            self._nbd.sock.close()
        self._nbd = None


def use(record: Record, address: str, space: str, slots: int, rng: random.Random) -> None:
    """Writes, reads and trims pages, until the record is over."""
    disk = Disk(address, space)
    try:
        while not record.over.is_set():
            count = rng.randint(1, _MOST_PAGES)
            first = rng.randrange(slots - count)
            _one(record, disk, rng.random(), space, range(first, first + count))
    finally:
        disk.close()


def _one(record: Record, disk: Disk, kind: float, space: str, slots: range) -> None:
    began = time.monotonic()
    if kind < 0.5:
        made: dict[int, int | None] = {slot: next(versions) for slot in slots}
        data = pages.many(made).tobytes()
        answer, repeated = disk.ask(WRITE, slots.start, len(slots), data)
    elif kind < 0.6:
        made = dict.fromkeys(slots)
        answer, repeated = disk.ask(TRIM, slots.start, len(slots))
    else:
        answer, _ = disk.ask(READ, slots.start, len(slots))
    ended = time.monotonic()
    if answer.error:
        record.fail(OSError(answer.error, answer.message))
        return
    if kind < 0.6:
        for slot, version in made.items():
            operation = Operation(STORE, version, began, ended, repeated)
            record.note((space, slot), operation)
        return
    record.latencies.append((began, ended - began))
    held = bytearray(len(slots) * _PAGE)
    for offset, piece in answer.pieces:
        at = offset - slots.start * _PAGE
        held[at : at + len(piece)] = piece
    found = np.frombuffer(held, np.uint8).reshape(-1, _PAGE)
    for slot, page in zip(slots, found, strict=True):
        try:
            value = pages.version_of(slot, page) if page.any() else None
            record.note((space, slot), Operation(LOAD, value, began, ended))
        except AssertionError as error:
            record.wrong.append(str(error))
