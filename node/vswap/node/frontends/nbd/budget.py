"""The bytes that all clients' requests may hold together."""

from __future__ import annotations

from collections.abc import Callable


class Budget:
    """Who finds it spent stops reading from its client, and is told once there is room again.

    It may be overdrawn by what each connection had in its buffer at that moment.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._left = limit_bytes
        self._limit = limit_bytes
        self._waiting: dict[Callable[[], None], None] = {}

    @property
    def spent(self) -> bool:
        return self._left <= 0

    @property
    def held_bytes(self) -> int:
        return self._limit - self._left

    def take(self, amount_bytes: int) -> None:
        self._left -= amount_bytes

    def give(self, amount_bytes: int) -> None:
        self._left += amount_bytes
        if self._left > 0 and self._waiting:
            waiting, self._waiting = self._waiting, {}
            for resume in waiting:
                resume()

    def tell(self, resume: Callable[[], None]) -> None:
        """Calls ``resume`` once, when there is room."""
        self._waiting[resume] = None

    def forget(self, resume: Callable[[], None]) -> None:
        self._waiting.pop(resume, None)
