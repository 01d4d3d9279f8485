"""Programs find with our Trainer what they find with Lightning's, but for what is said, and for the reason given."""

import ast
import inspect
from pathlib import Path

import pytest
import pytorch_lightning as pl
from reference import QUIET

from conformance import table
from conformance.harness import PROGRAMS, differing
from ray_mnist.worker import quiet

HERE = Path(__file__).parent


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", PROGRAMS)
def test_it_finds_what_lightning_finds(name: str, num_workers: int, gloo: None, tmp_path: Path) -> None:
    row = PROGRAMS[name]
    found = differing(name, tmp_path, num_workers)
    expected = set(row.differs) | (set(row.differs_on_workers) if num_workers else set())
    assert set(found) == expected, "\n".join(found.values())


def test_every_argument_of_lightnings_is_in_a_program_or_answered() -> None:
    calls = [
        call
        for file in HERE.glob("programs_*.py")
        for call in ast.walk(ast.parse(file.read_text()))
        if isinstance(call, ast.Call) and ast.unparse(call.func) in ("make", "fitted")
    ]
    given = {keyword.arg for call in calls for keyword in call.keywords}
    # `default_root_dir` is given to every program's Trainer.
    there = set(inspect.signature(pl.Trainer.__init__).parameters) - {"self", "default_root_dir"}
    assert there - given - set(table.ARGUMENTS) == set()
    assert set(table.ARGUMENTS) <= there
    assert quiet() == QUIET  # as the page says of the defaults


def test_the_page_says_what_the_programs_say() -> None:
    assert (HERE.parents[1] / "docs" / "lightning.md").read_text() == table.page()
