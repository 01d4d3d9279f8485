"""How far a run is: what rank 0 tells of it and how often, and what a person sees; test_terminal.py has a terminal."""

import io
import logging
import os
import sys
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from ray_mnist import MNISTDataModule, SimpleModel, Trainer, progress_reporter
from ray_mnist.cli import console
from ray_mnist.cli.live_line import fitting
from ray_mnist.distributed.loaders import ResumableLoader
from ray_mnist.distributed.weighting import LossWeighting
from ray_mnist.progress_reporter import ProgressReporter
from ray_mnist.run.events import EpochEnded, Event, Printed, Progress, WorkersFailed

pytestmark = pytest.mark.timeout(240)


# What a rank tells


class CountsReads(Tensor):
    """A loss that knows how often it was read."""

    reads = 0

    def item(self) -> float:
        CountsReads.reads += 1
        return 0.25


def test_a_batch_is_told_of_twice_a_second_at_most_and_its_loss_read_only_then() -> None:
    told: list[tuple[float, Progress]] = []
    now, model = 100.0, SimpleNamespace()
    weighting = LossWeighting()
    weighting.weight = 1.2  # of a batch of 10, rank 0 of 3 has 4
    reporter = ProgressReporter(lambda event: told.append((now, event)), weighting, clock=lambda: now)
    loader = ResumableLoader([], 0, lambda: (0, 0))
    stage = SimpleNamespace(stage="train")
    trainer: Any = SimpleNamespace(world_size=3, current_epoch=1, training=True, num_training_batches=1000, state=stage)
    trainer.global_step = 7
    trainer.train_dataloader = loader
    loss = torch.tensor(0.25).as_subclass(CountsReads)
    for batch in range(240):  # in 30 s
        now += 0.125
        loader.samples += 4
        loader.waited += 0.03125
        reporter.on_train_batch_end(trainer, model, {"loss": loss}, None, batch)
    times = [at for at, _ in told]
    assert min(after - before for before, after in pairwise(times)) >= 0.5
    assert len(told) == 60
    assert CountsReads.reads == 60
    first, last = told[0][1], told[-1][1]
    assert first == Progress(
        "training", 2, 1, 1000, None, None, 0.25, 3, None, 7, None, None
    )  # rates come with the second
    assert last.samples_per_second == pytest.approx(80)
    assert last.seconds_left == pytest.approx((1000 - last.batch) / 8)
    assert (last.step_seconds, last.data_wait_seconds) == (0.125, 0.03125)


@pytest.mark.parametrize("training", [True, False])
def test_epochs_that_are_shorter_than_the_time_between_two_reports_have_rates(training: bool) -> None:
    told: list[Any] = []
    now, module = 0.0, SimpleNamespace()
    reporter = ProgressReporter(told.append, LossWeighting(), clock=lambda: now)
    loader = ResumableLoader([], 0, lambda: (0, 0))
    stage = SimpleNamespace(stage="train" if training else "validate")
    trainer: Any = SimpleNamespace(world_size=1, training=training, validating=True, predicting=False, state=stage)
    trainer.sanity_checking = False
    vars(trainer).update(num_training_batches=4, num_val_batches=[4], train_dataloader=loader, val_dataloaders=loader)
    for trainer.current_epoch in range(100):
        for batch in range(4):
            now += 0.03125
            loader.samples += 4
            loader.waited += 0.015625
            trainer.global_step = batch
            if training:
                reporter.on_train_batch_end(trainer, module, {"loss": torch.tensor(1.0)}, None, batch)
            else:
                reporter.on_validation_batch_end(trainer, module, None, None, batch)
        now += 0.03125  # in which another phase could be
    timed = [event for event in told if event.batch > 1]
    assert len(timed) > 10
    assert {event.samples_per_second for event in timed} == {128}
    assert {(event.step_seconds, event.data_wait_seconds) for event in timed} == {(0.03125, 0.015625)}


def test_each_validation_in_an_epoch_has_rates_of_its_own() -> None:
    told: list[Any] = []
    now, module = 0.0, SimpleNamespace()
    reporter = ProgressReporter(told.append, LossWeighting(), clock=lambda: now)
    stage = SimpleNamespace(stage="validate")
    trainer: Any = SimpleNamespace(world_size=1, current_epoch=0, state=stage, training=False, sanity_checking=False)
    trainer.global_step = 0
    vars(trainer).update(validating=True, predicting=False, num_val_batches=[2], val_dataloaders=[])
    for batch in (0, 1, 0, 1):  # with no news of the training between them
        now += 1
        reporter.on_validation_batch_end(trainer, module, None, None, batch)
    assert [(event.batch, event.seconds_left) for event in told] == [(1, None), (2, 0), (1, None), (2, 0)]


