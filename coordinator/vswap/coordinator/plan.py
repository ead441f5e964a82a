"""The pure core: an event in, actions out.

Tests, the simulator and the daemon all run this. It does no I/O, reads no clock and draws no random
number; an event that cannot be done raises an error of ``vswap.wire.errors`` and leaves the state
as it was.
"""

from __future__ import annotations

from typing import assert_never

from vswap.coordinator import balance, drains, jobs, members, registry, sweeps
from vswap.coordinator.balance import Policy
from vswap.coordinator.events import (
    Action,
    ActivateTier,
    AddTier,
    CancelJob,
    Event,
    ForgetNode,
    Listed,
    NodeConnected,
    NodeDisconnected,
    NodeSaid,
    Now,
    RemoveTier,
    SetTier,
    StartJob,
    Swept,
    Tick,
)
from vswap.coordinator.state import State
from vswap.coordinator.turn import Turn

_DEFAULT = Policy()


def step(
    state: State, event: Event, now: Now, policy: Policy = _DEFAULT
) -> tuple[State, list[Action]]:
    """Works one event into the state (in place; returned for good form).

    The first action, if there is anything to write, is Persist: it must be on disk before any
    other is carried out.
    """
    turn = Turn(state, now)
    _apply(turn, event, policy)
    jobs.advance(turn)
    sweeps.pump(turn)
    return state, turn.finish()


def _apply(turn: Turn, event: Event, policy: Policy) -> None:
    match event:
        case NodeConnected():
            members.connect(turn, event)
        case NodeDisconnected():
            members.disconnect(turn, event)
        case NodeSaid():
            members.said(turn, event)
        case Tick():
            members.check_leases(turn)
            sweeps.look_now_and_then(turn)
            balance.consider(turn, policy, event.spare_id)
        case AddTier():
            registry.add(turn, event)
        case SetTier():
            registry.change(turn, event)
        case RemoveTier():
            registry.remove(turn, event)
        case ActivateTier():
            registry.activate(turn, event)
        case StartJob():
            jobs.start(turn, event)
        case CancelJob():
            jobs.cancel(turn, event)
        case ForgetNode():
            members.forget(turn, event)
        case Listed():
            if event.job:
                drains.listed(turn, event)
            else:
                sweeps.listed(turn, event)
        case Swept():
            sweeps.swept(turn, event)
        case _:
            assert_never(event)
