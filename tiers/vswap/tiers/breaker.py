"""A circuit breaker: when to leave a server alone that does not answer, and when to try it again.

Pure: no I/O, no tasks; clock and chance are handed in::

    closed     calls go through; a few failures in a row open it
    open       no call goes through until a pause is over, which doubles each time, with jitter
    half open  one call goes through: if it succeeds the breaker closes, else it opens again

Whoever calls holds the number that :meth:`Breaker.begin` gave, and tells with it how the call
ended. What began before the breaker opened is old news and changes nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable

FAILURES = 3
"""In a row. One alone may be chance, and must not fail its neighbours."""

_FIRST_S = 0.2
_MOST_S = 10.0


class Breaker:
    """Of one server. Not thread-safe."""

    def __init__(self, clock: Callable[[], float], rng: random.Random) -> None:
        self._clock = clock
        self._rng = rng
        self._failures = 0
        self._opened = 0
        """How often in a row it opened; 0 = closed."""
        self._until = 0.0
        self._probing = False
        self._round = 0

    @property
    def is_open(self) -> bool:
        """Open or half open: not every call goes through."""
        return self._opened > 0

    @property
    def retry_after_s(self) -> float:
        """How long to wait before it is worth asking again."""
        return max(self._until - self._clock(), 0.0) if self._opened else 0.0

    def begin(self) -> int | None:
        """May a call go through? The number to tell its end with; None = no."""
        if self._opened:
            if self._probing or self._clock() < self._until:
                return None
            self._probing = True
        return self._round

    def succeeded(self, call: int) -> None:
        if call == self._round:
            self._failures = self._opened = 0
            self._probing = False

    def failed(self, call: int) -> None:
        if call != self._round:
            return
        self._failures += 1
        if self._probing or self._failures >= FAILURES:
            pause = min(_FIRST_S * 2 ** min(self._opened, 10), _MOST_S)
            self._until = self._clock() + pause * self._rng.uniform(0.5, 1.0)
            self._opened += 1
            self._probing = False
            self._round += 1

    def dropped(self, call: int) -> None:
        """The call ended without telling anything: it was cancelled."""
        if call == self._round:
            self._probing = False

    def reset(self) -> None:
        """The server was found well by other means."""
        self._failures = self._opened = 0
        self._probing = False
        self._round += 1
