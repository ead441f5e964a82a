"""Faults on purpose: which tiers of this node misbehave, and how. See ``wrappers/faulty.py``.

Only in a node that was started for it; any other node has no such wrapper and refuses plans.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import structlog

from vswap.tiers.backend import Backend
from vswap.tiers.wrappers.faulty import FaultPlan, Faulty

OFF = ("", "off")

logger = structlog.get_logger("vswap.node.faults")


class Faults:
    """Plans by tier, as text. A tier may get its plan before it is there. Event loop only."""

    def __init__(self, plans: Mapping[str, str]) -> None:
        """Raises BadConfig for a plan that cannot be read."""
        self._plans: dict[str, FaultPlan] = {}
        self._faulty: dict[str, Faulty] = {}
        self.plans: dict[str, str] = {}
        """Those in force, as they were given."""
        for tier, text in plans.items():
            self.set(tier, text)

    def set(self, tier: str, text: str) -> str:
        """Exchanges a tier's plan ("off": none) and returns the one before, "" for none.

        Raises BadConfig.
        """
        plan = FaultPlan() if text in OFF else FaultPlan.parse(text)
        before = self.plans.pop(tier, "")
        self._plans[tier] = plan
        if text not in OFF:
            self.plans[tier] = text
        if tier in self._faulty:
            self._faulty[tier].restart(plan)
        if before or tier in self.plans:
            logger.warning("fault plan", tier=tier, plan=self.plans.get(tier, "off"))
        return before

    def wrap(self, tier: str, backend: Backend) -> Faulty:
        """The backend of a tier, misbehaving as planned, now or later."""
        faulty = Faulty(backend, self._plans.get(tier, FaultPlan()))
        self._faulty[tier] = faulty
        return faulty

    def forget(self, tier: str) -> None:
        """The tier is gone; its plan stays, for one that takes its name."""
        self._faulty.pop(tier, None)

    def counters(self) -> Counter[str]:
        """What was injected since start: ``{tier}_injected_{fault}``."""
        return Counter(
            {
                f"{tier}_injected_{fault}": count
                for tier, faulty in self._faulty.items()
                for fault, count in faulty.injected.items()
            }
        )
