"""The sweep: it finds, stops, survives, and hands over a winner; and it never waits for what nobody frees."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
import ray._private.state
import ray.train
import yaml
from conftest import wait_until
from ray.train.torch import TorchTrainer
from ray.tune.search.sample import Categorical
from ray.tune.stopper import timeout
from ray.util.metrics import Gauge
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from ray_state import placement_groups

from ray_mnist import MNISTDataModule, RequestError, SimpleModel, TrainingError, tune
from ray_mnist.cli.lightning_arguments import for_lightning
from ray_mnist.config import RunConfig
from ray_mnist.data import decoded
from ray_mnist.launch import metrics
from ray_mnist.launch.connection import this_folder
from ray_mnist.ray_train_internals import TrialTorchTrainer
from ray_mnist.run.folder import RunFolder
from ray_mnist.run.records import read_metrics
from ray_mnist.search import space, table
from ray_mnist.search.trial import Plan, Trial

DIGITS = {"data": {"dataset": "digits"}}


def actors() -> set[str]:
    """The ids of the actors that are alive."""
    return {name for name, actor in ray._private.state.actors().items() if actor["State"] == "ALIVE"}


@pytest.fixture
def leaves_nothing(cluster: None) -> Iterator[None]:
    """After the test there are no more actors and placement groups than before, asked through Ray's own state."""
    before = actors()
    yield
    wait_until(lambda: not placement_groups() and actors() <= before, 600, "the sweep's actors and placements to go")


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "trials.csv").open() as file:
        return list(csv.DictReader(file))


# What to search


@pytest.mark.parametrize(
    ("text", "kind", "ends"),
    [
        ("0.1:0.5", "Float", (0.1, 0.5)),
        ("1e-4:1e-1:log", "Float", (1e-4, 1e-1)),
        ("2:8", "Integer", (2, 9)),
        ("16:256:log", "Integer", (16, 257)),
    ],
)
def test_a_range_is_drawn_between_its_ends(text: str, kind: str, ends: tuple[float, float]) -> None:
    domain = space.parse("--space model.x", text)
    assert (type(domain).__name__, domain.lower, domain.upper) == (kind, *ends)
    drawn = [domain.sample() for _ in range(200)]
    assert ends[0] <= min(drawn) <= max(drawn) <= ends[1]
    middle = math.sqrt(ends[0] * ends[1]) if "log" in text else sum(ends) / 2
    assert 0.3 < sum(value < middle for value in drawn) / len(drawn) < 0.7


def test_a_choice_keeps_its_values_and_their_types() -> None:
    assert space.parse("x", "32,64,64,0.5,relu,true").categories == [32, 64, 0.5, "relu", True]
    assert space.parse("x", "3").categories == [3]
    assert isinstance(space.parse("--lr", "0.1", as_range=True), Categorical)


@pytest.mark.parametrize(
    ("text", "as_range", "complaint"),
    [
        ("", False, "leaves a value empty"),
        ("1,,2", False, "leaves a value empty"),
        ("0.5:0.1", False, "is reversed: write the lower end first"),
        ("1e-1,1e-4", True, "is reversed: write the lower end first"),
        ("0:1:log", False, "is logarithmic: both ends have to be positive"),
        ("1:2:3", False, "is no range"),
        ("1,2,3", True, "is no range"),
        ("a:b", False, "is no range"),
        ("nan:1", False, "is no range"),
    ],
)
def test_a_space_that_means_nothing_is_refused(text: str, as_range: bool, complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint) as refusal:
        space.parse("--lr", text, as_range)
    assert f"--lr {text!r}" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_grid_has_the_ends_of_a_range_and_what_lies_between() -> None:
    assert space.points(space.parse("x", "1:9")) == [1, 3, 5, 7, 9]
    assert space.points(space.parse("x", "1e-4:1:log")) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1])
    assert space.extremes({"a": space.parse("a", "1,2"), "b": space.parse("b", "x,y")}) == [
        {"a": 1, "b": "x"},
        {"a": 2, "b": "x"},
        {"a": 1, "b": "x"},
        {"a": 1, "b": "y"},
    ]


