"""The shape of the tree: which wing may import which, and what is generated is up to date."""

from __future__ import annotations

import ast
import filecmp
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "v1": {"v1"},
    "wire": {"v1", "wire"},
    "tiers": {"v1", "wire", "tiers"},
    "node": {"v1", "wire", "tiers", "node"},
    "coordinator": {"v1", "wire", "tiers", "coordinator"},
    "client": {"v1", "wire", "client"},
    "loadgen": {"v1", "wire", "client", "loadgen"},
    "cli": {"v1", "wire", "client", "loadgen", "cli", "node", "coordinator", "tiers"},
}
WINGS = ("proto", "tiers", "node", "coordinator", "client")


def sources() -> list[Path]:
    return [path for wing in WINGS for path in (ROOT / wing / "vswap").rglob("*.py")]


def portion(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[parts.index("vswap") + 1]


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "vswap":
                names = [f"vswap.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("vswap.")}
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    assert imported(path) <= MAY_IMPORT[portion(path)]


def test_who_looks_at_a_clock_that_may_jump() -> None:
    """What is shown to people, and the age of temporary files that others left."""
    daemons = ("tiers", "node", "coordinator")
    found = {
        path.name
        for wing in daemons
        for path in (ROOT / wing / "vswap").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("time.time", "time.time_ns")
    }
    assert found == {"daemon.py", "files.py"}


def test_the_namespace_has_no_init() -> None:
    assert not [str(p) for wing in WINGS for p in ROOT.glob(f"{wing}/vswap/__init__.py")]


def test_every_portion_is_typed() -> None:
    for wing in WINGS:
        for directory in (ROOT / wing / "vswap").iterdir():
            if directory.is_dir() and directory.name != "__pycache__":
                assert (directory / "py.typed").exists(), directory


def test_generated_modules_are_what_the_protos_say(tmp_path: Path) -> None:
    protos = sorted((ROOT / "proto/vswap/v1").glob("*.proto"))
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I", ROOT / "proto",
         f"--python_out={tmp_path}", f"--pyi_out={tmp_path}", f"--grpc_python_out={tmp_path}",
         *protos],
        check=True,
    )  # fmt: skip
    fresh = sorted((tmp_path / "vswap/v1").iterdir())
    assert len(fresh) == 3 * len(protos)
    for path in fresh:
        committed = ROOT / "proto/vswap/v1" / path.name
        assert filecmp.cmp(path, committed, shallow=False), f"{path.name}: run `make proto`"


def test_every_message_and_service_is_commented() -> None:
    for path in (ROOT / "proto/vswap/v1").glob("*.proto"):
        lines = path.read_text().splitlines()
        for i, line in enumerate(lines):
            if line.startswith(("message ", "service ", "enum ")):
                assert lines[i - 1].startswith("//"), f"{path.name}: {line}"
