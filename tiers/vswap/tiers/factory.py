"""A tier's URLs choose its backend."""

from __future__ import annotations

from collections.abc import Callable

from vswap.tiers.backend import Backend
from vswap.tiers.files import FileBackend
from vswap.tiers.objects import ObjectBackend
from vswap.tiers.redis import RedisBackend
from vswap.tiers.redundancy.base import Member, Redundant
from vswap.tiers.redundancy.coded import Coded
from vswap.tiers.redundancy.mirrored import Mirrored
from vswap.tiers.spec import TierSpec
from vswap.wire.errors import BadConfig


def make_backend(spec: TierSpec) -> Backend:
    """The backend for a tier, not yet opened. Raises BadConfig.

    ``ram://`` is not made here: it needs the node's shared memory.
    """
    return make_redundant(spec, make_single) if spec.redundant else make_single(spec)


def make_single(spec: TierSpec) -> Backend:
    """The backend for a tier of one server."""
    match spec.scheme:
        case "redis" | "rediss" | "redis+unix":
            return RedisBackend(spec)
        case "file":
            return FileBackend(spec)
        case "s3" | "gs" | "az" | "memory":
            return ObjectBackend(spec)
    raise BadConfig(f"tier {spec.name}: {spec.scheme}:// lives in a node only", key="url")


def make_redundant(spec: TierSpec, make: Callable[[TierSpec], Backend]) -> Redundant:
    """The backend for a tier of several servers; ``make`` makes that of each."""
    members = [Member(member.safe_url, make(member)) for member in spec.members()]
    data, _ = spec.shape
    if data == 1:
        return Mirrored(members, verify_writes=spec.verify_writes)
    return Coded(members, data, verify_writes=spec.verify_writes)
