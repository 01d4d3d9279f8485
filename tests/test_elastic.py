"""A run with a range of workers goes on with as many as there are, and loses nothing when their number changes."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import ray
from conftest import wait_until
from metadata_server import SPOT, metadata_server, spot
from ray.cluster_utils import Cluster as LocalCluster

from ray_mnist import MNISTDataModule, SimpleModel, Trainer
from ray_mnist.callbacks import Recorder
from ray_mnist.launch import pause
from ray_mnist.launch import ray as on_ray
from ray_mnist.run.folder import RunFolder
from ray_mnist.run.records import CHANGES, read_failures

EPOCHS = 3
STEPS_PER_EPOCH = 17  # digits: 1,151 training samples in global batches of 64


class Gate(pl.Callback):
    """Has rank 0, and the others with it, wait until steps are open, or it is told to make room for other workers.

    It tells how far how many workers have come.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.open(0)

    def open(self, until: int) -> None:
        """For steps before that."""
        (self.folder / "new").write_text(str(until))
        (self.folder / "new").rename(self.folder / "open")

    @property
    def steps(self) -> list[tuple[int, int, str]]:
        """Of each step that was begun, in order: its number from 0, how many workers there were, and rank 0's node."""
        log = self.folder / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [(int(step), int(workers), node) for step, workers, node in map(str.split, lines)]

    def last(self, num_workers: int) -> int:
        """The step at which so many workers are or were last; -1 if there have not been so many."""
        return max((step for step, workers, _ in self.steps if workers == num_workers), default=-1)

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Has rank 0 be asked in each step whether to stop."""
        (recorder,) = (callback for callback in trainer.callbacks if isinstance(callback, Recorder))
        recorder.rank_zero.clock = lambda: trainer.global_step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            with (self.folder / "log").open("a") as log:
                log.write(f"{trainer.global_step} {trainer.world_size} {ray.get_runtime_context().get_node_id()}\n")
            while int((self.folder / "open").read_text()) <= trainer.global_step and not pause.HERE[0].stop.is_set():
                time.sleep(0.05)


@pytest.fixture(scope="module")
def nodes() -> Iterator[LocalCluster]:
    """A head without CPUs, and two machines with one each, which each test leaves; a loss is noticed in seconds."""
    quick = {"health_check_period_ms": 500, "health_check_timeout_ms": 20_000, "health_check_failure_threshold": 3}
    with tempfile.TemporaryDirectory(prefix="ray-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        cluster = LocalCluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": quick})
        try:
            for _ in range(2):
                cluster.add_node(num_cpus=1)
            ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


def fit(folder: Path, name: str, num_workers: Any, **arguments: Any) -> Trainer:
    pl.seed_everything(3, verbose=False)
    trainer = Trainer(max_epochs=EPOCHS, storage_path=str(folder), name=name, num_workers=num_workers, **arguments)
    trainer.fit(SimpleModel(), MNISTDataModule(dataset="digits"))
    return trainer


class Running:
    """A run in another thread: nodes come and go in the main one."""

    def __init__(self, folder: Path, num_workers: Any, **arguments: Any) -> None:
        self.fitted: Future[Trainer] = Future()

        def run() -> None:
            try:
                self.fitted.set_result(fit(folder, "run", num_workers, **arguments))
            except BaseException as error:
                self.fitted.set_exception(error)

        threading.Thread(target=run, daemon=True).start()

    def done(self) -> Trainer:
        return self.fitted.result(600)


def changes_of(folder: RunFolder) -> list[tuple[int, int, str]]:
    lines = folder.read(CHANGES).decode().splitlines() if folder.has(CHANGES) else []
    return [tuple(json.loads(line).values()) for line in lines]


@pytest.mark.slow
def test_a_run_grows_and_shrinks_with_its_cluster_and_has_the_same_loss_curve(
    nodes: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(on_ray, "LOOK_S", 1.0)
    folder, gate = RunFolder(str(tmp_path), "run"), Gate(tmp_path)

    running = Running(tmp_path, (2, 3), callbacks=[gate], max_failures=1)
    gate.open(5)
    wait_until(lambda: gate.last(2) == 5, 600, "two workers")
    third = nodes.add_node(num_cpus=1)
    wait_until(lambda: gate.last(3) == 6, 600, "three workers at the next step")
    gate.open(STEPS_PER_EPOCH + 5)
    wait_until(lambda: gate.last(3) == STEPS_PER_EPOCH + 5, 600, "three workers in the second epoch")
    nodes.remove_node(third, allow_graceful=False)
    wait_until(lambda: gate.steps[-1][:2] == (STEPS_PER_EPOCH + 5, 2), 600, "the two that are left")
    gate.open(EPOCHS * STEPS_PER_EPOCH)
    trainer = running.done()
    shown = capsys.readouterr().out
    assert "2 to 3 workers on CPU" in shown
    assert [line for line in shown.splitlines() if line.startswith("workers: ")] == [
        "workers: 2 start, of 2 to 3",
        "workers: there is room for 3: all checkpoint, for 3 to go on instead of 2",
        "workers: 3 start instead of 2: there is room for 3",
        "workers: 2 start instead of 3: workers failed",
    ]
    assert changes_of(folder) == [(2, 3, "there is room for 3"), (3, 2, "workers failed")]
    assert len(read_failures(folder)) == trainer.result.values["restarts"] == 1
    assert trainer.result.values["num_workers"] == 2
    steps = [step for step, _, _ in gate.steps]
    # Growth loses no step; the machine that died, what was trained after the checkpoint at the last epoch's end.
    assert steps == [*range(STEPS_PER_EPOCH + 6), *range(STEPS_PER_EPOCH, EPOCHS * STEPS_PER_EPOCH)]
    whole = fit(tmp_path, "whole", 0)
    for mine, theirs in zip(trainer.result.history, whole.result.history, strict=True):
        assert mine["step"] == theirs["step"]
        for name in ("train_loss", "val_loss"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4), name


@pytest.mark.slow
def test_a_run_leaves_a_machine_that_will_be_taken_away_without_losing_a_step(
    nodes: LocalCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    """The notice comes from a metadata server, through the agent that the cluster files start."""
    nodes.add_node(num_cpus=1)
    folder, gate = RunFolder(str(tmp_path), "run"), Gate(tmp_path)
    running = Running(tmp_path, 2, callbacks=[gate], max_failures=0)
    gate.open(5)
    wait_until(lambda: gate.last(2) == 5, 600, "two workers")
    node = gate.steps[-1][2]
    with metadata_server() as metadata:
        metadata.pages[SPOT] = spot(900)
        environment = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://{metadata.host}", "RAY_ADDRESS": nodes.address}
        agent = [sys.executable, "-m", "ray_mnist.notices", "aws", "--node-id", node]
        subprocess.run(agent, env=os.environ | environment, timeout=600, check=True)
    wait_until(lambda: gate.steps[-1][2] != node, 600, "other workers")
    gate.open(EPOCHS * STEPS_PER_EPOCH)
    trainer = running.done()
    host = socket.gethostname()
    assert f"workers: 2 start: {host} will be taken away\n" in capsys.readouterr().out
    assert [step for step, _, _ in gate.steps] == [*range(EPOCHS * STEPS_PER_EPOCH)]
    assert changes_of(folder) == [(2, 2, f"{host} will be taken away")]
    assert read_failures(folder) == []
    assert trainer.result.values["restarts"] == 0
    nodes.remove_node(next(each for each in nodes.worker_nodes if each.node_id == node), allow_graceful=False)
    request.getfixturevalue("gloo")
    whole = fit(tmp_path, "whole", 2)
    for name in ("step", "train_loss", "val_loss"):
        assert [row[name] for row in trainer.result.history] == [row[name] for row in whole.result.history]
