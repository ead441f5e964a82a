"""Decides whether a failed attempt is repeated, and after how long. No I/O, no clock of its own.

Every call of vswap may be repeated. What needs care is what a caller is told in the end: after an
attempt whose outcome is unknown, no later refusal proves that nothing was written.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from vswap.wire.errors import OutcomeUnknown, TierUnavailable, Unreachable, VswapError

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 2.0


@dataclass(frozen=True, slots=True)
class Policy:
    """``deadline_s`` bounds one attempt; ``retry_s`` the time in which attempts may begin."""

    deadline_s: float = 30.0
    retry_s: float = 10.0

    def __post_init__(self) -> None:
        if self.deadline_s <= 0 or self.retry_s < 0:
            raise ValueError("deadline_s must be above 0 and retry_s not below 0")


class Attempts:
    """The attempts of one call. ``writes``: the call changes pages."""

    def __init__(self, policy: Policy, *, writes: bool, now_s: float) -> None:
        self._until_s = now_s + policy.retry_s
        self._retries = policy.retry_s > 0
        self._writes = writes
        self._pause_s = FIRST_PAUSE_S
        self._doubt: OutcomeUnknown | None = None

    def pause_s(self, error: VswapError, now_s: float) -> float:
        """Seconds to wait before the next attempt; raises the final error if there is none.

        Exponential with full jitter, so that many clients do not come back in step.
        """
        if isinstance(error, OutcomeUnknown):
            self._doubt = error
        passing = isinstance(error, (OutcomeUnknown, TierUnavailable, Unreachable))
        if not passing or not self._retries or now_s >= self._until_s:
            raise self._final(error)
        pause_s = min(random.uniform(0.5, 1.0) * self._pause_s, self._until_s - now_s)
        self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)
        return pause_s

    def _final(self, error: VswapError) -> VswapError:
        if not self._writes or self._doubt is None or isinstance(error, OutcomeUnknown):
            return error
        return OutcomeUnknown(
            f"an earlier attempt may have happened ({self._doubt.message}); then: {error.message}",
            **{key: value for key, value in error.fields.items() if key != "slots_count"},
        )
