"""The coordinator's own connections to the tiers' servers: to check, list and sweep, never to move.

A connection is made when it is first needed and given up after an error, so that a server that was
away is met afresh.
"""

from __future__ import annotations

from collections.abc import Callable

from vswap.coordinator.state import Found
from vswap.tiers.backend import Backend, SegmentName
from vswap.tiers.redundancy.base import Redundant
from vswap.tiers.spec import TierSpec
from vswap.wire.errors import VswapError

_BATCH = 256


class Backends:
    """Event loop only. One connection pool per tier name."""

    def __init__(self, make_backend: Callable[[TierSpec], Backend]) -> None:
        self._make_backend = make_backend
        self._open: dict[str, Backend] = {}

    async def examine(self, spec: TierSpec) -> int | None:
        """Opens a tier that is to be added, and closes it again.

        Returns the server's own limit in bytes, None if it names none. Raises TierUnavailable,
        BackendRefused, BadConfig.
        """
        backend = self._make_backend(spec)
        try:
            await backend.open()
            if isinstance(backend, Redundant):
                backend.check_all_up()
            return (await backend.usage()).limit_bytes
        finally:
            await backend.close()

    async def list(self, spec: TierSpec, prefix: str, *, every_server: bool) -> list[Found]:
        """What lies under a prefix, summed per shard. Raises TierUnavailable (also where one server
        of a redundant tier is away, if ``every_server`` is wanted), BackendRefused."""
        sums: dict[str, tuple[int, int]] = {}
        try:
            backend = await self._get(spec)
            async for listed in backend.list(prefix):
                name = SegmentName.parse(listed.key)
                if name is not None:
                    owner = f"vswap/{name.cluster}/{name.shard}/"
                    segments, size = sums.get(owner, (0, 0))
                    sums[owner] = (segments + 1, size + listed.bytes)
            if every_server and isinstance(backend, Redundant):
                backend.check_all_up()
        except VswapError:
            await self.drop(spec.name)
            raise
        return [Found(owner, *total) for owner, total in sorted(sums.items())]

    async def delete(self, spec: TierSpec, prefix: str) -> tuple[int, int]:
        """Deletes all segments under a prefix; returns (segments, bytes). Raises VswapError."""
        try:
            backend = await self._get(spec)
            names: list[SegmentName] = []
            size = 0
            async for listed in backend.list(prefix):
                name = SegmentName.parse(listed.key)
                if name is not None:
                    names.append(name)
                    size += listed.bytes
            for start in range(0, len(names), _BATCH):
                await backend.delete(names[start : start + _BATCH])
            # Of a shard that is no more nobody would ever sweep what a server kept.
            if isinstance(backend, Redundant):
                backend.check_all_up()
        except VswapError:
            await self.drop(spec.name)
            raise
        return len(names), size

    async def drop(self, name: str) -> None:
        backend = self._open.pop(name, None)
        if backend is not None:
            await backend.close()

    async def close(self) -> None:
        for name in list(self._open):
            await self.drop(name)

    async def _get(self, spec: TierSpec) -> Backend:
        backend = self._open.get(spec.name)
        if isinstance(backend, Redundant) and backend.down:
            await self.drop(spec.name)
            backend = None
        if backend is None:
            backend = self._make_backend(spec)
            try:
                await backend.open()
            except BaseException:
                await backend.close()
                raise
            # Two callers at once: the later connection is the one that stays.
            await self.drop(spec.name)
            self._open[spec.name] = backend
        return backend
