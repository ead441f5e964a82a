"""Request tags: a delayed duplicate of a request that its client gave up is refused.

See ``RequestTag`` in ``node.proto``: without this, a copy of an old store that sat in some buffer
could be admitted after a newer store of the same slot was acknowledged, and win.
"""

from __future__ import annotations

from collections import OrderedDict

from vswap.v1 import node_pb2
from vswap.wire.errors import StaleIncarnation

_MAX_SESSIONS = 65536


class Tags:
    """The highest ``oldest_open`` of each session; least recently seen sessions are forgotten."""

    def __init__(self) -> None:
        self._floor: OrderedDict[int, int] = OrderedDict()

    def admit(self, tag: node_pb2.RequestTag) -> None:
        """Raises StaleIncarnation for a request that its session has given up."""
        if not tag.session:
            return
        floor = max(self._floor.pop(tag.session, 0), tag.oldest_open)
        self._floor[tag.session] = floor
        if len(self._floor) > _MAX_SESSIONS:
            self._floor.popitem(last=False)
        if tag.number < floor:
            raise StaleIncarnation(
                f"request {tag.number} was given up by its client, which goes on from {floor}",
                number=tag.number,
            )
