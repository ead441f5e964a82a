"""The checker of histories against all orders there are."""

from __future__ import annotations

import math
from itertools import permutations

from hypothesis import given
from hypothesis import strategies as st
from linearizable import LOAD, STORE, Operation, linearizable


def brute(history: list[Operation]) -> bool:
    """Tries every order of every choice of the stores that may never have happened."""
    history = [op for op in history if op.kind == STORE or op.ended < math.inf]
    unsure = [i for i, op in enumerate(history) if op.ended == math.inf]
    for choice in range(1 << len(unsure)):
        left = {i for bit, i in enumerate(unsure) if choice >> bit & 1}
        ops = [op for i, op in enumerate(history) if i not in left]
        if any(_right(order) for order in permutations(ops)):
            return True
    return False


def _right(order: tuple[Operation, ...]) -> bool:
    value = None
    for i, op in enumerate(order):
        if any(later.ended < op.began for later in order[i + 1 :]):
            return False
        if op.kind == STORE:
            value = op.value
        elif op.value != value:
            return False
    return True


@st.composite
def operations(draw: st.DrawFn) -> Operation:
    kind = draw(st.sampled_from([STORE, LOAD]))
    began = draw(st.integers(0, 10))
    length = draw(st.integers(1, 6))
    ended = math.inf if draw(st.integers(0, 4)) == 0 else began + length
    return Operation(kind, draw(st.sampled_from([None, 1, 2])), began, ended)


@given(st.lists(operations(), max_size=6))
def test_agrees_with_all_orders(history: list[Operation]) -> None:
    assert linearizable(history) == brute(history)


def test_what_must_not_happen() -> None:
    first, second = Operation(STORE, 1, 0, 1), Operation(STORE, 2, 2, 3)
    assert linearizable([first, second, Operation(LOAD, 2, 4, 5)])
    assert not linearizable([first, second, Operation(LOAD, 1, 4, 5)]), "stale"
    assert not linearizable([first, Operation(LOAD, None, 2, 3)]), "lost"
    assert not linearizable([first, Operation(LOAD, 7, 2, 3)]), "from nowhere"
    assert linearizable([first, Operation(LOAD, 1, 2, 9), Operation(STORE, 2, 3, 4)]), "concurrent"


def test_a_lost_reply_may_take_effect_late_once() -> None:
    lost = Operation(STORE, 2, 2)
    before = [Operation(STORE, 1, 0, 1), lost]
    assert linearizable([*before, Operation(LOAD, 1, 3, 4), Operation(LOAD, 2, 5, 6)])
    back = [Operation(LOAD, 2, 3, 4), Operation(LOAD, 1, 5, 6)]
    assert not linearizable([*before, *back]), "and back again"


def test_a_store_that_was_repeated_may_take_effect_twice() -> None:
    rest = [Operation(LOAD, 1, 1, 2), Operation(STORE, 2, 3, 4), Operation(LOAD, 1, 5, 6)]
    assert linearizable([Operation(STORE, 1, 0, 9, repeats=True), *rest])
    assert not linearizable([Operation(STORE, 1, 0, 9), *rest])
    late = [Operation(STORE, 2, 10, 11), Operation(LOAD, 1, 12, 13)]
    assert not linearizable([Operation(STORE, 1, 0, 9, repeats=True), *late]), "not after its end"


def test_long_histories_are_quick() -> None:
    history = [Operation(STORE, i, i, i + 3.5) for i in range(2000)]
    history += [Operation(LOAD, i, i + 3.6, i + 3.7) for i in range(0, 2000, 50)]
    assert linearizable(history)
