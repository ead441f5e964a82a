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

MAX_SERVERS = 15

_REDUNDANCY = re.compile(r"(none)|mirror:(\d{1,2})|rs:(\d{1,2})\+(\d{1,2})")

SCHEMES = ("ram", "redis", "rediss", "redis+unix", "file", "s3", "gs", "az", "memory")


class TierSpec(BaseModel):
    """One tier. Immutable; shares are 0..1; ``common.proto`` explains each field."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: TierName
    url: str = ""
    urls: tuple[str, ...] = ()
    redundancy: str = "none"
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
        if url and scheme not in SCHEMES:
            raise ValueError(f"unknown scheme {scheme!r} (one of {', '.join(SCHEMES)})")
        return url

    @field_validator("urls")
    @classmethod
    def _known_schemes(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(cls._known_scheme(url) for url in urls)

    @field_validator("redundancy")
    @classmethod
    def _known_redundancy(cls, text: str) -> str:
        match = _REDUNDANCY.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is not none, mirror:N or rs:K+M")
        data, spare = _servers(text)
        if match[1] is None and (spare < 1 or data < 1 or (match[3] and data < 2)):
            raise ValueError(f"{text!r}: mirror:N needs N of 2 or more, rs:K+M K of 2 and M of 1")
        if data + spare > MAX_SERVERS:
            raise ValueError(f"{text!r} needs more than {MAX_SERVERS} servers")
        return text

    @model_validator(mode="after")
    def _as_many_servers(self) -> TierSpec:
        if self.redundancy == "none":
            if not self.url or self.urls:
                raise ValueError("a tier without redundancy has one url")
            return self
        if self.url or len(self.urls) != sum(self.shape):
            raise ValueError(
                f"redundancy {self.redundancy} needs {sum(self.shape)} servers in urls, "
                f"not {len(self.servers)}"
            )
        if not all(self.urls):
            raise ValueError("urls holds an empty one")
        if len(set(self.urls)) < len(self.urls):
            raise ValueError("urls names a server twice")
        if any(urlsplit(url).scheme == "ram" for url in self.urls):
            raise ValueError("ram:// has no redundancy")
        return self

    @model_validator(mode="after")
    def _watermarks(self) -> TierSpec:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        return self

    @property
    def servers(self) -> tuple[str, ...]:
        """The URLs: one, or those of a redundant tier, whose order never changes."""
        return self.urls or (self.url,)

    @property
    def shape(self) -> tuple[int, int]:
        """(K, M): a segment is on K + M servers, and any K of them are enough."""
        return _servers(self.redundancy)

    @property
    def redundant(self) -> bool:
        return self.redundancy != "none"

    def members(self) -> list[TierSpec]:
        """Each server as a tier of its own."""
        alone = {"urls": (), "redundancy": "none"}
        return [self.model_copy(update={"url": url, **alone}) for url in self.servers]

    @property
    def scheme(self) -> str:
        return urlsplit(self.servers[0]).scheme

    @property
    def safe_url(self) -> str:
        """The URLs with passwords redacted: the only form that is printed or logged."""
        return " ".join(map(redacted, self.servers))

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
            fields["url"] = redacted(self.url)
            fields["urls"] = map(redacted, self.urls)
        return common_pb2.TierSpec(**fields)

    @classmethod
    def from_proto(cls, message: common_pb2.TierSpec) -> TierSpec:
        """Raises pydantic.ValidationError; proto3 zero values mean the default."""
        fields: dict[str, Any] = {f.name: value for f, value in message.ListFields()}
        if "urls" in fields:
            fields["urls"] = tuple(message.urls)
        if "rank" not in fields:
            fields["rank"] = message.rank
        return cls(**fields)


def _servers(redundancy: str) -> tuple[int, int]:
    """(data, spare) servers of a well-formed ``redundancy``."""
    match = _REDUNDANCY.fullmatch(redundancy)
    assert match is not None
    if match[2]:
        return 1, int(match[2]) - 1
    return (int(match[3]), int(match[4])) if match[3] else (1, 0)


def redacted(url: str) -> str:
    """The URL without its password and without secrets in its query."""
    # Up to the last @: a password that was not percent-encoded may hold anything.
    url = re.sub(r"(://[^/?#@]*:).*@", r"\1***@", url)
    return re.sub(
        r"([?&][^=&]*(?:secret|password|token|key)[^=&]*=)[^&]*", r"\1***", url, flags=re.I
    )
