"""What commands print: results on stdout (a table or JSON), everything else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table

from vswap.wire.errors import InvalidRequest

_PIPE_COLUMNS = 500


def stdout() -> Console:
    """The console for results. Without a terminal its lines are wide enough not to be cut."""
    return _console(sys.stdout)


def stderr() -> Console:
    """The console for progress, remarks and errors."""
    return _console(sys.stderr)


def _console(stream: Any) -> Console:
    console = Console(file=stream, highlight=False, soft_wrap=True)
    return (
        console
        if console.is_terminal
        else Console(file=stream, highlight=False, soft_wrap=True, width=_PIPE_COLUMNS)
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> Table:
    """A plain table; columns whose name starts with ">" are right-aligned."""
    result = Table(box=None, title=title or None, title_justify="left", pad_edge=False)
    for index, column in enumerate(columns):
        result.add_column(
            column.removeprefix(">"),
            justify="right" if column.startswith(">") else "left",
            # What explains comes last and gives way where a terminal is narrow.
            no_wrap=index < len(columns) - 1,
        )
    for row in rows:
        result.add_row(*row)
    return result


def remarks(lines: Iterable[str]) -> None:
    """What a table has no column for, a line each, set apart."""
    console = stdout()
    for line in lines:
        console.print(f"\n{line}", markup=False)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")


def check_writable(file: Path | None) -> None:
    """InvalidRequest unless `write_json` will be able to write there: asked before long work."""
    if file is not None and str(file) != "-":
        try:
            file.touch()
        except OSError as error:
            raise InvalidRequest(f"cannot write {file}: {error.strerror}") from error


def write_json(file: Path | None, value: Any) -> None:
    """One JSON document to a file, to stdout for "-", nowhere for None."""
    if file is not None and str(file) == "-":
        print_json(value)
    elif file is not None:
        file.write_text(json.dumps(value, indent=2) + "\n")


def plain(message: Message) -> dict[str, Any]:
    """A message as a dict: every field by its name in the .proto, integers as integers.

    Fields at their default are there too, so the keys never depend on the values. Enums are their
    names in lower case without the prefix: JOB_STATE_DONE is "done".
    """
    return {field.name: _value(message, field) for field in message.DESCRIPTOR.fields}


def enum_name(message: Message, field: str) -> str:
    """The short name of an enum field's value."""
    return _enum(message.DESCRIPTOR.fields_by_name[field], getattr(message, field))


def _value(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return dict(sorted(value.items()))
    if field.is_repeated:
        return [_single(field, item) for item in value]
    return _single(field, value)


def _single(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return plain(value)
    return _enum(field, value) if field.enum_type is not None else value


def _enum(field: Any, number: int) -> str:
    kind = field.enum_type
    known = kind.values_by_number.get(number)
    if known is None:
        return str(number)
    prefix = kind.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return str(known.name.removeprefix(prefix)).lower()
