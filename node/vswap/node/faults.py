"""Faults on purpose: which tiers of this node misbehave, and how. See ``wrappers/faulty.py``.

A plan is for a tier as a whole, or, as ``red/2``, for one server of a redundant tier, counted from
1 as in its URLs: then one copy lies, and the others do not.

Only in a node that was started for it; any other node has no such wrapper and refuses plans.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

import structlog

from vswap.tiers.backend import Backend
from vswap.tiers.redundancy.base import Redundant
from vswap.tiers.wrappers.faulty import FaultPlan, Faulty
from vswap.wire.errors import BadConfig

OFF = ("", "off")
_TARGET = re.compile(r"([a-z0-9][a-z0-9_-]{0,30})(?:/([1-9][0-9]?))?")

logger = structlog.get_logger("vswap.node.faults")


def split(target: str) -> tuple[str, int]:
    """The tier of ``red`` or ``red/2``, and which of its servers is meant; 0: all of it.

    Raises BadConfig.
    """
    found = _TARGET.fullmatch(target)
    if found is None:
        raise BadConfig(f"fault plan for {target!r}: say TIER, or TIER/1 for its first server")
    return found[1], int(found[2] or 0)


class Faults:
    """Plans by tier or server, as text. What gets a plan may come later. Event loop only."""

    def __init__(self, plans: Mapping[str, str]) -> None:
        """Raises BadConfig for a plan that cannot be read."""
        self._plans: dict[str, FaultPlan] = {}
        self._faulty: dict[str, Faulty] = {}
        self.plans: dict[str, str] = {}
        """Those in force, as they were given."""
        for tier, text in plans.items():
            self.set(tier, text)

    def set(self, tier: str, text: str) -> str:
        """Exchanges the plan of a tier or server ("off": none); returns the one before, or "".

        Raises BadConfig.
        """
        split(tier)
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
        """The backend of a tier, misbehaving as planned, now or later; so do its servers."""
        if isinstance(backend, Redundant):
            for place, member in enumerate(backend.members):
                member.backend = self.wrap_server(tier, place, member.backend)
        return self._wrap(tier, backend)

    def wrap_server(self, tier: str, place: int, backend: Backend) -> Faulty:
        """The backend of a redundant tier's server, places counted from 0."""
        return self._wrap(f"{tier}/{place + 1}", backend)

    def _wrap(self, tier: str, backend: Backend) -> Faulty:
        faulty = Faulty(backend, self._plans.get(tier, FaultPlan()))
        self._faulty[tier] = faulty
        return faulty

    def forget(self, tier: str) -> None:
        """The tier is gone; its plans stay, for one that takes its name."""
        for target in [target for target in self._faulty if split(target)[0] == tier]:
            del self._faulty[target]

    def counters(self) -> Counter[str]:
        """What was injected since start: ``{tier or server}_injected_{fault}``."""
        return Counter(
            {
                f"{tier}_injected_{fault}": count
                for tier, faulty in self._faulty.items()
                for fault, count in faulty.injected.items()
            }
        )
