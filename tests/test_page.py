"""report.html: one file that says all of a run, and is whole without a network."""

import base64
import io
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from ray_mnist import MNISTDataModule, SimpleModel, Trainer
from ray_mnist.run import page
from ray_mnist.run.folder import RunFolder
from ray_mnist.run.outcome import Outcome, TrainerState
from ray_mnist.search import page as sweep_page
from ray_mnist.search import plots as sweep_plots
from ray_mnist.search.results import TrialRow, as_table

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Reads a page strictly: every element ends, in its order; keeps what it shows and what it refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.links: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def all(self, tag: str) -> list[str]:
        return [text for where, text in self.texts if where == tag and text]


@pytest.mark.plots
def test_a_run_leaves_a_page_that_says_all_of_it(tmp_path: Path) -> None:
    trainer = Trainer(max_epochs=2, storage_path=str(tmp_path), name="run", logger=False)
    trainer.fit(SimpleModel(), MNISTDataModule("digits"))
    text = (tmp_path / "run/report.html").read_text()
    found, values = Page(text), trainer.result.values
    assert found.all("h1") == ["SimpleModel on digits"]
    assert found.all("h2") == [
        "Time",
        "Curves and confusion",
        "Classes",
        "Worst mistakes",
        "What the first layer looks for",
        "Epochs",
        "Configuration",
    ]
    shown = dict(zip(found.all("dt"), found.all("dd"), strict=True))
    assert shown["test accuracy"] == f"{values['test_accuracy']:.4f}"
    assert shown["train samples"] == "1,151"
    assert found.all("span") == ["startup", "fit", "test"]
    assert (tmp_path / "run/config.yaml").read_text().strip() in found.all("pre")
    assert f"{values['val_loss']:.5g}" in found.all("td")
    pictures = [Image.open(io.BytesIO(base64.b64decode(link.partition("base64,")[2]))) for link in found.links]
    assert [picture.format for picture in pictures] == ["PNG"] * 5
    assert all(link.startswith("data:image/png;base64,") for link in found.links)
    assert not re.search(r"https?://|@import|url\(|<script", text)
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def outcome(**changed: object) -> Outcome:
    state = TrainerState({}, {}, {}, current_epoch=1, global_step=5)
    known = {"device": "cpu", "history": [{"epoch": 1.0, "step": 5.0, "seconds": 3.0, "val_<b>": 0.25}], "steps": 5}
    known |= {"train_samples": 9, "val_samples": 0, "best_checkpoint": None, "started": 1010.0, "fit_seconds": 60.0}
    return Outcome(**{"trainer_state": state, **known, **changed})  # type: ignore[arg-type]


VALUES = {"name": "run", "dataset": "<Own>", "model": "Net", "device": "cpu", "num_workers": 2, "seed": 0, "steps": 5}
VALUES |= {"test_loss": None, "test_accuracy": None, "restarts": 1, "versions": {"torch": "2"}}
VALUES |= {"seconds": {"startup": 10.0, "fit": 60.0, "test": 0.0, "total": 80.0}}


def trial(name: str, lr: float, layers: str, *losses: float, status: str = "done") -> TrialRow:
    history = [{"epoch": float(epoch), "val_loss": loss} for epoch, loss in enumerate(losses, 1)]
    return TrialRow(name, {"model.lr": lr, "model.layers": layers}, history, status, 2.0)


