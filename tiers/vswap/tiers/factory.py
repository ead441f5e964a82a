"""A tier's URL chooses its backend."""

from __future__ import annotations

from vswap.tiers.backend import Backend
from vswap.tiers.files import FileBackend
from vswap.tiers.objects import ObjectBackend
from vswap.tiers.redis import RedisBackend
from vswap.tiers.spec import TierSpec
from vswap.wire.errors import BadConfig


def make_backend(spec: TierSpec) -> Backend:
    """The backend for a tier, not yet opened. Raises BadConfig.

    ``ram://`` is not made here: it needs the node's shared memory.
    """
    match spec.scheme:
        case "redis" | "rediss" | "redis+unix":
            return RedisBackend(spec)
        case "file":
            return FileBackend(spec)
        case "s3" | "gs" | "az" | "memory":
            return ObjectBackend(spec)
    raise BadConfig(f"tier {spec.name}: {spec.scheme}:// lives in a node only", key="url")
