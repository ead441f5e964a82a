"""Servers that keep segments, and the backend through which a process reaches one.

What they may do to a caller: refuse, lose a reply, do a thing long after the caller gave it up,
answer with a bit flipped or with the bytes of another segment, and, where the tier checks what it
writes, acknowledge a segment that they did not keep, or kept in part.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sim.loop import Process
from sim.net import Net

from vswap.tiers.backend import Backend, Buffer, Listed, Read, SegmentName, Usage
from vswap.tiers.segment import parse
from vswap.tiers.spec import TierSpec
from vswap.wire.errors import OutcomeUnknown, PageLost, SegmentExists, TierUnavailable, VswapError

_BAD_READS = 2
"""In a row of one segment, at most: vswap reads thrice before it believes that a copy is bad."""
LATEST_S = 8.0
"""What was given up may happen so much later."""


@dataclass(slots=True)
class Faults:
    """Probabilities per call; ``flip`` and ``stale`` per read. Changed while it runs."""

    error: float = 0.0
    lost: float = 0.0
    late: float = 0.0
    slow: float = 0.0
    flip: float = 0.0
    stale: float = 0.0
    torn: float = 0.0
    """Of puts to tiers that verify their writes."""


class Server:
    """Keeps segments. It is a process that never dies; ``up`` says whether it listens."""

    def __init__(self, name: str, net: Net, rng: random.Random) -> None:
        self.process = Process(name)
        self.net = net
        self.rng = rng
        self.faults = Faults()
        self.up = True
        self.segments: dict[str, bytes] = {}
        self.foreign = SegmentName(UUID(int=1), UUID(int=2), 3).key
        """Of another cluster on the same server: not ours to touch."""
        self.segments[self.foreign] = b"foreign"
        self.torn: set[str] = set()
        """Of what was put, what was not kept as it came."""
        self.life = 0
        """Another one each time it comes back with less than it had."""
        self.named: set[str] = set()
        """Every name that was ever put: none may be put twice."""
        self.misused: list[str] = []
        self._older: deque[tuple[str, bytes]] = deque(maxlen=64)
        self._bad: Counter[str] = Counter()
        self.injected: Counter[str] = Counter()

    def forget(self) -> None:
        """Loses segments that it had acknowledged, as a server that comes back empty does."""
        self.life += 1
        share = self.rng.choice((0.2, 1.0))
        for key in [key for key in self.segments if self.rng.random() < share]:
            if key != self.foreign:
                self.injected["forgotten"] += 1
                del self.segments[key]

    def has(self, key: str) -> bool:
        """Whether it has all of a segment, or of its part of it, as it came."""
        return key in self.segments and key not in self.torn

    def hits(self, fault: str) -> bool:
        probability: float = getattr(self.faults, fault)
        if probability and self.rng.random() < probability:
            self.injected[fault] += 1
            return True
        return False

    def put(self, key: str, data: bytes) -> None:
        if key in self.segments:
            raise SegmentExists(f"{key} exists", name=key)
        self.segments[key] = data
        self._older.append((key, data))

    def get(self, read: Read) -> bytes | VswapError:
        key = read.name.key
        data = self.segments.get(key)
        if data is None or len(data) < read.offset + read.length:
            return PageLost(f"{key} is not there, or too short", name=key)
        if self._bad[key] >= _BAD_READS:
            self._bad[key] = 0
        elif self.hits("stale"):
            self._bad[key] += 1
            data = self._other(key, read) or data
        elif self.hits("flip"):
            self._bad[key] += 1
            damaged = bytearray(data[read.offset : read.offset + read.length])
            bit = self.rng.randrange(8 * len(damaged))
            damaged[bit >> 3] ^= 1 << (bit & 7)
            return bytes(damaged)
        else:
            self._bad[key] = 0
        return data[read.offset : read.offset + read.length]

    def _other(self, key: str, read: Read) -> bytes | None:
        """An older segment of the same shard with such a range; if there is one, with an older
        page of a slot where this one has it now: what only the serial can tell."""
        shard = key.rpartition("/")[0]
        end = read.offset + read.length
        others = [
            (name, data) for name, data in self._older
            if name != key and name.startswith(shard) and len(data) >= end
        ]  # fmt: skip
        here = _rows(key, self.segments[key])
        alike = [(name, data) for name, data in others if here & _rows(name, data)]
        return self.rng.choice(alike or others)[1] if others else None


def _rows(key: str, data: bytes) -> set[tuple[int, int]]:
    """Slots of a segment's records, and where these lie."""
    name = SegmentName.parse(key)
    assert name is not None
    try:
        records, loc = parse(data, name)
    except VswapError:
        return set()
    return set(zip(records.slot.tolist(), loc.tolist(), strict=True))


