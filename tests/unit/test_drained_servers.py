"""A drain ends once every server of its tier was swept."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vswap.node.directives import Directives
from vswap.wire.errors import TierUnavailable


class Sweeper:
    """Sweeps; meanwhile servers go down, or come back."""

    def __init__(self, backend: Any, down_after: int) -> None:
        self._backend, self._down_after = backend, down_after
        self.swept = 0

    async def sweep(self, tier: Any) -> int:
        self.swept += 1
        self._backend.down = self._down_after
        return 0


@pytest.mark.parametrize(("before", "after"), [(0b100, 0b100), (0b100, 0), (0, 0b010)])
async def test_a_server_that_is_away_holds_a_drain_up(before: int, after: int) -> None:
    """One that came back while the others were listed was not looked at either."""
    backend = SimpleNamespace(down=before)
    sweeper = Sweeper(backend, after)
    directives: Any = SimpleNamespace(_sweeper=sweeper)
    tier: Any = SimpleNamespace(name="red", redundant=backend)
    with pytest.raises(TierUnavailable, match="1 servers of tier red are away"):
        await Directives._sweep_all(directives, tier)
    assert sweeper.swept == 1


async def test_with_all_servers_there_it_ends() -> None:
    backend = SimpleNamespace(down=0)
    sweeper = Sweeper(backend, 0)
    directives: Any = SimpleNamespace(_sweeper=sweeper)
    for redundant in (backend, None):
        tier: Any = SimpleNamespace(name="red", redundant=redundant)
        await Directives._sweep_all(directives, tier)
    assert sweeper.swept == 2
