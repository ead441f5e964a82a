"""Concurrent clients on shared slots, and what they saw, slot by slot."""

from __future__ import annotations

import itertools
import math
import random
import threading
import time
from collections import defaultdict

import numpy as np
from chaos import pages
from linearizable import LOAD, STORE, Operation, linearizable

from vswap.client import Client
from vswap.client.sync import Space
from vswap.wire.errors import (
    OutcomeUnknown,
    SlotNotFound,
    StaleIncarnation,
    UnknownSpace,
    VswapError,
)

Slot = tuple[str, int]
"""Of which space."""

versions = itertools.count(1)
_BATCH = 12
_PAUSE_S = 0.02
"""A client does not repeat a call in less."""


class Record:
    """What clients did and saw. ``latencies``: (when it began, seconds) of every load."""

    def __init__(self, retry_s: float) -> None:
        self.retry_s = retry_s
        self.histories: dict[Slot, list[Operation]] = defaultdict(list)
        self.failed: list[str] = []
        self.wrong: list[str] = []
        self.latencies: list[tuple[float, float]] = []
        self.operations = 0
        self.over = threading.Event()
        self._lock = threading.Lock()

    def note(self, slot: Slot, operation: Operation) -> None:
        with self._lock:
            self.histories[slot].append(operation)
            self.operations += 1

    def fail(self, error: object) -> None:
        with self._lock:
            self.failed.append(f"{type(error).__name__}: {error}")

    # ---------------------------------------------------------------- workers

    def share(self, address: str, space: str, slots: int, rng: random.Random) -> None:
        """Stores, loads and frees slots that others store, load and free too."""
        with Client(address, retry_s=self.retry_s, deadline_s=5) as client:
            handle = client.space(space)
            while not self.over.is_set():
                chosen = sorted(rng.sample(range(slots), rng.randint(1, _BATCH)))
                kind = rng.random()
                try:
                    if kind < 0.55:
                        self._store(handle, chosen, free=kind > 0.45)
                    else:
                        began = time.monotonic()
                        for slot, seen in read(handle, chosen).items():
                            self.note((space, slot), seen)
                        self.latencies.append((began, time.monotonic() - began))
                except AssertionError as error:
                    self.wrong.append(str(error))
                except VswapError as error:
                    self.fail(error)

    def _store(self, space: Space, chosen: list[int], *, free: bool) -> None:
        slots = np.array(chosen, np.uint64)
        made = {slot: None if free else next(versions) for slot in chosen}
        began = time.monotonic()
        ended = math.inf
        try:
            if free:
                space.free(slots)
            else:
                space.store(slots, pages.many(made))
            ended = time.monotonic()
        except OutcomeUnknown as error:
            self.fail(error)
        repeats = self.retry_s > 0 and ended - began > _PAUSE_S
        for slot, version in made.items():
            self.note((space.name, slot), Operation(STORE, version, began, ended, repeats))

    def come_and_go(self, address: str, name: str) -> None:
        """Makes spaces, fills them, lets them grow, empties and deletes them."""
        with Client(address, retry_s=self.retry_s, deadline_s=5) as client:
            for turn in itertools.count():
                if self.over.is_set():
                    return
                try:
                    self._live(client, f"{name}-{turn}")
                except AssertionError as error:
                    self.wrong.append(f"{name}-{turn}: {error}")
                except VswapError as error:
                    self.fail(error)

    def _live(self, client: Client, name: str) -> None:
        space = client.create_space(name, max_slots=10_000, exist_ok=True)
        slots = [*range(4), *range(9000, 9004)]
        made = {slot: next(versions) for slot in slots}
        space.store(np.array(slots, np.uint64), pages.many(made))
        client.set_space(name, max_slots=20_000)
        held = {slot: seen.value for slot, seen in read(space, slots).items()}
        assert held == made, f"{held} are not {made}"
        taken = np.array(slots[:2], np.uint64)
        loaded = space.load_exclusive(taken)
        try:
            loaded.confirm()
            assert not any(seen.value for seen in read(space, slots[:2]).values())
        except (StaleIncarnation, OutcomeUnknown):
            pass  # Killed in between: there still, or gone. Both are right.
        left = slots[2:]
        assert all(seen.value == made[slot] for slot, seen in read(space, left).items())
        space.free(np.array(left, np.uint64))
        try:
            client.delete_space(name)
        except (UnknownSpace, OutcomeUnknown):
            names = [info.name for info in client.spaces()]
            assert name not in names, f"{name} was deleted twice, and is there"


class Load(Record):
    """A record of threads that are at work until they are told to stop."""

    def __init__(self, retry_s: float) -> None:
        super().__init__(retry_s)
        self._threads: list[threading.Thread] = []

    def add(self, work: object, *arguments: object) -> None:
        # A run that is broken off does not wait for them.
        thread = threading.Thread(target=self._work, args=(work, *arguments), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _work(self, work: object, *arguments: object) -> None:
        try:
            work(*arguments)  # type: ignore[operator]
        except Exception as error:
            self.fail(error)

    def stop(self) -> None:
        self.over.set()
        for thread in self._threads:
            thread.join()


def read(space: Space, slots: list[int]) -> dict[int, Operation]:
    """Loads of slots. Raises AssertionError for bytes that nobody stored there."""
    seen: dict[int, Operation] = {}
    asked = list(slots)
    while asked:
        began = time.monotonic()
        try:
            loaded = space.load(np.array(asked, np.uint64))
        except SlotNotFound as error:
            missing = set(error.fields["slots"])
            ended = time.monotonic()
            for slot in missing:
                seen[slot] = Operation(LOAD, None, began, ended)
            asked = [slot for slot in asked if slot not in missing]
            continue
        ended = time.monotonic()
        for slot, page in zip(asked, loaded, strict=True):
            seen[slot] = Operation(LOAD, pages.version_of(slot, page), began, ended)
        break
    return seen


def verify(
    load: Record, client: Client, spaces: dict[str, int], before: dict[Slot, int | None]
) -> dict[Slot, int | None]:
    """Reads every slot once more; returns what they hold. ``spaces``: slots per space.

    Raises AssertionError for a history that could not have happened, or a page that cannot be
    loaded.
    """
    now: dict[Slot, int | None] = {}
    for name, slots in spaces.items():
        space = client.space(name)
        for start in range(0, slots, 128):
            for slot, seen in read(space, [*range(start, min(start + 128, slots))]).items():
                key = name, slot
                history = [*load.histories[key], seen]
                assert linearizable(history, before.get(key)), f"{key}: {history}"
                now[key] = seen.value
    return now