class SimBackend(Backend):
    """A process's connection to a server."""

    gap_bytes = 512

    def __init__(self, spec: TierSpec, server: Server, segment_bytes: int) -> None:
        self._spec = spec
        self._server = server
        self._net = server.net
        self.segment_bytes = segment_bytes

    async def open(self) -> None:
        await self._exchange(lambda: None)

    async def close(self) -> None:
        return None

    async def put(self, name: SegmentName, data: Buffer) -> None:
        server, key, kept = self._server, name.key, bytes(data)
        if key in server.named:
            server.misused.append(f"{key} was put twice")
        server.named.add(key)
        if self._spec.verify_writes and server.hits("torn"):
            # Shorter, or with zeros in the end.
            torn = kept[: server.rng.randrange(len(kept))]
            kept = torn.ljust(len(kept), b"\0") if server.rng.random() < 0.5 else torn
            server.torn.add(key)
        if kept:
            await self._exchange(lambda: server.put(key, kept), changes=True)
        else:
            await self._exchange(lambda: None, changes=True)

    async def get(self, reads: Sequence[Read]) -> list[Buffer | VswapError]:
        try:
            found: list[Buffer | VswapError] = await self._exchange(
                lambda: [self._server.get(read) for read in reads]
            )
        except VswapError as error:
            return [error] * len(reads)
        return found

    async def delete(self, names: Sequence[SegmentName]) -> None:
        keys = [name.key for name in names]

        def drop() -> None:
            for key in keys:
                self._server.segments.pop(key, None)

        await self._exchange(drop, changes=True)

    async def list(self, prefix: str) -> AsyncIterator[Listed]:
        keys: list[str] = await self._exchange(
            lambda: [key for key in self._server.segments if key.startswith(prefix)]
        )
        for start in range(0, len(keys), 100):
            for key in keys[start : start + 100]:
                data = self._server.segments.get(key)
                if data is not None:
                    yield Listed(key, len(data))
            await asyncio.sleep(self._net.delay_s())

    async def usage(self) -> Usage:
        used = await self._exchange(lambda: sum(map(len, self._server.segments.values())))
        return Usage(used, None)

    async def life(self) -> str:
        return str(await self._exchange(lambda: self._server.life))

    async def _exchange(self, work: Callable[[], Any], *, changes: bool = False) -> Any:
        """Has the server do it. Raises TierUnavailable, or OutcomeUnknown where it ``changes``."""
        net, server, own = self._net, self._server, Process.current()
        there = server.process
        timeout_s = self._spec.timeout_s
        unsure: type[VswapError] = OutcomeUnknown if changes else TierUnavailable
        if not server.up or server.hits("error"):
            await asyncio.sleep(net.delay_s())
            raise TierUnavailable(f"{there.name} refuses")
        if net.is_cut(own, there):
            await asyncio.sleep(timeout_s)
            raise TierUnavailable(f"{there.name} cannot be reached")
        answer: asyncio.Future[Any] = net.loop.create_future()

        def settle(result: Any, error: VswapError | None) -> None:
            if answer.done():
                return
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(result)

        def act() -> None:
            result, error = None, None
            try:
                result = work()
            except VswapError as raised:
                error = raised
            if not (server.hits("lost") or net.is_cut(own, there)):
                net.later(own, delay(), settle, result, error)

        def delay() -> float:
            return net.delay_s() * (200 if server.hits("slow") else 1)

        late = timeout_s + server.rng.uniform(0, LATEST_S) if server.hits("late") else 0.0
        net.later(there, delay() + late, act)
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            raise unsure(f"{there.name} does not answer") from None
