"""What a person sees of a sweep and its trials, without a sweep."""

import io
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.live import Live

from ray_mnist.cli import console
from ray_mnist.run.events import Progress
from ray_mnist.search import plots, table

TRIALS = [
    SimpleNamespace(trial_id="a", config={"model.lr": 0.00123456}, status="TERMINATED", last_result={}),
    SimpleNamespace(trial_id="b", config={"model.lr": 0.1}, status="PENDING", last_result=None),
    SimpleNamespace(trial_id="c", config={"model.lr": 0.2}, status="RUNNING", last_result={"epoch": 1.0, "loss": 0.25}),
]
UNDER_WAY = Progress("training", 2, 7, 18, 100.0, 1.0, 0.5, 1, None, 25, 0.05, 0.01, trial="c")
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


@pytest.fixture(autouse=True)
def now(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The time, which a test sets."""
    seconds = [1000.0]
    monkeypatch.setattr(table, "clock", lambda: seconds[0])
    monkeypatch.setattr(table.Shown, "at", -math.inf)
    yield seconds
    table.progress.clear()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is written to a terminal."""
    screen = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=screen, force_terminal=True, width=100))
    monkeypatch.setattr(table, "live", Live(console=console.console, auto_refresh=False))
    return screen


def test_a_terminal_has_a_table_with_the_running_trials_first(terminal: io.StringIO) -> None:
    with table.on_terminal():
        table.follow(UNDER_WAY)
        table.follow(replace(UNDER_WAY, trial="a"))  # which has ended since
        table.Table("loss", 3).on_step_end(1, TRIALS)
        rows = cells(terminal)
    assert rows == [
        ["c", "lr 0.2", "running", "1/3", "0.2500", "epoch 2/3  batch 7/18"],
        ["b", "lr 0.1", "pending", "", "", ""],
        ["a", "lr 0.001235", "terminated", "", "", ""],
    ]


def cells(terminal: io.StringIO) -> list[list[str]]:
    """Of all rows that were drawn since the last call."""
    lines = terminal.getvalue().splitlines()
    terminal.seek(0)
    terminal.truncate()
    drawn = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
    return [row for row in drawn if row]


def test_the_table_is_drawn_twice_a_second_at_most_and_once_more_at_the_end(
    terminal: io.StringIO, now: list[float]
) -> None:
    shown = table.Table("loss", 3)
    with table.on_terminal():
        shown.on_step_end(1, TRIALS[2:])
        table.follow(UNDER_WAY)
        now[0] += 0.4
        shown.on_step_end(2, TRIALS[2:])
        assert [row[-1] for row in cells(terminal)] == [""]
        now[0] += 0.1
        shown.on_step_end(3, TRIALS[2:])
        assert [row[-1] for row in cells(terminal)] == ["epoch 2/3  batch 7/18"]
        table.follow(replace(UNDER_WAY, batch=18))
        shown.on_experiment_end(TRIALS[2:])
        assert [row[-1] for row in cells(terminal)] == ["epoch 2/3  batch 18/18"]


def test_without_a_terminal_a_line_a_minute_says_how_far_a_trial_is_as_long_as_there_is_no_other(
    capsys: pytest.CaptureFixture[str], now: list[float]
) -> None:
    shown = table.Table("loss", 3)
    table.follow(UNDER_WAY)
    for second in range(200):
        shown.on_step_end(second, TRIALS)
        if second == 90:
            assert capsys.readouterr().out == "c  epoch 2/3  batch 7/18\n"
            shown.on_trial_error(second, TRIALS, TRIALS[0])
        now[0] += 1
    assert capsys.readouterr().out == "a  lr 0.001235  failed\nc  epoch 2/3  batch 7/18\n"


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


def test_each_trial_is_a_line_through_its_values_and_what_came_of_them() -> None:
    points = [
        ({"model.lr": 1e-4, "model.norm": None}, 0.5),
        ({"model.lr": 1e-2, "model.norm": "layer"}, 1.0),
        ({"model.lr": 1.0, "model.norm": "layer"}, 0.75),
    ]
    (axes,) = plots.parallel(points, "val_accuracy", "max").axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["model.lr", "model.norm", "val_accuracy"]
    lines = [line for line in axes.lines if len(line.get_ydata()) == 3]
    assert [list(line.get_ydata()) for line in lines] == [
        pytest.approx(line) for line in ([0, 0, 0], [1, 1, 0.5], [0.5, 1, 1])
    ]
    assert [line.get_linewidth() > 2 for line in lines] == [False, False, True]
    darkness = [-sum(line.get_color()[:3]) for line in lines]
    assert darkness == sorted(darkness)
    written = {(note.xy[0], round(note.xy[1], 6)): note.get_text() for note in axes.texts}
    assert written == {(0, 0): "0.0001", (0, 1): "1", (1, 0): "None", (1, 1): "layer", (2, 0): "0.5", (2, 1): "1"}
    (axes,) = plots.parallel(points, "val_loss", "min").axes
    assert max(axes.lines, key=lambda line: line.get_linewidth()).get_ydata()[-1] == 0


def test_trials_that_are_all_alike_are_drawn() -> None:
    assert plots.on_axis([3, 3]) == ([0.0, 0.0], {0.0: "3"})
    assert plots.on_axis([True, True]) == ([0.0, 0.0], {0.0: "True"})