@pytest.mark.parametrize(
    ("search_space", "arguments", "complaint"),
    [
        ({"model.lr": [0.1, -1.0]}, {}, "--lr -1.0 is not possible"),
        ({"model.lr": []}, {}, "model.lr has nothing to choose from"),
        ({"model.width": [1]}, {}, "cannot be tried: .*unexpected keyword argument 'width'"),
        ({"lr": [0.1]}, {}, r"lr is neither model\.…, data\.… nor trainer\.…"),
        ({"data.batch_size": [64, 2]}, {"num_workers": 3}, "--batch-size 2 is the batch over all workers"),
        ({"data.batch_size": [5000]}, {}, "--batch-size 5000 is more than the 1151 training samples"),
        ({"model.lr": [0.1]}, {"search": "luck"}, "--search luck is not known: use one of random, grid, optuna"),
        ({"model.lr": [0.1]}, {"num_samples": 0}, "--num-samples 0 is not possible"),
        ({"model.lr": [0.1]}, {"devices": 2}, "devices=2 means nothing here"),
        (
            {"model.lr": [0.1]},
            {"num_workers": (2, 4)},
            "--num-workers: a trial keeps as many workers as it starts with",
        ),
        ({"trainer.nope": [1]}, {}, "Lightning's Trainer refuses its arguments: .*'nope'"),
        ({"trainer.gradient_clip_val": ["x"]}, {}, "Lightning's Trainer refuses its arguments: .*gradient_clip_val"),
        ({"trainer.devices": [2]}, {}, "devices=2 means nothing here"),
        ({"trainer.max_epochs": [3, 4]}, {}, r"trainer\.max_epochs cannot differ from trial to trial: give it to"),
        ({"model.lr": [0.1]}, {"tpu_cores": 8}, "--tpu-cores: trials train on CPUs or GPUs, drop it"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_anything_starts(
    search_space: dict[str, Any], arguments: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=complaint):
        tune(SimpleModel, MNISTDataModule, search_space, storage_path=str(tmp_path / "runs"), **DIGITS, **arguments)
    assert not (tmp_path / "runs").exists()


def test_a_sweeps_arithmetic_comes_before_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = {"data_dir": str(tmp_path / "data"), "mirror": "http://127.0.0.1:1/"}
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(RequestError, match="--batch-size 2 is the batch over all workers"):
        tune(SimpleModel, MNISTDataModule, {"data.batch_size": [64, 2]}, data=nowhere, num_workers=3)
    assert list(tmp_path.iterdir()) == []


def test_each_data_set_is_loaded_once_whatever_the_space_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, load = [], decoded.load

    def count(dataset: str, data_dir: Path) -> Any:
        loaded.append(data_dir.name)
        return load(dataset, data_dir)

    monkeypatch.setattr(decoded, "load", count)
    domains = {
        "model.lr": [0.1, 0.2],
        "data.data_dir": [str(tmp_path / "one"), str(tmp_path / "other")],
        "data.seed": [1, 2],
        "data.batch_size": [64, 2000],  # the last of all is refused
    }
    with pytest.raises(RequestError, match="--batch-size 2000 is more than the 1151 training samples"):
        tune(SimpleModel, MNISTDataModule, domains, storage_path=str(tmp_path / "runs"), **DIGITS)
    assert sorted(loaded) == ["one", "other"]


# What a trial tells Ray Tune


def build(parameters: dict[str, Any]) -> tuple[SimpleModel, MNISTDataModule]:
    return SimpleModel(**parameters), MNISTDataModule("digits")


def test_a_trial_waits_for_its_epochs_without_a_look_at_the_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = RunConfig(max_epochs=3)
    lightning = for_lightning({"logger": False, "max_epochs": 3}, config)
    plan = Plan(build, config, lightning, "val_loss", "min", str(tmp_path), this_folder())
    looks, read = [], RunFolder.read

    def count(folder: RunFolder, file: str) -> bytes:
        looks.append(file)
        return read(folder, file)

    monkeypatch.setattr(RunFolder, "read", count)
    exported = set[tuple[str, str]]()

    class Recorded(Gauge):
        def set(self, value: Any, tags: Any = None) -> None:
            exported.add((self.info["name"], self.info["default_tags"]["run"]))

    monkeypatch.setattr(metrics, "Gauge", Recorded)

    class Planned(Trial):
        def setup(self, config: dict[str, Any]) -> None:  # type: ignore[override]
            super().setup(config, plan)

    trial = Planned({"lr": 1e-3})
    told = [trial.train() for _ in range(4)]
    trial.stop()
    assert [(result["epoch"], result["done"]) for result in told] == [(1, False), (2, False), (3, False), (3, True)]
    assert [result["val_loss"] for result in told[:3]] == [
        row["val_loss"] for row in read_metrics(RunFolder(str(tmp_path), trial.trial_id))
    ]
    assert ("mnist_loss", trial.trial_id) in exported
    assert looks == ["metrics.csv"] * 2  # for what an earlier start of the trial had told, and the line above


def test_a_trial_trains_with_its_own_arguments_of_lightnings_trainer(tmp_path: Path) -> None:
    lightning = for_lightning({"logger": False, "gradient_clip_val": 1.0, "max_epochs": 3}, RunConfig())
    plan = Plan(lambda _: build({}), RunConfig(), lightning, "val_loss", "min", str(tmp_path), this_folder())
    job = plan.job({"trainer.gradient_clip_val": 0.5, "model.lr": 0.1}, "trial")
    assert job.lightning == lightning | {"gradient_clip_val": 0.5}


# What a sweep does


class Unlucky(SimpleModel):
    """Dies of one learning rate, and gives up at another."""

    def on_train_epoch_start(self) -> None:
        if self.hparams["lr"] == 0.125:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.hparams["lr"] == 0.25:
            raise ValueError("a bug at 0.25")


@pytest.mark.slow
def test_failed_trials_are_rows_with_their_reasons_and_the_best_of_the_rest_wins(cluster: None, tmp_path: Path) -> None:
    result = tune(
        Unlucky,
        MNISTDataModule,
        {"model.lr": [0.005, 0.125, 0.25, 1e30, 1e-6]},
        search="grid",
        scheduler="fifo",
        max_epochs=3,
        storage_path=str(tmp_path),
        name="sweep",
        **DIGITS,
    )
    status = {float(row["model.lr"]): row["status"] for row in rows_of(tmp_path / "sweep")}
    assert status[0.005] == status[1e-6] == "done"
    assert status[0.125].startswith("failed: killed")
    assert status[0.25] == "failed: ValueError: a bug at 0.25"
    assert status[1e30].startswith("failed: diverged: the loss is")
    assert (result.values["trials"], result.values["failed"]) == (5, 3)
    assert result.values["parameters"] == {"model.lr": 0.005}
    assert result.values["test_accuracy"] > 0.9
    best = yaml.safe_load((tmp_path / "sweep" / "best_config.yaml").read_text())
    assert best["model"]["init_args"]["lr"] == 0.005
    assert (tmp_path / "sweep" / "best" / "checkpoint.ckpt").is_file()
    assert not list((tmp_path / "sweep" / "trials").glob("*/checkpoint_*"))
    assert {path.name for path in (tmp_path / "sweep" / "plots").iterdir()} == {
        "curves.png",
        "parallel.png",
        "parameters.png",
    }
    assert "a bug at 0.25" in (tmp_path / "sweep" / "report.html").read_text()


@pytest.mark.slow
def test_a_sweep_without_a_success_says_so(cluster: None, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"no trial succeeded: failed: ValueError: a bug at 0\.25"):
        tune(Unlucky, MNISTDataModule, {"model.lr": [0.25]}, storage_path=str(tmp_path), num_samples=1, **DIGITS)


@pytest.mark.slow
@pytest.mark.usefixtures("leaves_nothing")
def test_trials_of_two_workers_are_stopped_and_leave_nothing_behind(tmp_path: Path) -> None:
    result = tune(
        SimpleModel,
        MNISTDataModule,
        {"model.lr": [0.005, 1e-6]},
        search="grid",
        max_concurrent=1,
        max_epochs=9,
        num_workers=2,
        storage_path=str(tmp_path),
        name="sweep",
        **DIGITS,
    )
    status = {float(row["model.lr"]): row["status"] for row in rows_of(tmp_path / "sweep")}
    assert status == {0.005: "done", 1e-6: "stopped early"}
    assert result.values["num_workers"] == 2
    assert table.progress[result.values["trial"]].workers == 2  # as they told this process on their way


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_optuna_searches_the_range(tmp_path: Path) -> None:
    result = tune(
        SimpleModel,
        MNISTDataModule,
        {"model.lr": ray.tune.loguniform(1e-3, 1e-2)},
        search="optuna",
        num_samples=3,
        max_epochs=1,
        storage_path=str(tmp_path),
        **DIGITS,
    )
    rates = [trial.parameters["model.lr"] for trial in result.trials]
    assert [trial.status for trial in result.trials] == ["done"] * 3
    assert len(set(rates)) == 3
    assert 1e-3 <= min(rates) <= max(rates) <= 1e-2


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_sweep_ends_with_its_time_budget_and_still_has_a_winner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def epochs() -> int:
        """That each trial has had, and one."""
        histories = [read_metrics(RunFolder(str(path.parent), path.name)) for path in tmp_path.glob("sweep/trials/*")]
        return 1 + min(map(len, histories), default=0)

    monkeypatch.setattr(timeout, "time", SimpleNamespace(time=epochs))
    result = tune(
        SimpleModel,
        MNISTDataModule,
        {"model.lr": [0.002]},
        scheduler="fifo",
        num_samples=2,
        max_epochs=100_000,
        time_budget=12,
        storage_path=str(tmp_path),
        name="sweep",
        **DIGITS,
    )
    assert "stopped early" in {trial.status for trial in result.trials}
    assert all(len(trial.history) < 100_000 for trial in result.trials)
    assert result.values["test_accuracy"] > 0.9


# What a stopped trial leaves


def wait_for_ever(config: dict[str, Any]) -> None:
    Path(config["marker"], str(ray.train.get_context().get_world_rank())).touch()
    time.sleep(600)


@ray.remote(num_cpus=0)
class TrialActor:
    """What Ray Tune has for each trial, with a run inside."""

    def fit(self, trainer_class: type[TorchTrainer], folder: str) -> None:
        trainer_class(
            wait_for_ever,
            train_loop_config={"marker": folder},
            scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
            run_config=ray.train.RunConfig(name="run", storage_path=folder),
        ).fit()


@pytest.mark.slow
@pytest.mark.parametrize(("trainer_class", "freed"), [(TrialTorchTrainer, True), (TorchTrainer, False)])
def test_a_trial_that_is_killed_frees_its_workers_where_rays_own_run_does_not(
    trainer_class: type[TorchTrainer], freed: bool, cluster: None, tmp_path: Path
) -> None:
    trial = placement_group([{"CPU": 0.01}, {"CPU": 1}, {"CPU": 1}])
    ray.get(trial.ready(), timeout=600)
    inside = PlacementGroupSchedulingStrategy(trial, placement_group_bundle_index=0)
    actor = TrialActor.options(scheduling_strategy=inside).remote()
    actor.fit.remote(trainer_class, str(tmp_path))
    wait_until(lambda: {"0", "1"} <= {path.name for path in tmp_path.iterdir()}, 600, "the workers to start")
    ray.kill(actor)
    remove_placement_group(trial)  # as Ray Tune does
    try:
        if freed:
            wait_until(lambda: not placement_groups(), 600, f"{placement_groups()} to be gone")
        else:  # the next trial would wait for these for ever
            time.sleep(5)
            assert len(placement_groups()) == 1
    finally:
        for group in placement_groups():
            name = bytes.fromhex(group["placement_group_id"])
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(name)))
        for row in ray._private.state.actors().values():
            if row["State"] == "ALIVE" and row["ActorClassName"] == "PlacementGroupCleaner" and row["Pid"]:
                os.kill(row["Pid"], signal.SIGKILL)


# From the shell, on the published MNIST


Run = Callable[..., "subprocess.CompletedProcess[str]"]
WAITS = """
import time
from pathlib import Path
from ray_mnist import SimpleModel

class Waits(SimpleModel):
    def on_train_epoch_start(self):
        while self.current_epoch == 4 and not Path("go").exists():
            time.sleep(0.05)
"""


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(command: Run, tmp_path: Path) -> None:
    (tmp_path / "waits.py").write_text(WAITS)
    options = ["--dataset=digits", "--num-samples=4", "--max-epochs=6", "--scheduler=fifo", "--max-concurrent=2"]
    options += ["--lr=1e-3,2e-3", "--name=sweep", "--model=waits.Waits"]
    driver = subprocess.Popen([sys.executable, "-m", "ray_mnist.tune", *options], cwd=tmp_path)
    trials = tmp_path / "runs" / "sweep" / "trials"

    def histories() -> dict[str, list[dict[str, float]]]:
        return {path.name: read_metrics(RunFolder(str(trials), path.name)) for path in trials.glob("*")}

    try:
        wait_until(lambda: [*map(len, histories().values())] == [4, 4], 600, "two trials to be under way")
        below = psutil.Process(driver.pid).children(recursive=True)
    finally:
        driver.kill()
        driver.wait()
    for process in below:
        with suppress(psutil.NoSuchProcess):  # it went with its parent
            process.kill()
    psutil.wait_procs(below, timeout=30)
    before = histories()
    (tmp_path / "go").touch()
    done = command("--resume", "--name=sweep", module="tune")
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "runs" / "sweep")
    assert [(row["status"], row["epochs"]) for row in rows] == [("done", "6")] * 4
    after = histories()
    for name, known in before.items():
        assert after[name][:4] == known, "an epoch was trained again"
    assert all([row["epoch"] for row in history] == list(range(1, 7)) for history in after.values())


@pytest.mark.slow
def test_a_sweep_on_mnist_finds_a_good_model(command: Run, mnist_files: Path, tmp_path: Path) -> None:
    trials = 8
    done = command(
        f"--data.data_dir={mnist_files}",
        f"--num-samples={trials}",
        "--max-concurrent=2",
        "--max-epochs=6",
        "--num-workers=1",
        "--name=sweep",
        module="tune",
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "runs" / "sweep")
    assert len(rows) == trials
    assert sum(row["status"] == "stopped early" for row in rows) >= trials / 3
    result = json.loads((tmp_path / "runs" / "sweep" / "result.json").read_text())
    assert result["test_accuracy"] >= 0.97
    again = command("--config=runs/sweep/best_config.yaml", "--name=again", timeout=600)
    assert again.returncode == 0, again.stderr
    best = json.loads((tmp_path / "runs" / "again" / "result.json").read_text())
    assert best["val_accuracy"] == pytest.approx(result["val_accuracy"], abs=0.005)
