"""Configuration of a daemon: a TOML file, then environment variables, then flags, validated.

A value that is wrong is named with where it came from: the file and key, the variable, the flag.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from vswap.wire.errors import BadConfig

Model = TypeVar("Model", bound=BaseModel)


def load(
    model: type[Model],
    *,
    file: Path | None,
    environ: Mapping[str, str],
    flags: Mapping[str, Any],
    variables: Mapping[str, str],
    prefix: str,
) -> Model:
    """Builds ``model`` (which forbids unknown keys) from three layers, the later winning.

    ``variables`` maps environment variables to keys; a variable that starts with ``prefix`` and is
    not among them is refused, like an unknown key of the file. ``flags`` with value None are unset.
    Raises BadConfig.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if file is not None:
        values = _read(file)
        sources = dict.fromkeys(values, str(file))
    for name in environ:
        if name.startswith(prefix) and name not in variables:
            raise BadConfig(
                f"environment: unknown variable {name} (known: {', '.join(sorted(variables))})",
                source="environment", key=name,
            )  # fmt: skip
    for name, key in variables.items():
        if name in environ:
            values[key], sources[key] = environ[name], f"environment: {name}"
    for key, value in flags.items():
        if value is not None:
            values[key], sources[key] = value, f"--{key.replace('_', '-')}"
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _explain(error, sources, file) from error


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except OSError as error:
        raise BadConfig(f"{file}: {error.strerror}", source=str(file)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadConfig(f"{file}: not valid TOML: {error}", source=str(file)) from error


def _explain(error: ValidationError, sources: Mapping[str, str], file: Path | None) -> BadConfig:
    first = error.errors(include_url=False)[0]
    path = ""
    for part in first["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    path = path.lstrip(".")
    top = str(first["loc"][0]) if first["loc"] else ""
    source = sources.get(top, str(file) if file else "configuration")
    if source.startswith(("--", "environment")):
        where = source
    else:
        where = f"{source}: {path}" if path else source
    what = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        what = "unknown key"
    more = len(error.errors()) - 1
    note = f" (and {more} more)" if more else ""
    return BadConfig(f"{where}: {what}{note}", source=source, key=path)
