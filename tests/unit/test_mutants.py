"""The table of failures is true to the source: ``make mutants`` runs what it says."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
from mutants import __main__ as runner
from mutants.table import PAGE, ROOT, Mutant, page, read

MUTANTS = [mutant for mutants in read().values() for mutant in mutants]


def test_every_mutation_can_still_be_made() -> None:
    found = {m.name: (ROOT / m.file).read_text().count(m.old) for m in MUTANTS}
    assert {name: count for name, count in found.items() if count != 1} == {}
    assert len(found) == len(MUTANTS), "two mutants have one name"


def test_every_mutation_is_python() -> None:
    for mutant in MUTANTS:
        text = (ROOT / mutant.file).read_text()
        compile(text.replace(mutant.old, mutant.new), mutant.name, "exec", dont_inherit=True)


def test_every_test_that_is_named_exists() -> None:
    for mutant in MUTANTS:
        if mutant.test.startswith("sim:"):
            continue
        path, _, function = mutant.test.partition("::")
        assert f"def {function}" in (ROOT / path).read_text(), mutant.name


def test_the_page_says_what_the_table_says() -> None:
    assert page(PAGE.read_text()) == PAGE.read_text(), "python -m mutants --doc"


_TESTS = """
import time
import pytest
from source import VALUE

def test_sees():
    assert VALUE == 1

def test_sees_nothing():
    pass

def test_fails_by_itself():
    assert False

@pytest.mark.timeout(0.5)
def test_hangs():
    time.sleep(60 * (VALUE - 1))
"""


@pytest.mark.parametrize(
    ("test", "word"),
    [
        ("sees", "caught"),
        ("sees_nothing", "SURVIVED"),
        ("fails_by_itself", "UNSOUND"),
        ("is_not_there", "UNSOUND"),
        ("hangs", "HUNG"),
    ],
)
def test_a_verdict_is_of_a_test_that_passes_without_the_mutation(
    test: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("wing", "tests", "benchmarks"):
        (tmp_path / part).mkdir()
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "wing" / "source.py").write_text("VALUE = 1\n")
    (tmp_path / "tests" / "test_it.py").write_text(_TESTS)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # They take a second to import.
    monkeypatch.setenv("PYTEST_PLUGINS", "pytest_timeout")
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    monkeypatch.setattr(runner, "_WINGS", ("wing",))
    path = f"tests/test_it.py::test_{test}"
    mutant = Mutant("m", "", "", "wing/source.py", "VALUE = 1", "VALUE = 2", path)
    before: Future[runner.Result] = Future()
    before.set_result(runner.sound(path))
    assert runner.run(mutant, {path: before})[1] == word
    if word == "HUNG":
        assert runner.run(replace(mutant, hangs=True), {path: before})[1] == "caught"
