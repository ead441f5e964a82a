"""Spaces: clients' virtual swap spaces, their limits and their accounting."""

from __future__ import annotations

import errno
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from vswap.node.entry import TAGS
from vswap.node.table import MAX_SLOTS, SwapTable, held
from vswap.tiers.record import I64
from vswap.tiers.region import Region
from vswap.wire.errors import (
    AlreadyExists,
    InvalidRequest,
    OutOfTiers,
    Refused,
    StateInvalid,
    UnknownSpace,
    VswapError,
)

DEFAULT_MAX_SLOTS = 1 << 28
MIN_PAGE_BYTES = 4096
MAX_PAGE_BYTES = 65536
FILE = "spaces.json"
VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")


def check_name(name: str) -> None:
    """Raises InvalidRequest for a name that no space can have."""
    if not _NAME.match(name):
        raise InvalidRequest(f"space name {name!r}: letters, digits, . _ - (at most 64)")


def check_shape(page_bytes: int, max_slots: int) -> None:
    """Raises InvalidRequest."""
    if page_bytes & (page_bytes - 1) or not MIN_PAGE_BYTES <= page_bytes <= MAX_PAGE_BYTES:
        raise InvalidRequest(
            f"page size {page_bytes}: a power of two from {MIN_PAGE_BYTES} to {MAX_PAGE_BYTES}"
        )
    if not 0 < max_slots <= MAX_SLOTS:
        raise InvalidRequest(f"maximum of {max_slots} slots: 1 to {MAX_SLOTS}")


