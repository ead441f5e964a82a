"""Victim choice: which segments to evacuate first. Pure functions over columns."""

from __future__ import annotations

import numpy as np

from vswap.tiers.record import I64, Mask


def cost_benefit(live: I64, stored: I64, age_s: np.ndarray) -> I64:
    """Indices of segments, best to clean first.

    Rosenblum and Ousterhout's rule for log-structured file systems: the space gained, times how
    long it will stay gained, over the cost of reading the segment and writing what is live:
    ``(1 - u) * age / (1 + u)``.
    """
    u = live / np.maximum(stored, 1)
    score = (1.0 - u) * np.maximum(age_s, 0.001) / (1.0 + u)
    return np.argsort(-score, kind="stable")


def below(live: I64, stored: I64, target: float) -> Mask:
    """Which segments must be rewritten for a tier to reach a target utilisation.

    Worst first, only as many as it takes: the rest is left alone, since each one costs a read and a
    write of what is live.
    """
    picked = np.zeros(len(live), np.bool_)
    total_live, total_stored = int(live.sum()), int(stored.sum())
    if not total_stored or total_live >= target * total_stored:
        return picked
    order = np.argsort(live / np.maximum(stored, 1), kind="stable")
    # Rewriting a segment replaces its stored bytes by its live bytes.
    left = total_stored - np.cumsum((stored - live)[order])
    enough = int(np.searchsorted(-left, -total_live / target))
    picked[order[: enough + 1]] = True
    return picked
