"""What a check finds: two records of a node that do not agree.

==========  ====================================================================================
entry       an entry that points at no segment that can be read, or beyond its records
books       pages, bytes or live records that differ from what the tables say
table       a chunk of a table whose count of slots in use is wrong
row         a segment row of no tier, in a state it cannot be in, or dead and deleted by nobody
handles     a handle both in use and spare, or neither
tier        stored bytes, or segments, that differ from the rows
grant       more stored in a tier of the cluster than was granted
block       a block of RAM that two segments own, that is free as well, or that nobody has
directory   a live page that its segment's directory does not know: no move would find it
missing     a segment, or a server's part of one, that is not there
length      a segment, or a part, of another length
stray       a segment of ours on a backend that is in no row; the next sweep deletes it
==========  ====================================================================================
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

_MOST = 1000
_EXAMPLES = 8


@dataclass(frozen=True, slots=True)
class Difference:
    """``where``: the space, tier or server that it is about; ``detail`` is for people."""

    kind: str
    where: str
    detail: str


@dataclass(slots=True)
class Checked:
    """What a check has compared so far, and found."""

    slots: int = 0
    segments: int = 0
    listed: int = 0
    """Names that backends listed."""
    found: int = 0
    differences: list[Difference] = field(default_factory=list)
    """The first thousand of those found."""
    skipped: list[str] = field(default_factory=list)
    """What could not be compared, and why."""
    others: list[str] = field(default_factory=list)
    """What other nodes, or earlier states of this one, have on its own tiers: left alone."""

    def differ(self, kind: str, where: str, detail: str) -> None:
        self.found += 1
        if len(self.differences) < _MOST:
            self.differences.append(Difference(kind, where, detail))


def some(what: str, numbers: Iterable[int]) -> str:
    """How many, and the first of them."""
    found = [int(number) for number in numbers]
    more = ", ..." if len(found) > _EXAMPLES else ""
    return f"{len(found)} {what} ({', '.join(map(str, found[:_EXAMPLES]))}{more})"