class TellsAll(pl.Callback):
    """Has each batch be told of, in whichever process."""

    def setup(self, *_: Any, stage: str) -> None:
        progress_reporter.EVERY_S = 0


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """All that runs tell, which is shown, too."""
    events: list[Event] = []

    class Recording(console.Display):
        def __call__(self, event: Event) -> None:
            events.append(event)
            super().__call__(event)

    monkeypatch.setattr(console, "Display", Recording)
    monkeypatch.setattr(progress_reporter, "EVERY_S", progress_reporter.EVERY_S)  # which is put back after TellsAll
    return events


def batches_of(events: list[Event]) -> dict[str, list[tuple[int, int, int | None]]]:
    """By phase, the epochs and batches that were told of, in their order."""
    found: dict[str, list[tuple[int, int, int | None]]] = {}
    for event in events:
        if isinstance(event, Progress):
            found.setdefault(event.phase, []).append((event.epoch, event.batch, event.batches))
    return found


IMAGES = TensorDataset(torch.rand(96, 1, 28, 28), torch.randint(10, (96,)))


class WithTest(SimpleModel):
    def test_dataloader(self) -> Any:
        return DataLoader(IMAGES, batch_size=32)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_rank_0_tells_of_the_batches_of_each_phase(
    num_workers: int, gloo: None, told: list[Event], tmp_path: Path
) -> None:
    trainer = Trainer(
        max_epochs=2, num_workers=num_workers, storage_path=str(tmp_path), callbacks=[TellsAll()], logger=False
    )
    loader = DataLoader(IMAGES, batch_size=32)
    trainer.fit(WithTest(), loader, loader)
    found = batches_of(told)
    assert found["training"] == found["validation"] == [(epoch, batch, 3) for epoch in (1, 2) for batch in (1, 2, 3)]
    assert [(batch, batches) for _, batch, batches in found["test"]] == [(1, 3), (2, 3), (3, 3)]
    progress = [event for event in told if isinstance(event, Progress)]
    assert {event.workers for event in progress} == {num_workers or 1}
    assert all((event.loss is not None) == (event.phase == "training") for event in progress)
    assert progress[0].checkpoint is None
    assert progress[-1].checkpoint == 6
    assert all(event.samples_per_second > 0 for event in progress if event.batch > 1)
    told.clear()
    trainer.predict(dataloaders=loader)
    assert {batches for _, _, batches in batches_of(told)["prediction"]} == {2 if num_workers else 3}


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        yield from (torch.ones(784) for _ in range(4))


class OnStream(SimpleModel):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        return None  # which Lightning takes for: skip it


def test_of_a_stream_the_end_is_not_known_and_a_skipped_step_has_no_loss(told: list[Event], tmp_path: Path) -> None:
    trainer = Trainer(max_epochs=1, storage_path=str(tmp_path), callbacks=[TellsAll()], logger=False)
    trainer.fit(OnStream(), DataLoader(Stream(), batch_size=2))
    progress = [event for event in told if isinstance(event, Progress)]
    assert [(each.batch, each.batches, each.seconds_left, each.loss) for each in progress] == [
        (1, None, None, None),
        (2, None, None, None),
    ]


