"""What a person sees of a sweep and its trials, without a sweep."""

import io
from contextlib import suppress
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.live import Live

from ray_mnist.cli import console
from ray_mnist.search import plots, table

TRIALS = [
    SimpleNamespace(trial_id="a", config={"model.lr": 0.00123456}, status="TERMINATED", last_result={}),
    SimpleNamespace(trial_id="b", config={"model.lr": 0.1}, status="PENDING", last_result=None),
    SimpleNamespace(trial_id="c", config={"model.lr": 0.2}, status="RUNNING", last_result={"epoch": 1.0, "loss": 0.25}),
]
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is written to a terminal."""
    screen = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=screen, force_terminal=True, width=100))
    monkeypatch.setattr(table, "live", Live(console=console.console, auto_refresh=False))
    return screen


def test_a_terminal_has_a_table_with_the_running_trials_first(terminal: io.StringIO) -> None:
    with table.on_terminal():
        table.Table("loss", 3).on_step_end(1, TRIALS)
        drawn = [[cell.strip() for cell in line.split("│")[1:-1]] for line in terminal.getvalue().splitlines()]
    assert [cells for cells in drawn if cells] == [
        ["c", "lr 0.2", "running", "1/3", "0.2500"],
        ["b", "lr 0.1", "pending", "", ""],
        ["a", "lr 0.001235", "terminated", "", ""],
    ]


def test_an_interrupted_sweep_leaves_the_cursor_and_no_further_table(terminal: io.StringIO) -> None:
    shown = table.Table("loss", 3)
    with suppress(KeyboardInterrupt), table.on_terminal():
        shown.on_step_end(1, TRIALS)
        assert HIDE_CURSOR in terminal.getvalue()
        raise KeyboardInterrupt
    assert terminal.getvalue().endswith(SHOW_CURSOR)
    shown.on_step_end(2, TRIALS)  # from Tune's thread, which ends later
    assert terminal.getvalue().endswith(SHOW_CURSOR)


def test_without_a_terminal_there_is_a_line_a_trial(capsys: pytest.CaptureFixture[str]) -> None:
    shown = table.Table("loss", 3)
    with table.on_terminal():
        shown.on_step_end(1, TRIALS)
        shown.on_trial_complete(1, TRIALS, TRIALS[2])
        shown.on_trial_error(1, TRIALS, TRIALS[0])
    assert capsys.readouterr().out == "c  lr 0.2  epoch 1/3  loss 0.2500\na  lr 0.001235  failed\n"


def test_each_parameter_has_a_panel_of_its_own() -> None:
    points = [
        ({"model.lr": 1e-4, "data.batch_size": 32, "model.norm": None}, 0.5),
        ({"model.lr": 1e-1, "data.batch_size": 64, "model.norm": "layer"}, 0.9),
    ]
    panels = plots.by_parameter(points, "val_accuracy").axes
    assert [panel.get_xlabel() for panel in panels] == ["model.lr", "data.batch_size", "model.norm"]
    assert [panel.get_xscale() for panel in panels] == ["log", "linear", "linear"]
    assert [panel.collections[0].get_offsets().tolist() for panel in panels] == [
        [[1e-4, 0.5], [1e-1, 0.9]],
        [[32, 0.5], [64, 0.9]],
        [[0, 0.5], [1, 0.9]],
    ]
    assert [label.get_text() for label in panels[2].get_xticklabels()] == ["None", "layer"]
