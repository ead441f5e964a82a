"""The coordinator's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vswap.coordinator.balance import Policy
from vswap.tiers.spec import TierSpec
from vswap.wire import settings

_VARIABLES = {
    "VSWAP_COORDINATOR_LISTEN": "listen",
    "VSWAP_COORDINATOR_STATE_DIR": "state_dir",
    "VSWAP_COORDINATOR_LEASE_S": "lease_s",
    "VSWAP_COORDINATOR_INSECURE": "insecure",
    "VSWAP_COORDINATOR_LOG_LEVEL": "log_level",
}


class BalanceConfig(BaseModel):
    """Moving pages down by itself from a tier above its high watermark."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    enabled: bool = True


class CompactionConfig(BaseModel):
    """Compacting a tier by itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    enabled: bool = True
    below_utilisation: float = Field(default=0.5, gt=0, lt=1)
    """Live bytes over stored bytes."""
    min_garbage_bytes: int = Field(default=64 * 2**20, ge=0)


class RepairConfig(BaseModel):
    """Writing degraded segments of redundant tiers again by itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    enabled: bool = True
    rate_bytes_s: int = Field(default=64 * 2**20, ge=0)
    """Over all nodes; 0 = no limit."""


class CoordinatorConfig(BaseModel):
    """See ``deploy/coordinator.toml`` for a commented sample."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    listen: str = "127.0.0.1:7070"
    state_dir: str = ""
    """Default: ``$XDG_STATE_HOME/vswap/coordinator``, else below ``~/.local/state``."""
    lease_s: float = Field(default=10.0, ge=0.2, le=3600)
    insecure: bool = False
    log_level: str = Field(default="info", pattern="^(debug|info|warning|error)$")
    tiers: tuple[TierSpec, ...] = ()
    """Registered where no tier of that name is known; what operators changed stays."""
    balance: BalanceConfig = BalanceConfig()
    compaction: CompactionConfig = CompactionConfig()
    repair: RepairConfig = RepairConfig()

    @model_validator(mode="after")
    def _tiers(self) -> CoordinatorConfig:
        names = [tier.name for tier in self.tiers]
        for tier in self.tiers:
            if names.count(tier.name) > 1:
                raise ValueError(f"tier {tier.name!r} is named twice")
            if tier.scheme in ("ram", "memory"):
                raise ValueError(
                    f"tier {tier.name!r}: {tier.scheme}:// lives inside one process and cannot be "
                    "shared; configure it at the nodes"
                )
        return self

    @property
    def policy(self) -> Policy:
        return Policy(
            balance=self.balance.enabled,
            compact=self.compaction.enabled,
            compact_below_utilisation=self.compaction.below_utilisation,
            compact_min_garbage_bytes=self.compaction.min_garbage_bytes,
            repair=self.repair.enabled,
            repair_rate_bytes_s=self.repair.rate_bytes_s,
        )


def load_config(
    file: Path | None, environ: Mapping[str, str], flags: Mapping[str, Any]
) -> CoordinatorConfig:
    """File, then environment, then flags. Raises BadConfig naming source and key."""
    return settings.load(
        CoordinatorConfig,
        file=file,
        environ=environ,
        flags=flags,
        variables=_VARIABLES,
        prefix="VSWAP_COORDINATOR_",
    )


def state_directory(environ: Mapping[str, str]) -> Path:
    """Where state lies that outlives the host."""
    base = environ.get("XDG_STATE_HOME")
    root = Path(base) if base and Path(base).is_absolute() else Path.home() / ".local" / "state"
    return root / "vswap" / "coordinator"