@pytest.mark.parametrize("bar", [None, True, False])
def test_who_says_whether_lightning_is_to_show_a_bar_gets_no_line(
    bar: bool | None, told: list[Event], capsys: pytest.CaptureFixture[str], monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr(console, "PLAIN_EVERY_S", 0)
    trainer = Trainer(max_epochs=1, storage_path=str(tmp_path), callbacks=[TellsAll()], enable_progress_bar=bar)
    trainer.fit(SimpleModel(), MNISTDataModule("digits"))
    assert {"training", "validation", "test"} == batches_of(told).keys()  # which metrics are made of
    assert ("  batch 2/" in capsys.readouterr().out) == (bar is None)


# What a person sees

PARTS = [
    "epoch 3/10",
    "batch 120/375",
    "0:00:12 left",
    "41,203 samples/s",
    "loss 0.2104",
    "4 workers",
    "checkpoint 250",
]
TRAINING = Progress("training", 3, 120, 375, 41203.4, 12.3, 0.21038, 4, 250, 870, 0.05, 0.01)
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


@pytest.mark.parametrize(
    ("progress", "max_epochs", "parts"),
    [
        (TRAINING, 10, PARTS),
        (Progress("training", 3, 120, None, None, None, None, 1, None, 0, None, None), -1, ["epoch 3", "batch 120"]),
        (
            Progress("validation", 3, 12, 40, None, None, None, 1, None, 0, None, None),
            10,
            ["epoch 3/10", "validation 12/40"],
        ),
        (Progress("test", 11, 12, 40, None, 3700.0, None, 1, None, 0, None, None), 10, ["test 12/40", "1:01:40 left"]),
    ],
)
def test_what_is_known_is_shown(progress: Progress, max_epochs: int, parts: list[str]) -> None:
    assert console.progress_parts(progress, max_epochs) == parts


def test_a_narrow_line_has_the_first_parts() -> None:
    assert fitting(PARTS, 200) == "  ".join(PARTS)
    assert fitting(PARTS, 39) == "  ".join(PARTS[:3])
    assert fitting(PARTS, 38) == "  ".join(PARTS[:2])
    assert fitting(PARTS, 3) == PARTS[0]


def test_without_a_terminal_there_is_a_line_a_minute_as_long_as_there_is_no_other(
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = 0.0
    with console.Display(10, clock=lambda: now) as show:
        for second in range(100, 300):  # until then, workers start
            now = second
            show(TRAINING)
            if second == 190:
                show(EpochEnded({"epoch": 3, "samples_per_second": 5.0}))
                assert len(capsys.readouterr().out.splitlines()) == 2
    assert capsys.readouterr().out == "  ".join(PARTS) + "\n"


def make_terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is written to a terminal. Between a fixture and its test pytest would put its own there."""
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    fake = Console(force_terminal=True, width=60, markup=False, emoji=False, soft_wrap=True, _environ={"TERM": "xterm"})
    monkeypatch.setattr(console, "console", fake)
    return screen


def drawn(screen: io.StringIO) -> list[str]:
    """What was written since the last time, as lines and what cleared lines, without the codes."""
    text = screen.getvalue()
    screen.seek(0)
    screen.truncate()
    return text.replace("\x1b[2K", "").replace(HIDE_CURSOR, "").replace("\r", "\n").split("\n")


def test_on_a_terminal_the_line_is_below_all_that_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = make_terminal(monkeypatch)
    handler = logging.StreamHandler(sys.stdout)
    monkeypatch.setattr(logging.root, "handlers", [handler])
    line = "  ".join(PARTS[:4])
    with console.Display(10) as show:
        assert terminal.getvalue() == ""  # the cursor stays as long as there is no line
        show(TRAINING)
        assert drawn(terminal) == [line]
        for event in (Printed("[/a] ", "stdout"), Printed(":b:\n", "stdout")):
            show(event)
        assert drawn(terminal) == ["", "[/a] :b:", line]
        logging.warning("logged")
        assert drawn(terminal)[-2:] == ["logged", line]
        show(Printed("c", "stdout"))
        print("to a file", file=sys.stderr)
        show(WorkersFailed([], "a worker died"))
        assert drawn(terminal) == ["", "", "failure: a worker died", ""]
    assert terminal.getvalue().endswith(SHOW_CURSOR + "\r\x1b[1A\x1b[2K")
    assert "c" in drawn(terminal)
    assert sys.stdout is handler.stream is terminal
    logging.warning("logged")
    assert terminal.getvalue() == "logged\n"
    assert capsys.readouterr().err == "to a file\n"


def test_news_that_is_late_hides_no_cursor(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = make_terminal(monkeypatch)
    with console.Display(10) as show:
        pass
    show(TRAINING)
    assert terminal.getvalue() == ""


def test_nothing_in_what_users_print_is_markup(capsys: pytest.CaptureFixture[str]) -> None:
    console.console.print("[/a] :smile:")
    assert capsys.readouterr().out == "[/a] :smile:\n"


def test_a_terminal_that_is_gone_gets_its_streams_back(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = make_terminal(monkeypatch)
    with console.Display(10) as show:
        show(TRAINING)
        terminal.close()
        show(TRAINING)
    assert sys.stdout is terminal


def test_a_process_that_is_forked_does_not_wait_for_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = make_terminal(monkeypatch)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with console.console._lock:
            held.set()
            done.wait(60)

    with console.Display(10) as show:
        show(TRAINING)
        threading.Thread(target=hold).start()
        assert held.wait(60)
        child = os.fork()
        if not child:
            print("printed")
            os._exit(0 if terminal.getvalue().endswith("printed\n") else 1)
        status = os.waitpid(child, 0)[1]
        done.set()
    assert status == 0


def test_a_dumb_terminal_has_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "console", Console(force_terminal=True, _environ={"TERM": "dumb"}))
    assert console.Display().line is None