def test_a_sweep_leaves_a_page_with_all_trials_and_the_best(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "sweep")
    folder.write("best_config.yaml", "model: <Net>\n")
    rows = [
        trial("a", 0.0012345, "one", 0.5, 0.25),
        trial("b", 1.0, "two", 0.75, status="stopped early"),
        trial("c", 2.0, "one", status="failed: ValueError: <bug>"),
    ]
    values = {"name": "sweep", "dataset": "digits", "model": "<Net>", "trial": "a", "trials": 3, "failed": 1}
    values |= {"stopped_early": 1, "parameters": rows[0].parameters, "epochs": 2, "val_loss": 0.25, "seconds": 9.0}
    values |= {"val_accuracy": None, "test_accuracy": 0.875, "versions": {"ray": "2"}}
    drawn = sweep_plots.draw(folder, rows, "val_loss", "min")
    sweep_page.write(folder, values, as_table(rows, "val_loss", "min"), "val_loss", drawn, started=1000.0)
    found = Page(folder.read("report.html").decode())
    assert found.all("h1") == ["Sweep of <Net> on digits"]
    assert "3 trials, 1 of them failed, 1 stopped early, in 9.0 s" in found.all("p")[0]
    assert dict(zip(found.all("dt"), found.all("dd"), strict=True)) == {
        "model.lr": "0.001234",
        "model.layers": "one",
        "test accuracy": "0.8750",
        "val loss": "0.2500",
        "epochs": "2",
    }
    shown = ["epochs", "val loss", "val accuracy", "status", "seconds"]
    assert found.all("th") == ["trial", "model.lr", "model.layers", *shown]
    assert [cell for cell in found.all("td") if cell in "abc" or "bug" in cell] == ["a", "b", "c", rows[2].status]
    assert found.all("pre") == ["model: <Net>"]
    assert len(found.links) == len(drawn) == 3
    assert all(link.startswith("data:image/png;base64,") for link in found.links)


def written(folder: Path, result: Outcome, class_names: tuple[str, ...] | None = None) -> Page:
    run = RunFolder(str(folder), "run")
    run.write("config.yaml", "model: <Net>\n")
    page.write(run, VALUES, result, class_names, plots={}, started=1000.0)
    return Page(run.read("report.html").decode())


def test_a_model_without_classes_is_shown_with_what_there_is(tmp_path: Path) -> None:
    found = written(tmp_path, outcome(test_metrics=[{"test_error": 0.5}]))
    assert found.all("h1") == ["Net on <Own>"]
    assert found.all("h2") == ["Time", "Epochs", "Configuration"]
    assert dict(zip(found.all("dt"), found.all("dd"), strict=True)) == {"restarts": "1", "test error": "0.5000"}
    assert found.all("th") == ["epoch", "step", "val <b>", "seconds"]
    assert found.links == []


def test_restarts_are_on_the_time_line_where_they_were(tmp_path: Path) -> None:
    lines = [
        {"workers": ["worker 1 died"], "then": "starting again"},  # as older runs wrote it
        {"time": 990.0, "workers": ["worker 0 died"], "then": "starting again"},  # before a resume
        {"time": 1004.0, "workers": ["worker 1 <died>"], "then": "starting again"},
    ]
    RunFolder(str(tmp_path), "run").write("failures.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines))
    found = written(tmp_path, outcome())
    assert found.all("li") == [f"{line['workers'][0]}; starting again" for line in lines]
    assert re.findall(r"<i style=\"left: (.*?)%\">", (tmp_path / "run/report.html").read_text()) == ["5.0"]


def test_each_class_is_measured_by_what_it_was_taken_for(tmp_path: Path) -> None:
    pairs = Counter({(0, 0): 8, (0, 1): 2, (1, 1): 3, (2, 1): 1})
    cat, dog, cow = page.classes(pairs, ("cat", "dog", "cow"))
    assert cat == {"name": "cat", "samples": 10, "recall": "0.8000", "precision": "1.0000", "f1": "0.8889"} | {
        "taken_for": "dog (2)"
    }
    assert (dog["recall"], dog["precision"], dog["f1"], dog["taken_for"]) == ("1.0000", "0.5000", "0.6667", "")
    assert (cow["recall"], cow["precision"], cow["f1"], cow["taken_for"]) == ("0.0000", "", "0.0000", "dog (1)")
    found = written(tmp_path, outcome(confusion=pairs, classes=3), ("cat", "dog", "cow"))
    assert "Classes" in found.all("h2")
    assert [cell for cell in found.all("td") if cell in ("cat", "dog", "cow")] == ["cat", "dog", "cow"]
    assert page.classes(Counter(), ()) == []


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_none_does_not_spoil_the_page(tmp_path: Path, number: float) -> None:
    found = written(tmp_path, outcome(test_metrics=[{"test_error": number}]))
    assert str(number) in found.all("dd")
