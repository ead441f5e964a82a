"""Crash points: where a node may be killed while it publishes its state, all in one table.

``python -m chaos.points`` lists them. They are planted in the source as it is imported, so that
the product itself knows nothing of them: the process dies of SIGKILL right before the line.
"""

from __future__ import annotations

import builtins
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

NODE = Path(__file__).parents[2] / "node" / "vswap" / "node"


@dataclass(frozen=True, slots=True)
class Point:
    """Before ``line``, the first one after ``after``, both as they stand in ``file``."""

    name: str
    file: str
    after: str
    line: str
    often: bool = True
    """Whether a node under load comes by many times a second."""
    start: bool = False
    """Whether it comes by while it starts."""
    takes: str = ""
    """What must happen first: an "outage" of one server of a mirrored tier; "damage" or "loss" of
    segments whose tier is then drained."""

    def find(self, lines: list[str]) -> int:
        """The index of the line. Raises ValueError where the table is no longer true."""
        stripped = [line.strip() for line in lines]
        try:
            first = next(i for i, line in enumerate(stripped) if line.startswith(self.after))
            return next(
                i for i in range(first + 1, len(lines)) if stripped[i].startswith(self.line)
            )
        except StopIteration:
            raise ValueError(f"{self.name}: {self.file} has no {self.line!r}") from None


def _in(file: str, after: str, **points: str) -> Iterator[Point]:
    for name, line in points.items():
        yield Point(name.replace("_", "-"), file, after, line)


def _rare(
    file: str, after: str, *, start: bool = False, takes: str = "", **points: str
) -> Iterator[Point]:
    for name, line in points.items():
        yield Point(name.replace("_", "-"), file, after, line, False, start, takes)