class Limits(BaseModel):
    """What a space may use, in bytes of live records; fill pages charge nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    quota_bytes: int = Field(default=0, ge=0)
    """0 = no quota."""
    tiers: tuple[str, ...] = ()
    """Names of the tiers it may use; empty = all."""
    tier_max_bytes: dict[str, int] = {}
    """Most bytes per tier; 0 forbids the tier."""

    def allows(self, tier: str) -> bool:
        return (not self.tiers or tier in self.tiers) and self.tier_max_bytes.get(tier) != 0


class Space:
    """One space: its table, and what it uses. Written by the event loop alone."""

    def __init__(
        self, region: Region, shard: UUID, number: int, name: str, page_bytes: int, max_slots: int,
        limits: Limits, *, create: bool,
    ) -> None:  # fmt: skip
        self.number = number
        """Names the space in records; never used twice in a shard."""
        self.name = name
        self.page_bytes = page_bytes
        self.page_shift = page_bytes.bit_length() - 1
        self.max_slots = max_slots
        self.limits = limits
        self.table = SwapTable(region, f"space-{number}", max_slots, shard, create=create)
        self.pages_by_tag: I64 = np.zeros(TAGS, np.int64)
        """Pages per entry tag; index 1 are fill pages."""
        self.bytes_by_tag: I64 = np.zeros(TAGS, np.int64)
        """Bytes of live records per entry tag."""
        self.peak_bytes = 0
        self.events: Counter[str] = Counter()
        self.deleted = False

    @property
    def pages(self) -> int:
        return int(self.pages_by_tag[1:].sum())

    @property
    def live_bytes(self) -> int:
        return int(self.bytes_by_tag.sum())


class Spaces:
    """The spaces of a shard, by name and number. Kept in ``spaces.json``, replaced atomically."""

    def __init__(self, region: Region, shard: UUID, *, fresh: bool) -> None:
        self._region = region
        self._shard = shard
        self._path: Path = region.directory / FILE
        self._by_name: dict[str, Space] = {}
        self.by_number: dict[int, Space] = {}
        self._next_number = 1
        self._shut: list[Space] | None = None
        """Those that :meth:`shut` has hidden; None while new spaces are taken."""
        if fresh:
            self._save()
        else:
            self._load()

    def __iter__(self) -> Iterator[Space]:
        return iter(list(self._by_name.values()))

    def __len__(self) -> int:
        return len(self._by_name)

    def get(self, name: str) -> Space:
        space = self._by_name.get(name)
        if space is None:
            raise UnknownSpace(f"no space named {name!r}", space=name)
        return space

    def create(
        self,
        name: str,
        page_bytes: int = MIN_PAGE_BYTES,
        max_slots: int = DEFAULT_MAX_SLOTS,
        limits: Limits | None = None,
        *,
        exist_ok: bool = False,
    ) -> Space:
        """A new, empty space; an empty space costs one page, whatever its maximum.

        ``exist_ok`` returns an existing one of the same page size and maximum. Raises
        InvalidRequest, AlreadyExists, Refused (the node is leaving), or OutOfTiers (shared memory
        is full).
        """
        check_name(name)
        check_shape(page_bytes, max_slots)
        if self._shut is not None:
            raise Refused(f"space {name!r} cannot be made: this node is leaving")
        old = self._by_name.get(name)
        if old is not None:
            if exist_ok and (old.page_bytes, old.max_slots) == (page_bytes, max_slots):
                return old
            raise AlreadyExists(
                f"space {name!r} exists with pages of {old.page_bytes} bytes and "
                f"{old.max_slots} slots",
                name=name,
            )
        number, self._next_number = self._next_number, self._next_number + 1
        space = Space(
            self._region, self._shard, number, name, page_bytes, max_slots, limits or Limits(),
            create=True,
        )  # fmt: skip
        self._by_name[name] = self.by_number[number] = space
        try:
            self._save()
        except VswapError:
            del self._by_name[name], self.by_number[number]
            space.table.close(unlink=True)
            raise
        return space

    def change(self, name: str, limits: Limits, max_slots: int = 0) -> Space:
        """Replaces the limits; a maximum other than 0 may only grow. What is stored stays."""
        space = self.get(name)
        if max_slots and max_slots < space.max_slots:
            raise InvalidRequest(
                f"space {name!r} has {space.max_slots} slots; the maximum may only grow"
            )
        if max_slots > MAX_SLOTS:
            raise InvalidRequest(f"maximum of {max_slots} slots: 1 to {MAX_SLOTS}")
        before = space.limits, space.max_slots
        space.limits, space.max_slots = limits, max_slots or space.max_slots
        try:
            # First the table: one that is shorter than its space is damaged.
            if space.max_slots > space.table.max_slots:
                space.table.grow(space.max_slots)
            self._save()
        except BaseException:
            space.limits, space.max_slots = before
            raise
        return space

    def remove(self, space: Space) -> None:
        """Forgets a space whose slots have all been freed, and its table."""
        del self._by_name[space.name], self.by_number[space.number]
        try:
            self._save()
        except VswapError:
            self._by_name[space.name] = self.by_number[space.number] = space
            space.deleted = False
            raise
        space.table.close(unlink=True)

    def hide(self, space: Space) -> None:
        """No new requests find the space from here on."""
        space.deleted = True
        if self._shut is not None and space in self._shut:
            self._shut.remove(space)

    def shut(self) -> None:
        """Hides all spaces and takes no new ones; until :meth:`reopen`."""
        self._shut = [space for space in self if not space.deleted]
        for space in self._shut:
            space.deleted = True

    def reopen(self) -> None:
        for space in self._shut or ():
            space.deleted = False
        self._shut = None

    def close(self) -> None:
        for space in self:
            space.table.close()

    def _save(self) -> None:
        state = {
            "version": VERSION,
            "next_number": self._next_number,
            "spaces": [
                {
                    "number": space.number,
                    "name": space.name,
                    "page_bytes": space.page_bytes,
                    "max_slots": space.max_slots,
                    "limits": space.limits.model_dump(),
                }
                for space in self
            ],
        }
        replace_json(self._path, state)

    def _load(self) -> None:
        state = load_json(self._path, VERSION)
        try:
            self._next_number = int(state["next_number"])
            for item in state["spaces"]:
                space = Space(
                    self._region, self._shard, item["number"], item["name"], item["page_bytes"],
                    item["max_slots"], Limits(**item["limits"]), create=False,
                )  # fmt: skip
                self._by_name[space.name] = self.by_number[space.number] = space
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise StateInvalid(
                f"{self._path} is damaged ({error}); --fresh starts empty", path=str(self._path)
            ) from error
        self._clear_up()

    def _clear_up(self) -> None:
        """Removes what is left of spaces that were being made or forgotten: empty tables.

        Raises StateInvalid where one is not, since then it is this file that is not what it was.
        """
        known = {f"space-{number}" for number in self.by_number}
        for path in self._region.directory.glob("*.table"):
            if path.stem in known:
                continue
            if held(path):
                raise StateInvalid(
                    f"{self._path} does not know {path.name}, which holds pages; put the right one "
                    "back, or start with --fresh and lose the pages",
                    path=str(self._path),
                )
            path.unlink()
            path.with_suffix(".heat").unlink(missing_ok=True)


def replace_json(path: Path, state: object) -> None:
    """Writes a small state file so that a kill leaves the old one or the new one.

    Raises OutOfTiers when shared memory is full; the old one stays then.
    """
    temporary = path.with_suffix(".new")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(state, file, indent=1)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OutOfTiers(f"shared memory at {path.parent} is full (writing {path.name})") from error


def load_json(path: Path, version: int) -> dict[str, Any]:
    """Raises StateInvalid where the file is missing, damaged or of another version."""
    try:
        state = json.loads(path.read_text())
        found = state["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateInvalid(
            f"{path} is missing or damaged ({error}); --fresh starts empty", path=str(path)
        ) from error
    if found != version:
        raise StateInvalid(
            f"{path} has format version {found}, this vswap knows {version}", path=str(path)
        )
    return dict(state)
