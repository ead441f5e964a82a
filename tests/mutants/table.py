"""The failures that vswap handles, and for each a mutation that takes the handling out."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_name("mutants.toml")
PAGE = ROOT / "docs" / "faults.md"
_BEGIN, _END = "<!-- from tests/mutants -->\n", "<!-- end -->\n"
_SECTIONS = {
    "node": "A node",
    "coordinator": "The coordinator",
    "outages": "Servers that are away, slow, full, or lie",
    "overload": "More than can be done",
    "lost": "Tiers that are gone",
    "redundancy": "Redundant tiers",
}


@dataclass(frozen=True, slots=True)
class Mutant:
    name: str
    failure: str
    handled: str
    file: str
    old: str
    new: str
    test: str
    hangs: bool = False
    """The mutation makes the test hang: that is a verdict, too."""

    def apply(self, root: Path) -> None:
        """Changes the source below ``root``. Raises ValueError unless OLD is there exactly once."""
        path = root / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.file} has OLD {text.count(self.old)} times")
        path.write_text(text.replace(self.old, self.new))


def read() -> dict[str, list[Mutant]]:
    """By section."""
    found = tomllib.loads(TABLE.read_text())
    return {section: [Mutant(**fields) for fields in found[section]] for section in _SECTIONS}


def page(text: str) -> str:
    """The text of docs/faults.md with its tables as they should be."""
    head, rest = text.split(_BEGIN)
    _, tail = rest.split(_END)
    tables = []
    for section, mutants in read().items():
        rows = [
            f"| {m.failure} | {m.handled} (`{Path(m.file).name}`) | `{_short(m.test)}` | {m.name} |"
            for m in mutants
        ]
        tables += [
            f"### {_SECTIONS[section]}\n",
            "| failure | handling | test | mutation |\n|---|---|---|---|",
            "\n".join(rows) + "\n",
        ]
    return head + _BEGIN + "\n" + "\n".join(tables) + "\n" + _END + tail


def _short(test: str) -> str:
    if test.startswith("sim:"):
        return "make sim"
    return test.rpartition("/")[2].replace(".py", "", 1)
