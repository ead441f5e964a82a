"""What a restart does with each segment row that the last life left.

============  ==================================================================================
OPEN          a block of RAM: kept if anything points at it (no longer appended to), else freed
WRITING       never acknowledged: deleted on the backend, again once it cannot land any more
SEALED        kept if anything points at it, else deleted
DELETING      deleted again, until confirmed
============  ==================================================================================

An entry that points at a row in no readable state means that the state is broken: refused, loudly.
"""

from __future__ import annotations

import numpy as np
import structlog

from vswap.node import entry
from vswap.node.handles import DELETING, Handles
from vswap.node.ledger import Ledger
from vswap.node.reaper import Reaper
from vswap.node.spaces import Spaces
from vswap.node.tier import TierState
from vswap.node.tiers import Tiers
from vswap.wire.errors import StateInvalid

logger = structlog.get_logger("vswap.node.recover")


def recount(ledger: Ledger) -> None:
    """Rebuilds the books from the tables, before anything there is touched.

    Raises StateInvalid where the tables contradict the rows.
    """
    strays = ledger.recount()
    if len(strays):
        raise StateInvalid(
            f"{len(strays)} entries point at segments that do not exist "
            f"(first: tag {int(entry.tags(strays)[0])}, handle {int(entry.handles(strays)[0])}); "
            "the state is damaged; --fresh starts empty",
        )


def recover(handles: Handles, ledger: Ledger, spaces: Spaces, tiers: Tiers, reaper: Reaper) -> None:
    """Takes up the state of an earlier life, once it is counted. Synchronous; before any request is
    served."""
    known = {tier.tag: tier for tier in tiers}
    kept = dropped = 0
    in_use = handles.in_use()
    oldest_first = in_use[np.argsort(handles.rows["born"][in_use], kind="stable")]
    for handle in oldest_first.tolist():
        row = handles.rows[handle]
        tier = known.get(int(row["tag"]))
        if tier is None:
            if handles.live_records[handle]:
                raise StateInvalid(
                    f"{int(handles.live_records[handle])} pages lie in a tier that is no longer "
                    "configured; configure it again, or start with --fresh"
                )
            handles.recycle(handle)
            continue
        live = bool(handles.live_records[handle])
        tier.segments[handle] = None
        tier.charge(int(row["stored"]))
        if live:
            kept += 1
            if tier.ram is not None:
                tier.ram.adopt(tier.segment_name(handle), int(row["block"]))
            continue
        dropped += 1
        if tier.ram is not None:
            del tier.segments[handle]
            tier.credit(int(row["stored"]))
            handles.recycle(handle)
        else:
            handles.set_state(handle, DELETING)
            reaper.delete_later(handle, may_land=True)
    for tier in tiers:
        if not tier.local:
            # A tier that takes no pages may have become another one while this node was down.
            active = tier.state is TierState.ACTIVE
            granted = int(handles.granted[tier.tag]) if active else 0
            tier.grant(max(granted, tier.stored_bytes))
    logger.info(
        "took up the last life's pages",
        pages=int(ledger.pages_by_tag.sum()), segments=kept, dropped_segments=dropped,
        spaces=len(spaces),
    )  # fmt: skip
