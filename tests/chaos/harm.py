"""Harm that costs pages: a node is killed while it gives them up, and comes to the same end."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
from chaos import pages
from chaos.cluster import MIB, Cluster

from vswap.cli.embedded import EmbeddedRedis, free_port
from vswap.client.sync import Space
from vswap.v1.common_pb2 import TierSpec
from vswap.v1.coordinator_pb2 import JobSpec
from vswap.wire.errors import PageCorrupt, PageLost, VswapError

_SLOTS = 48
_BATCH = 12
"""Of which each is a segment of its own."""
_IN_THE_FIRST_RECORD = 40
_names = itertools.count()


def suffer(cluster: Cluster, harm: str, root: Path, die: Callable[[], None]) -> None:
    """Harms a tier and drains it, while ``die`` has the node killed and started again.

    ``harm``: "damage" (a byte of a record in every segment is wrong) or "loss" (the server comes
    back empty). Raises AssertionError unless exactly the pages that were harmed end as an error.
    """
    name = f"harmed{next(_names)}"
    directory, server = root / name, None
    url = f"file://{directory}"
    if harm == "loss":
        server = EmbeddedRedis(maxmemory_bytes=100 * MIB, port=free_port()).start()
        cluster.servers.append(server)
        url = server.url
    # So slow that nobody else's pages come there.
    spec = TierSpec(name=name, url=url, rank=90, capacity_bytes=100 * MIB, timeout_s=2)
    cluster.operator.add_tier(spec)
    with cluster.connect() as client:
        cluster.until(
            lambda: any(t.limit_bytes for t in client.status().tiers if t.tier == name)
        )  # fmt: skip
        space = client.create_space(name, max_slots=_SLOTS, tiers=[name])
        every = range(_SLOTS)
        for start in range(0, _SLOTS, _BATCH):
            batch = range(start, start + _BATCH)
            space.store(np.array(batch, np.uint64), pages.many(dict.fromkeys(batch, 1)))
        client.set_space(name, tiers=[name, "disk"])
    if server is not None:
        server.kill()
        server.start()
        harmed = _SLOTS
    else:
        harmed = _damage(directory)
    cluster.operator.start_job(JobSpec(kind="MOVE_KIND_DRAIN", tier=name, lost=harm == "loss"))
    die()
    cluster.until(lambda: name not in {job.spec.tier for job in cluster.operator.jobs()})
    wanted = PageLost if harm == "loss" else PageCorrupt
    with cluster.connect() as client:
        space = client.space(name)
        gone = sum(_is_gone(space, slot, wanted) for slot in every)
        assert gone == harmed, f"{gone} pages are {wanted.__name__}, {harmed} were harmed"
        space.store(np.array(every, np.uint64), pages.many(dict.fromkeys(every, 2)))
        assert not any(_is_gone(space, slot, wanted, version=2) for slot in every)
        space.free(np.array(every, np.uint64))
        client.delete_space(name)


def _damage(directory: Path) -> int:
    """Flips a bit of a record in every segment; returns in how many."""
    segments = [path for path in directory.rglob("*") if path.is_file()]
    for path in segments:
        data = bytearray(path.read_bytes())
        data[_IN_THE_FIRST_RECORD] ^= 1
        path.write_bytes(data)
    return len(segments)


def _is_gone(space: Space, slot: int, wanted: type[VswapError], *, version: int = 1) -> bool:
    """Whether its load fails like that. Raises AssertionError for another page than was stored."""
    try:
        [page] = space.load(np.array([slot], np.uint64))
    except wanted:
        return True
    assert pages.version_of(slot, page) == version
    return False
