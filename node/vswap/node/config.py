"""A node's configuration."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import psutil
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from vswap.node.spaces import DEFAULT_MAX_SLOTS, MIN_PAGE_BYTES, Limits
from vswap.tiers.spec import TierSpec
from vswap.wire import settings

_VARIABLES = {
    "VSWAP_NODE_NAME": "name",
    "VSWAP_NODE_LISTEN": "listen",
    "VSWAP_NODE_ADVERTISE": "advertise",
    "VSWAP_NODE_STATE_DIR": "state_dir",
    "VSWAP_NODE_INSECURE": "insecure",
    "VSWAP_NODE_THREADS": "threads",
    "VSWAP_NODE_EXCLUSIVE_TIMEOUT_S": "exclusive_timeout_s",
    "VSWAP_NODE_LOG_LEVEL": "log_level",
    "VSWAP_COORDINATOR": "coordinator",
}


class SpaceConfig(BaseModel):
    """A space that exists from the start."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    page_bytes: int = MIN_PAGE_BYTES
    max_slots: int = DEFAULT_MAX_SLOTS
    quota_bytes: int = Field(default=0, ge=0)
    tiers: tuple[str, ...] = ()
    tier_max_bytes: dict[str, int] = {}

    @property
    def limits(self) -> Limits:
        return Limits(
            quota_bytes=self.quota_bytes, tiers=self.tiers, tier_max_bytes=self.tier_max_bytes
        )


class NodeConfig(BaseModel):
    """See ``deploy/node-a.toml`` for a commented sample."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")] = Field(
        default_factory=lambda: socket.gethostname().split(".")[0] or "node"
    )
    listen: str = "127.0.0.1:7171"
    advertise: str = ""
    """Address that the coordinator tells to clients; default: where the node listens."""
    coordinator: str = ""
    """Empty: the node works alone."""
    state_dir: str = ""
    """Default: ``$XDG_RUNTIME_DIR/vswap/NAME``, else ``/dev/shm/vswap-UID/NAME``."""
    insecure: bool = False
    fresh: bool = False
    threads: int = Field(default_factory=lambda: min(len(os.sched_getaffinity(0)), 8), ge=1, le=64)
    exclusive_timeout_s: float = Field(default=60.0, gt=0)
    inflight_bytes: int = Field(default=64 * 2**20, ge=2**20)
    """Page bytes of requests under way; further ones wait."""
    log_level: str = Field(default="info", pattern="^(debug|info|warning|error)$")
    tiers: tuple[TierSpec, ...] = Field(default_factory=lambda: (_default_tier(),), min_length=1)
    spaces: tuple[SpaceConfig, ...] = ()

    @model_validator(mode="after")
    def _distinct(self) -> NodeConfig:
        for what, names in (
            ("tier", [tier.name for tier in self.tiers]),
            ("space", [space.name for space in self.spaces]),
        ):
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise ValueError(f"{what} {twice.pop()!r} is named twice")
        for tier in self.tiers:
            if tier.scheme == "ram" and not tier.capacity_bytes:
                raise ValueError(f"tier {tier.name!r}: a RAM tier needs capacity_bytes")
        return self


def _default_tier() -> TierSpec:
    """Compressed RAM: an eighth of the machine's memory."""
    capacity = max(psutil.virtual_memory().total // 8, 64 * 2**20)
    return TierSpec(name="ram", url="ram://", codec="zstd:1", capacity_bytes=capacity, rank=0)


def load_config(
    file: Path | None, environ: Mapping[str, str], flags: Mapping[str, Any]
) -> NodeConfig:
    """File, then environment, then flags. Raises BadConfig naming source and key."""
    return settings.load(
        NodeConfig, file=file, environ=environ, flags=flags, variables=_VARIABLES,
        prefix="VSWAP_NODE_",
    )  # fmt: skip
