"""A node's configuration."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import psutil
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    StringConstraints,
    model_validator,
)

from vswap.node.faults import split
from vswap.node.spaces import DEFAULT_MAX_SLOTS, MIN_PAGE_BYTES, Limits, check_name, check_shape
from vswap.tiers.spec import TierName, TierSpec
from vswap.tiers.wrappers.faulty import FaultPlan
from vswap.wire import settings
from vswap.wire.errors import BadConfig, InvalidRequest
from vswap.wire.listen import check_address

_VARIABLES = {
    "VSWAP_NODE_NAME": "name",
    "VSWAP_NODE_LISTEN": "listen",
    "VSWAP_NODE_ADVERTISE": "advertise",
    "VSWAP_NODE_NBD": "nbd",
    "VSWAP_NODE_STATE_DIR": "state_dir",
    "VSWAP_NODE_INSECURE": "insecure",
    "VSWAP_NODE_SWAP_SAFE": "swap_safe",
    "VSWAP_NODE_THREADS": "threads",
    "VSWAP_NODE_SCRUB_BYTES_S": "scrub_bytes_s",
    "VSWAP_NODE_SCRUB_INTERVAL_S": "scrub_interval_s",
    "VSWAP_NODE_EXCLUSIVE_TIMEOUT_S": "exclusive_timeout_s",
    "VSWAP_NODE_LOG_LEVEL": "log_level",
    "VSWAP_COORDINATOR": "coordinator",
}


def _valid(check: Callable[[Any], Any]) -> AfterValidator:
    """A check of ours as one of pydantic's, which adds the key."""

    def validate(value: Any) -> Any:
        try:
            if value:
                check(value)
        except (InvalidRequest, BadConfig) as error:
            raise ValueError(error.message) from error
        return value

    return AfterValidator(validate)


Address = Annotated[str, _valid(check_address)]
FaultTarget = Annotated[str, _valid(split)]
FaultPlanText = Annotated[str, _valid(FaultPlan.parse)]


def _split(value: Any) -> Any:
    """A list as an environment variable can say it: with commas."""
    return tuple(filter(None, value.split(","))) if isinstance(value, str) else value


class SpaceConfig(BaseModel):
    """A space that exists from the start."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, _valid(check_name)] = Field(min_length=1)
    page_bytes: int = MIN_PAGE_BYTES
    max_slots: int = DEFAULT_MAX_SLOTS
    quota_bytes: NonNegativeInt = 0
    tiers: tuple[TierName, ...] = ()
    tier_max_bytes: dict[TierName, NonNegativeInt] = {}

    @model_validator(mode="after")
    def _shape(self) -> SpaceConfig:
        try:
            check_shape(self.page_bytes, self.max_slots)
        except InvalidRequest as error:
            raise ValueError(error.message) from error
        return self

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
    listen: Address = "127.0.0.1:7171"
    advertise: Address = ""
    """Address that the coordinator tells to clients; default: where the node listens."""
    nbd: Annotated[tuple[Address, ...], BeforeValidator(_split)] | None = None
    """Where spaces are block devices; default: ``nbd.sock`` in the state directory; empty: none."""
    coordinator: Address = ""
    """Empty: the node works alone."""
    state_dir: str = ""
    """Default: ``$XDG_RUNTIME_DIR/vswap/NAME``, else ``/dev/shm/vswap-UID/NAME``."""
    insecure: bool = False
    fresh: bool = False
    swap_safe: bool = False
    """Lock memory and the like, so that this machine itself may swap on the node."""
    threads: int = Field(default_factory=lambda: min(len(os.sched_getaffinity(0)), 8), ge=1, le=64)
    scrub_bytes_s: NonNegativeInt = 4 * 2**20
    scrub_interval_s: float = Field(default=86400.0, ge=600, le=366 * 86400)
    """From the start of one pass to that of the next."""
    exclusive_timeout_s: float = Field(default=60.0, gt=0, le=86400)
    inflight_bytes: int = Field(default=64 * 2**20, ge=2**20)
    """Page bytes of requests under way; further ones wait."""
    log_level: str = Field(default="info", pattern="^(debug|info|warning|error)$")
    faults: dict[FaultTarget, FaultPlanText] = {}
    """Fault plans by tier, or server (``red/2``), also of what the cluster has yet to tell of."""
    allow_faults: bool = False
    """Plans may be set while the node runs; so they may if it was started with one."""
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
        for tier in self.tiers:
            if tier.scheme == "ram" and tier.name in {split(target)[0] for target in self.faults}:
                raise ValueError(f"tier {tier.name!r} is RAM, which cannot be made to misbehave")
        known = {tier.name for tier in self.tiers}
        servers = {f"{t.name}/{n + 1}" for t in self.tiers for n in range(len(t.urls))}
        stranger = min(set(self.faults) - known - servers, default=None)
        if stranger is not None and (not self.coordinator or split(stranger)[0] in known):
            raise ValueError(f"fault plan: no tier or server named {stranger!r}")
        for space in self.spaces:
            unknown = {*space.tiers, *space.tier_max_bytes} - known
            # With a coordinator they may be the cluster's, which we do not know yet.
            if unknown and not self.coordinator:
                raise ValueError(f"space {space.name!r}: no tier named {min(unknown)!r}")
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
