"""The table of failures is true to the source: ``make mutants`` runs what it says."""

from __future__ import annotations

from mutants.table import PAGE, ROOT, page, read

MUTANTS = [mutant for mutants in read().values() for mutant in mutants]


def test_every_mutation_can_still_be_made() -> None:
    found = {m.name: (ROOT / m.file).read_text().count(m.old) for m in MUTANTS}
    assert {name: count for name, count in found.items() if count != 1} == {}
    assert len(found) == len(MUTANTS), "two mutants have one name"


def test_every_test_that_is_named_exists() -> None:
    for mutant in MUTANTS:
        if mutant.test.startswith("sim:"):
            continue
        path, _, function = mutant.test.partition("::")
        assert f"def {function}" in (ROOT / path).read_text(), mutant.name


def test_the_page_says_what_the_table_says() -> None:
    assert page(PAGE.read_text()) == PAGE.read_text(), "python -m mutants --doc"
