"""What a doomed node needs, with every crash point in it; imported once, then forked."""

from __future__ import annotations

from chaos import points

points.plant()

import vswap.node.daemon  # noqa: E402, F401
from vswap.cli.main import main  # noqa: E402

__all__ = ["main"]