POINTS = [
    # Serial bump, and the row of a new segment.
    *_in("handles.py", "def create(",
         serial_untaken='self._header["next_serial"][0] = serial + 1',
         serial_taken="row = self.rows[handle]",
         row_unpublished='self.rows["word"][handle] = '),
    *_in("handles.py", "def take_sequences(", sequence_taken="return first"),
    *_in("handles.py", "def recycle(", row_free="self._free.append(handle)"),
    # A store in RAM: payload and row, count, table word, acknowledgement; reuse of a block.
    *_in("log.py", "def _new_block(",
         block_without_place="block = self._arena.allocate(name)",
         block_unnamed='row["block"], row["stored"] = ',
         block_open="self._tier.segments[handle] = None"),
    *_in("log.py", "def place_raw(",
         raw_copied="payloads[handle] = ",
         raw_half_counted="counts[handle] = ",
         raw_counted="loc |= "),
    *_in("log.py", "def place_encoded(",
         encoded_copied="payloads[handle] = ",
         encoded_half_counted="counts[handle] = ",
         encoded_counted="words |= "),
    *_in("log.py", "def _append(",
         record_copied="payloads[handle] = ",
         record_half_counted="counts[handle] = ",
         record_counted="return entry.tier_words("),
    *_in("table.py", "def set(",
         entries_replaced="return",
         entries_changing="self._words[present] = words",
         entries_set="self._counts[_USED] += ",
         entries_counted="self._counts[_CHANGING] = 0",
         entries_changed="if delta.any():"),
    *_rare("table.py", "def reserve(",
           chunk_half_reserved="self._heat_map.reserve(",
           chunk_reserved="self._used[chunk] = 1"),
    *_in("ledger.py", "def flip(",
         flipped="left = self._account(space, old, -1)",
         unburied="self._bury(left)"),
    *_in("pager.py", "def _commit(", unacknowledged="self._tickets.flip("),
    # The same in one turn: the words go first, then the books.
    *_in("table.py", "def exchange(", words_exchanged="return old"),
    *_in("ledger.py", "def put(",
         put_uncounted="like = np.uint64(",
         put_half_counted="for handle, count, amount in places:",
         put_unburied="self._bury(left)"),
    *_in("pager.py", "def store_now(", put_unacknowledged="self._tickets.flip("),
    # A segment on a backend.
    *_in("log.py", "async def _write(self, handle",
         writing="await self._tier.backend.put(",
         written="if self._tier.spec.verify_writes:",
         unsealed="self._handles.set_state(handle, SEALED)",
         sealed="return entry.tier_words("),
    # A move: copy, flip, compare again.
    *_in("evacuator.py", "async def _turn(", move_read="live = self._ledger.live("),
    *_in("evacuator.py", "def _finish(",
         move_copied="moved = self._ledger.flip_where(",
         move_flipped="done = records if "),
    *_in("evacuator.py", "async def _write(self, run", move_half_flipped="start = end"),
    # A write that a server of a redundant tier misses, before it is acknowledged.
    *_rare("upkeep.py", "def _note(", takes="outage",
           lack_unnoted='self._handles.rows["lacking"][handle] |= places',
           lack_noted="if self._handles.state(handle) != SEALED"),
    # Pages that are found to be damaged, or given up.
    *_rare("contents.py", "def _set_aside(", takes="damage",
           damage_found="moved = self._ledger.flip_where(",
           set_aside="tier.quarantined += "),
    *_rare("lost.py", "async def give_up(", takes="loss",
           loss_unmarked="ledger.flip(space, slots, ",
           loss_marked="lost += len(slots)"),
    # A deletion.
    *_in("reaper.py", "def consider(",
         dead="handles.set_state(handle, DELETING)",
         deleting="tier = self._tier_of(handle)",
         block_released="self._forget(tier, handle)"),
    *_in("reaper.py", "async def _delete(",
         undeleted="await tier.backend.delete(names)",
         deleted="for handle, name in zip("),
    *_in("reaper.py", "def _forget(", unforgotten="self._handles.recycle(handle)"),
    # Free, and exclusive loads.
    *_in("pager.py", "def _free(",
         unfreed="self._ledger.flip(",
         freed="self._tickets.flip("),
    *_in("pager.py", "async def confirm(",
         confirm_unfreed="freed = self._free(",
         confirm_freed="self._confirmed[token] = freed"),
    *_rare("table.py", "def _punch(",
           chunk_empty="self._words_map.punch(",
           chunk_half_punched="self._heat_map.punch(",
           chunk_punched="self._used[chunk] = 0"),
    # Spaces: created, grown, deleted; small files replaced.
    *_rare("spaces.py", "number, self._next_number = ",
           space_unsaved="self._save()",
           space_saved="return space"),
    *_rare("spaces.py", "before = space.limits,",
           growth_unmade="space.table.grow(",
           growth_unsaved="self._save()",
           growth_saved="return space"),
    *_rare("spaces.py", "def remove(",
           removal_unsaved="self._save()",
           removal_saved="space.table.close(unlink=True)"),
    *_rare("shard.py", "async def delete_space(", space_cleared="self.spaces.remove(space)"),
    *_rare("spaces.py", "def replace_json(",
           file_unwritten="json.dump(state, file, indent=1)",
           file_unpublished="temporary.replace(path)"),
    *_rare("shard.py", "self._configured = tiers",
           tiers_unsaved="self._save_tiers()",
           tiers_saved="await asyncio.gather("),
    # A restart, once more.
    *_rare("shard.py", "async def _open(", start=True,
           start_untiered="self._save_tiers()",
           start_unrecovered="recover(self.handles",
           start_recovered="self.handles.begin_life()",
           start_begun="problems = await asyncio.gather("),
    *_rare("recover.py", "dropped += 1", start=True, start_block_dropped="handles.recycle(handle)"),
]  # fmt: skip

_REACHED = "__vswap_reached__"
_armed: list[Any] = ["", 0]
"""The name of the point at which this process dies, and how many times it may pass it first."""


def arm(name: str, passes: int) -> None:
    _armed[:] = name, passes


def _reached(name: str) -> None:
    if name != _armed[0]:
        return
    if _armed[1] > 0:
        _armed[1] -= 1
        return
    os.kill(os.getpid(), signal.SIGKILL)


def planted(path: Path) -> str:
    """The source of a module with a call before every point in it."""
    lines = path.read_text().splitlines()
    places = [(point.find(lines), point.name) for point in POINTS if point.file == path.name]
    for index, name in sorted(places, reverse=True):
        indent = " " * (len(lines[index]) - len(lines[index].lstrip()))
        lines.insert(index, f"{indent}{_REACHED}({name!r})")
    return "\n".join(lines) + "\n"


def plant() -> None:
    """From here on, modules of the node are imported with their points in them."""
    setattr(builtins, _REACHED, _reached)
    files = {str(NODE / point.file) for point in POINTS}
    ordinary = SourceFileLoader.get_code

    def get_code(self: SourceFileLoader, fullname: str) -> Any:
        path = self.get_filename(fullname)
        if path not in files:
            return ordinary(self, fullname)
        return compile(planted(Path(path)), path, "exec", dont_inherit=True)

    SourceFileLoader.get_code = get_code  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    for point in POINTS:
        print(f"{point.name:24} {point.file:13} before {point.line}")
