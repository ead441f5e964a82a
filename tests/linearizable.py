"""Whether a recorded history of one slot could have happened to a single copy, one step at a time.

Independent of the product. Operations overlap where their times do; one whose outcome is unknown
(the reply was lost, the client gave up) may take effect at any time after it began, or never.
The search is Wing and Gong's, with Lowe's memory of what was tried.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

STORE, LOAD = "store", "load"


@dataclass(frozen=True, slots=True)
class Operation:
    """``value`` is what was stored or loaded; None stands for no page (a free is a store of it).

    ``ended`` is infinite where the outcome is unknown. ``repeats``: whoever stored got no answer
    and asked again, so that until it ended it may have taken effect more than once.
    """

    kind: str
    value: int | None
    began: float
    ended: float = math.inf
    repeats: bool = False


def linearizable(history: Iterable[Operation], first: int | None = None) -> bool:
    """Whether there is an order of these operations that keeps to their times and in which every
    load returns what the latest store before it stored. ``first`` is there at the beginning."""
    # A load that never returned says nothing.
    operations = sorted(
        (op for op in history if op.kind == STORE or op.ended < math.inf),
        key=lambda op: op.began,
    )
    must = sum(1 << i for i, op in enumerate(operations) if op.ended < math.inf)
    tried: set[tuple[int, int | None]] = set()
    stack: list[tuple[int, int | None]] = [(0, first)]
    while stack:
        done, value = stack.pop()
        if done & must == must:
            return True
        if (done, value) in tried:
            continue
        tried.add((done, value))
        latest = min(
            op.ended for i, op in enumerate(operations) if not done >> i & 1 and must >> i & 1
        )
        for i, op in enumerate(operations):
            if op.began > latest:
                break
            if done >> i & 1 or (op.kind == LOAD and op.value != value):
                continue
            stack.append((done | 1 << i, op.value if op.kind == STORE else value))
            if op.repeats:
                stack.append((done, op.value))
    return False
