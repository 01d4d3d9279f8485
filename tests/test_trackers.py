"""What arrives in MLflow and in Weights & Biases, read back from the files that these libraries write themselves."""

import io
import json
import os
import signal
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import wandb
import yaml
from conftest import wait_until
from lightning_utilities.core.imports import RequirementCache
from mlflow.tracking import MlflowClient
from PIL import Image
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import MLFlowLogger, WandbLogger
from wandb.proto.wandb_internal_pb2 import Record

from ray_mnist import MNISTDataModule, RequestError, SimpleModel, Trainer, tune
from ray_mnist.cli import parser
from ray_mnist.cli.lightning_arguments import for_lightning
from ray_mnist.config import RunConfig
from ray_mnist.launch.connection import this_folder
from ray_mnist.run import trackers
from ray_mnist.run.folder import RunFolder
from ray_mnist.search.trial import Plan, Trial

pytestmark = [pytest.mark.timeout(1200), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
PLOTS = ["accuracy", "confusion", "loss", "mistakes", "weights"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """MLflow's database before any run, which takes seconds to make."""
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file.read_bytes()


@pytest.fixture
def store(empty_store: bytes, tmp_path: Path) -> str:
    """The tracking URI of an MLflow of the test's own."""
    (tmp_path / "mlflow.db").write_bytes(empty_store)
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def make_loggers(store: str, **options: Any) -> list[Any]:
    """W&B's service, which stays from test to test, takes paths as they were where it began."""
    return [
        MLFlowLogger("digits", tracking_uri=store, **options),
        WandbLogger(project="digits", save_dir=Path.cwd(), **options),
    ]


def mlflow_runs(store: str) -> list[Any]:
    """All of the experiment."""
    client = MlflowClient(store)
    return list(client.search_runs([client.get_experiment_by_name("digits").experiment_id]))


def artifacts(store: str, run: Any, folder: str | None = None) -> dict[str, Path]:
    """The files of a run, by their paths there."""
    found: dict[str, Path] = {}
    for item in MlflowClient(store).list_artifacts(run.info.run_id, folder):
        if item.is_dir:
            found |= artifacts(store, run, item.path)
        else:
            found[item.path] = Path(run.info.artifact_uri, item.path)
    return found


def records(file: Path) -> Iterator[Any]:
    """What W&B wrote into a file: records of its own, in the log format of LevelDB after a header of 7 bytes."""
    content, at, part = file.read_bytes(), 7, b""
    while at + 7 < len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        part += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(part)
            part = b""


def is_written(file: Path) -> bool:
    """Whether W&B's own process is done with it, which it may be some time after `finish` has returned."""
    return any(record.HasField("exit") for record in records(file))


class WandbRun:
    """What all files that belong to one run say together; the last of them belongs to a process that finished."""

    def __init__(self, folder: Path) -> None:
        self.ids: set[str] = set()
        self.files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
        wait_until(lambda: is_written(self.files[-1]), 120, f"{self.files[-1]} to be written")
        self.config: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.artifacts: list[str] = []
        for file in self.files:
            for record in records(file):
                if record.HasField("run"):
                    self.ids.add(record.run.run_id)
                for item in (*record.config.update, *record.run.config.update):
                    self.config[item.key] = json.loads(item.value_json)
                if record.HasField("history"):
                    items = record.history.item
                    self.history.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
                if record.request.HasField("log_artifact"):
                    self.artifacts.append(record.request.log_artifact.artifact.name)
                if record.HasField("artifact"):
                    self.artifacts.append(record.artifact.name)

    @property
    def losses(self) -> list[float]:
        """Of the validations, in their order."""
        return [row["val_loss"] for row in self.history if "val_loss" in row]

    def pictures(self) -> list[str]:
        """The names of those that were logged, whose files are there."""
        found = []
        for row in self.history:
            for name, value in row.items():
                if name.endswith("/filenames"):
                    assert any((file.parent / "files" / value[0]).exists() for file in self.files)
                    found.append(name.split("/")[1])
        return sorted(found)


@pytest.mark.plots
@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_configuration_metrics_plots_and_the_best_checkpoint_arrive(
    num_workers: int, gloo: None, store: str, tmp_path: Path
) -> None:
    loggers = make_loggers(store, log_model=True)
    trainer = Trainer(
        max_epochs=2, num_workers=num_workers, storage_path="runs", name="run", logger=loggers, log_every_n_steps=6
    )
    trainer.fit(SimpleModel(lr=0.002), MNISTDataModule("digits"))
    values, folder = trainer.result.values, tmp_path / "runs" / "run"
    (run,) = mlflow_runs(store)  # of rank 0 alone
    assert run.info.status == "FINISHED"
    assert run.data.params["lr"] == run.data.params["config/model/init_args/lr"] == "0.002"
    assert run.data.params["config/num_workers"] == str(num_workers)
    assert run.data.metrics["val_loss"] == pytest.approx(values["val_loss"])
    assert run.data.metrics["test_accuracy"] == pytest.approx(values["test_accuracy"])
    found = artifacts(store, run)
    assert found["config.yaml"].read_bytes() == (folder / "config.yaml").read_bytes()
    assert sorted(path.removeprefix("plots/") for path in found if path.startswith("plots/")) == [
        f"{name}.png" for name in PLOTS
    ]
    best = torch.load(found["checkpoint/checkpoint.ckpt"])["state_dict"]
    ours = torch.load(folder / values["best_checkpoint"] / "checkpoint.ckpt")["state_dict"]
    assert all(torch.equal(best[name], ours[name]) for name in ours)
    for logger in loggers[1:]:
        logger.experiment.finish()
    wandb = WandbRun(tmp_path)
    assert wandb.ids == {loggers[1].version}
    assert wandb.config["lr"] == 0.002
    assert wandb.config["config"] == yaml.safe_load((folder / "config.yaml").read_text())
    assert wandb.losses == [pytest.approx(row["val_loss"]) for row in trainer.result.history]
    assert wandb.pictures() == PLOTS
    assert [name for name in wandb.artifacts if name.startswith("model-")] == [f"model-{loggers[1].version}"]


class Dies(pl.Callback):
    """Has rank 0 fail, or be killed, in the second epoch, where a file says so."""

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.is_global_zero and trainer.current_epoch == 1 and Path("dies").exists():
            how = Path("dies").read_text()
            Path("dies").unlink()
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError("the disk is gone")


def test_a_run_that_is_resumed_goes_on_in_the_run_of_the_tracker(store: str, tmp_path: Path) -> None:
    """With other options, too, of which MLflow's parameters keep the first."""
    Path("dies").touch()
    with pytest.raises(OSError, match="the disk is gone"):
        fit_on(store, max_epochs=2)
    assert [run.info.status for run in mlflow_runs(store)] == ["FAILED"]
    trainer = fit_on(store, max_epochs=3, resume=True)
    run, wandb = check_one_run(store, trainer, tmp_path)
    assert run.data.params["config/max_epochs"] == "2"
    assert yaml.safe_load(artifacts(store, run)["config.yaml"].read_text())["max_epochs"] == 3
    assert wandb.config["config"]["max_epochs"] == 3
    assert wandb.losses == [pytest.approx(row["val_loss"]) for row in trainer.result.history]


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_workers_that_start_again_go_on_in_the_run_of_the_tracker(store: str, tmp_path: Path) -> None:
    """In Ray's own processes, of which one is killed."""
    Path("dies").write_text("killed")
    trainer = fit_on(store, max_epochs=3, num_workers=2)
    assert trainer.result.values["restarts"] == 1
    _, wandb = check_one_run(store, trainer, tmp_path)
    # Of the killed worker W&B's own process may have had the rest to write yet.
    assert wandb.losses[-2:] == [pytest.approx(row["val_loss"]) for row in trainer.result.history[-2:]]


def check_one_run(store: str, trainer: Trainer, folder: Path) -> tuple[Any, WandbRun]:
    """That each tracker has one run, MLflow's with each epoch's metrics once."""
    (run,) = mlflow_runs(store)
    assert run.info.status == "FINISHED"
    history = trainer.result.history
    logged = MlflowClient(store).get_metric_history(run.info.run_id, "val_loss")
    assert [metric.value for metric in logged] == [pytest.approx(row["val_loss"]) for row in history]
    wandb = WandbRun(folder)
    assert wandb.ids == {trainer.loggers[1].version}
    return run, wandb


def fit_on(store: str, **options: Any) -> Trainer:
    """Trains as another process would, with loggers of its own; returns with all written."""
    trainer = Trainer(logger=make_loggers(store), name="run", storage_path="runs", callbacks=[Dies()], **options)
    try:
        trainer.fit(SimpleModel(), MNISTDataModule("digits"))
    finally:
        trackers.close(trainer.loggers)
    return trainer


def test_with_a_model_checkpoint_of_the_users_lightning_uploads_its_files(store: str) -> None:
    best = ModelCheckpoint("checkpoints", "best", monitor="val_loss")
    logger = MLFlowLogger("digits", tracking_uri=store, log_model=True)
    trainer = Trainer(max_epochs=1, storage_path="runs", logger=logger, callbacks=[best])
    trainer.fit(SimpleModel(), MNISTDataModule("digits"))
    (run,) = mlflow_runs(store)
    assert {path for path in artifacts(store, run) if path.endswith(".ckpt")} == {"best/best.ckpt"}


def test_a_run_of_its_own_is_what_a_logger_was_given(store: str) -> None:
    """And none that there is not."""
    with pytest.raises(RequestError, match=r"MLFlowLogger: no run can be begun there: .*none"):
        Trainer(storage_path="runs", logger=MLFlowLogger(tracking_uri=store, run_id="none")).fit(
            SimpleModel(), MNISTDataModule("digits")
        )
    assert not Path("runs").exists()
    loggers = [MLFlowLogger("digits", tracking_uri=store), WandbLogger(id="mine")]
    folder = RunFolder("runs", "run")
    trackers.begin(folder, loggers, elsewhere=False)
    (run,) = mlflow_runs(store)
    given = [MLFlowLogger(tracking_uri=store, run_id=run.info.run_id), WandbLogger(id="other")]
    trackers.begin(folder, given, elsewhere=False)
    assert [logger.version for logger in loggers + given] == [run.info.run_id, "mine", run.info.run_id, "other"]


def test_workers_go_on_in_the_wandb_run_that_a_script_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE")
    begun = wandb.init(project="theirs", entity="team", mode="offline")
    logger = WandbLogger(experiment=begun)
    trackers.begin(RunFolder("runs", "run"), [logger], elsewhere=True)
    (sent,) = trackers.copies([logger])
    run = sent.experiment
    assert run is not begun
    assert (run.id, run.project, run.entity, run.offline) == (begun.id, "theirs", "team", True)
    run.finish()


def test_a_run_that_is_refused_is_not_left_running(store: str) -> None:
    """By another tracker, or later."""
    loggers = [MLFlowLogger("digits", tracking_uri=store), MLFlowLogger(tracking_uri=store, run_id="none")]
    with pytest.raises(RequestError, match="no run can be begun there"):
        Trainer(storage_path="runs", logger=loggers).fit(SimpleModel(), MNISTDataModule("digits"))
    logger = MLFlowLogger("digits", tracking_uri=store)

    def later() -> None:
        with trackers.begun(RunFolder("runs", "run"), [logger], elsewhere=True):
            assert [run.info.status for run in mlflow_runs(store)] == ["RUNNING", "FAILED"]
            raise RequestError("later")

    with pytest.raises(RequestError, match="later"):
        later()
    assert [run.info.status for run in mlflow_runs(store)] == ["FAILED", "FAILED"]


def test_a_tracker_that_fails_in_the_end_spoils_no_run(store: str) -> None:
    logger = MLFlowLogger("digits", tracking_uri=store, artifact_location=str(Path("file", "inside").absolute()))
    assert logger.run_id
    Path("file").touch()
    Image.new("L", (4, 4)).save(png := io.BytesIO(), "png")
    with pytest.warns(UserWarning, match="MLFlowLogger did not take all plots and checkpoints"):
        trackers.hand_over([logger], {"loss": png.getvalue()}, None, elsewhere=False)


def test_each_trial_of_a_sweep_has_a_run_of_its_own(store: str, tmp_path: Path) -> None:
    """Though one process goes on from one trial to the next, and has the loggers from one plan."""
    config = RunConfig(max_epochs=1)
    lightning = for_lightning({"logger": make_loggers(store), "max_epochs": 1}, config)
    plan = Plan(build, config, lightning, "val_loss", "min", str(tmp_path / "trials"), this_folder())

    class Planned(Trial):
        trial_id = "first"  # type: ignore[assignment]

        def setup(self, config: dict[str, Any]) -> None:  # type: ignore[override]
            super().setup(config, plan)

    trial = Planned({"lr": 0.001})
    assert [trial.train()["done"] for _ in range(2)] == [False, True]
    trial.trial_id = "second"
    assert trial.reset_config({"lr": 0.002})
    assert [trial.train()["done"] for _ in range(2)] == [False, True]
    trial.stop()
    assert sorted(run.data.params["lr"] for run in mlflow_runs(store)) == ["0.001", "0.002"]
    assert len(WandbRun(tmp_path).ids) == 2


def test_a_sweep_is_refused_one_run_for_all_its_trials(store: str) -> None:
    """Which it was given, or a script has begun."""
    begun = MLFlowLogger("digits", tracking_uri=store)
    run = wandb.init(project="theirs")
    given = [
        WandbLogger(experiment=run),
        WandbLogger(id="mine"),
        MLFlowLogger(tracking_uri=store, run_id="theirs"),
        begun,
    ]
    for logger, name in zip(given, (run.id, "mine", "theirs", begun.run_id), strict=True):
        with pytest.raises(RequestError) as refused:
            tune(SimpleModel, MNISTDataModule, {"model.lr": [0.1]}, data={"dataset": "digits"}, logger=logger)
        assert str(refused.value) == (
            f"{type(logger).__name__} has the run {name}, and trials do not share one: leave it out, and each trial "
            "has a run of its own."
        )
    run.finish()
    assert not Path("runs").exists()


def build(parameters: dict[str, Any]) -> tuple[SimpleModel, MNISTDataModule]:
    return SimpleModel(**parameters), MNISTDataModule("digits")


def test_without_the_library_one_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytorch_lightning.loggers.mlflow._MLFLOW_AVAILABLE", RequirementCache("mlflow>=1000"))
    train = parser.make_parser("train", "")
    config = parser.parse(train, ["--trainer.logger", "MLFlowLogger"])
    with pytest.raises(RequestError) as refused:
        parser.trainer_arguments(train, config)
    sentence = "--trainer.logger MLFlowLogger needs the package mlflow: pip install 'ray-mnist[trackers]'."
    assert str(refused.value) == sentence


def test_from_the_command_line_a_wandb_run_can_be_resumed() -> None:
    """Whose parser gives WandbLogger each argument of wandb.init, and so None for Lightning's `resume`."""
    train = parser.make_parser("train", "")
    config = parser.parse(train, ["--trainer.logger", "WandbLogger", "--trainer.logger.project", "digits"])
    logger = parser.trainer_arguments(train, config)["logger"]
    trackers.begin(RunFolder("runs", "run"), [logger], elsewhere=False)
    assert logger._wandb_init["resume"] == "allow"
    assert logger.version
