"""A tier's configuration: what an operator says about a backend."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlsplit, urlunsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from vswap.v1 import common_pb2
from vswap.wire.errors import BadConfig

TierName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,30}$")]

SCHEMES = ("ram", "redis", "rediss", "redis+unix", "file", "s3", "gs", "az", "memory")


class TierSpec(BaseModel):
    """One tier. Immutable; shares are 0..1; ``common.proto`` explains each field."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: TierName
    url: str
    codec: str = Field(default="zstd:1", pattern=r"^(zstd:-?\d{1,6}|lz4|none)$")
    capacity_bytes: int = Field(default=0, ge=0)
    rank: int = Field(default=100, ge=-1_000_000, le=1_000_000)
    high: float = Field(default=0.9, gt=0, le=1)
    low: float = Field(default=0.8, ge=0, lt=1)
    assert_noeviction: bool = False
    verify_writes: bool = False
    password_env: str = ""
    password_file: str = ""
    timeout_s: float = Field(default=5.0, gt=0, le=3600)

    @field_validator("url")
    @classmethod
    def _known_scheme(cls, url: str) -> str:
        scheme = urlsplit(url).scheme
        if scheme not in SCHEMES:
            raise ValueError(f"unknown scheme {scheme!r} (one of {', '.join(SCHEMES)})")
        return url

    @model_validator(mode="after")
    def _watermarks(self) -> TierSpec:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        return self

    @property
    def scheme(self) -> str:
        return urlsplit(self.url).scheme

    @property
    def safe_url(self) -> str:
        """The URL with its password redacted: the only form that is printed or logged."""
        return redacted(self.url)

    def resolved_url(self) -> str:
        """The URL with the password from ``password_env`` or ``password_file`` put in.

        Raises BadConfig where the variable or file is missing.
        """
        password = self.password()
        if password is None:
            return self.url
        parts = urlsplit(self.url)
        user = parts.username or ""
        host = parts.netloc.rpartition("@")[2]
        return urlunsplit(parts._replace(netloc=f"{user}:{quote(password, safe='')}@{host}"))

    def password(self) -> str | None:
        """The secret from ``password_env`` or ``password_file``; None where neither is set."""
        if self.password_env:
            value = os.environ.get(self.password_env)
            if value is None:
                raise BadConfig(
                    f"tier {self.name}: environment variable {self.password_env} is not set",
                    key="password_env",
                )
            return value
        if self.password_file:
            try:
                return Path(self.password_file).read_text().strip()
            except OSError as error:
                raise BadConfig(
                    f"tier {self.name}: cannot read password file {self.password_file}: "
                    f"{error.strerror}",
                    key="password_file",
                ) from error
        return None

    def to_proto(self, *, redact: bool = False) -> common_pb2.TierSpec:
        fields = self.model_dump()
        if redact:
            fields["url"] = self.safe_url
        return common_pb2.TierSpec(**fields)

    @classmethod
    def from_proto(cls, message: common_pb2.TierSpec) -> TierSpec:
        """Raises pydantic.ValidationError; proto3 zero values mean the default."""
        fields: dict[str, Any] = {f.name: value for f, value in message.ListFields()}
        if "rank" not in fields:
            fields["rank"] = message.rank
        return cls(**fields)


def redacted(url: str) -> str:
    """The URL without its password and without secrets in its query."""
    # Up to the last @: a password that was not percent-encoded may hold anything.
    url = re.sub(r"(://[^/?#@]*:).*@", r"\1***@", url)
    return re.sub(
        r"([?&][^=&]*(?:secret|password|token|key)[^=&]*=)[^&]*", r"\1***", url, flags=re.I
    )
