"""Training on Ray: the same result as at any other number of workers, and nothing lost when something dies."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gloo_workers
import psutil
import pytest
import pytorch_lightning as pl
import torch
from conftest import wait_until
from ray_state import process_of

from ray_mnist import MNISTDataModule, SimpleModel, Trainer
from ray_mnist.errors import RequestError, TrainingError
from ray_mnist.launch.keeping import KEEPER
from ray_mnist.run.folder import CHECKPOINT, RunFolder
from ray_mnist.run.records import read_failures, read_metrics

EPOCHS = 3
STEPS_PER_EPOCH = 17  # digits: 1,151 training samples in global batches of 64


FORKED = """
import os
import psutil
import ray
from ray_mnist.config import RunConfig
from ray_mnist.launch import ahead

class Actor:
    def about(self):
        import sys
        return os.getppid(), {"torch", "pytorch_lightning", "ray.train"} <= {*sys.modules}

ahead.start_ray(RunConfig(num_workers=2))
commands = [" ".join(each.cmdline()) for each in psutil.Process().children(recursive=True)]
assert any("gcs_server" in command for command in commands)
assert not [command for command in commands if "monitor.py" in command or "dashboard.py" in command]
assert any("raylet" in command and "ray_setup_worker.py" in command for command in commands)
server = psutil.Process(ray.get(ray.remote(num_cpus=0)(lambda: os.getppid()).remote()))
assert "ray_mnist.launch.fork_server" in server.cmdline()
actors = [ray.remote(num_cpus=0)(Actor).remote() for _ in range(2)]
assert ray.get([actor.about.remote() for actor in actors]) == [(server.pid, True)] * 2
ray.shutdown()
server.wait(10)
"""


@pytest.mark.slow
def test_what_is_started_before_a_run(tmp_path: Path) -> None:
    """That workers are forked; how is tested in test_fork_server.py."""
    subprocess.run([sys.executable, "-c", FORKED], cwd=tmp_path, check=True, timeout=600)


def fit(folder: Path, name: str, num_workers: int, **arguments: Any) -> Trainer:
    """A run over digits from the same start."""
    pl.seed_everything(3, verbose=False)
    trainer = Trainer(
        **{"max_epochs": EPOCHS, "storage_path": str(folder), "name": name} | arguments, num_workers=num_workers
    )
    trainer.fit(SimpleModel(), MNISTDataModule(dataset="digits"))
    return trainer


def final_weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Those of the newest checkpoint, which must be of the last step."""
    newest = RunFolder(str(folder), name).checkpoints()[0]
    checkpoint = torch.load(folder / name / newest / CHECKPOINT, weights_only=False)
    assert checkpoint["global_step"] == EPOCHS * STEPS_PER_EPOCH
    return {key: value for key, value in checkpoint["state_dict"].items() if key.startswith("net.")}


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an undisturbed run on two workers, without Ray."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gloo_workers.select, "on_ray", gloo_workers.on_gloo)
        fit(folder, "two", num_workers=2)
    return folder / "two"


def result_of(run: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run / "result.json").read_text())
    return values


@pytest.mark.parametrize("num_workers", [0, 1, 3])  # three cannot share a batch of 64 equally
def test_the_loss_curve_does_not_depend_on_the_number_of_workers(
    num_workers: int, two_workers: Path, gloo: None, tmp_path: Path
) -> None:
    trainer = fit(tmp_path, "run", num_workers)
    other = read_metrics(RunFolder(str(two_workers.parent), "two"))
    assert len(trainer.result.history) == len(other) == EPOCHS
    for mine, theirs in zip(trainer.result.history, other, strict=True):
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
        assert mine["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-4)
        assert mine["val_accuracy"] == theirs["val_accuracy"]
    mine, theirs = trainer.result.values, result_of(two_workers)
    assert (mine["num_workers"], theirs["num_workers"]) == (num_workers, 2)
    for key in ("steps", "train_samples", "val_samples", "test_samples", "test_accuracy", "best_checkpoint"):
        assert mine[key] == theirs[key], key
    assert (mine["train_samples"], mine["val_samples"], mine["test_samples"]) == (1151, 287, 359)


class DieOnce(pl.Callback):
    """Kills the worker of `rank` after `step` optimizer steps, the first time it gets there."""

    def __init__(self, marker: Path, rank: int, step: int) -> None:
        self.marker, self.rank, self.step = marker, rank, step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            print(f"rank {trainer.global_rank} is at step {self.step}")
        if trainer.global_rank == self.rank and trainer.global_step == self.step and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class NotesItsParent(pl.Callback):
    """Has the process of each rank that has trained to the end leave a note of the process that started it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, *_: Any) -> None:
        (self.folder / f"parent-of.{os.getpid()}").write_text(str(os.getppid()))


@pytest.mark.usefixtures("cluster")
def test_a_killed_worker_costs_no_sample_and_others_are_forked(
    two_workers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killer = DieOnce(tmp_path / "killed", rank=0, step=STEPS_PER_EPOCH + 8)
    notes = NotesItsParent(tmp_path)
    trainer = fit(tmp_path, "run", 2, callbacks=[killer, notes], checkpoint_every_n_steps=5, max_failures=1)
    assert killer.marker.exists()
    (server,) = {int(note.read_text()) for note in tmp_path.glob("parent-of.*")}
    assert "ray_mnist.launch.fork_server" in psutil.Process(server).cmdline()
    assert trainer.result.values["restarts"] == 1
    shown = capsys.readouterr().out
    assert "; starting again, once all workers have room (waiting up to 600 s)" in shown
    # Rank 0 was killed as it printed that for the first time.
    assert shown.splitlines().count(f"rank 0 is at step {killer.step}") in (1, 2)
    assert "rank 1" not in shown
    undisturbed = final_weights(two_workers.parent, "two")
    for key, value in final_weights(tmp_path, "run").items():
        assert torch.equal(value, undisturbed[key]), key
    assert [row["val_loss"] for row in trainer.result.history] == [
        row["val_loss"] for row in read_metrics(RunFolder(str(two_workers.parent), "two"))
    ]


class StallOnce(pl.Callback):
    """Has the worker of rank 1 sleep in a step, the first time that it gets there."""

    def __init__(self, marker: Path, step: int) -> None:
        self.marker, self.step = marker, step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == self.step and not self.marker.exists():
            self.marker.write_text(str(os.getpid()))
            time.sleep(10_000)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_worker_that_stalls_is_named_ended_and_costs_no_sample(
    two_workers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that gives no answer at all is struck in chaos/test_chaos.py."""
    staller = StallOnce(tmp_path / "stalled", step=STEPS_PER_EPOCH + 8)
    fit(tmp_path, "run", 2, callbacks=[staller], checkpoint_every_n_steps=5, max_failures=1, stall_timeout=15)
    (failure,) = read_failures(RunFolder(str(tmp_path), "run"))
    where = f"worker 1 on {socket.gethostname()} stalled in training after step {staller.step}"
    assert failure.startswith(f"{where}: no progress for 15 s; starting again")
    assert f"failure: {failure}" in capsys.readouterr().out
    assert not psutil.pid_exists(int(staller.marker.read_text()))
    stacks = [(tmp_path / f"run/stalls/rank-{rank}.txt").read_text() for rank in range(2)]
    assert "in backward" in stacks[0]
    assert "in on_train_batch_start" in stacks[1]
    undisturbed = final_weights(two_workers.parent, "two")
    for key, value in final_weights(tmp_path, "run").items():
        assert torch.equal(value, undisturbed[key]), key


@pytest.mark.slow
def test_deaths_in_starting_are_failures_like_any_other(cluster: None, tmp_path: Path) -> None:
    """The controller's are in chaos/test_chaos.py."""
    folder = RunFolder(str(tmp_path), "run")
    killed: list[int] = []

    def kill_when(condition: Callable[[], bool]) -> None:
        found = [0]  # asked once: it may be gone at the next look, and 0 would kill all of these tests
        wait_until(condition, 600, "its time to die")
        wait_until(
            lambda: found.append(process_of("RayTrainWorker")) or found[-1] not in (0, *killed),
            600,
            "the process of a worker",
        )
        killed.append(found[-1])
        os.kill(killed[-1], signal.SIGKILL)

    def kill_two() -> None:
        kill_when(lambda: True)
        kill_when(lambda: len(read_failures(folder)) == 1)

    KEEPER.give_back()
    wait_until(lambda: not process_of("RayTrainWorker"), 60, "the workers of the test before to be gone")
    threading.Thread(target=kill_two, daemon=True).start()
    trainer = fit(tmp_path, "run", 2, checkpoint_every_n_steps=1, max_failures=2)
    assert len(killed) == trainer.result.values["restarts"] == 2
    dead = "died: killed, out of memory, or its machine is gone; starting again"
    assert [line.partition(", once")[0] for line in read_failures(folder)] == [f"a worker that was starting {dead}"] * 2
    assert final_weights(tmp_path, "run")
    assert [row["epoch"] for row in read_metrics(folder)] == list(range(1, EPOCHS + 1))


@pytest.mark.slow
def test_failures_beyond_the_limit_end_the_run_in_one_sentence(
    cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TrainingError, match="worker 1 died: killed, out of memory"):
        fit(tmp_path, "run", 2, callbacks=[DieOnce(tmp_path / "killed", 1, step=2)], max_failures=0)
    assert read_failures(RunFolder(str(tmp_path), "run"))[0].endswith("; giving up")
    shown = capsys.readouterr().out
    assert "rank 1" not in shown
    ((out, _),) = re.findall("^what worker 1 printed is in (.+) and (.+) on ", shown, re.MULTILINE)
    assert "rank 1 is at step 2\n" in Path(out).read_text()


class BuggyModel(SimpleModel):
    """Has a bug that trying again does not mend."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        raise KeyError("a bug in the model")


@pytest.mark.slow
def test_a_bug_is_not_tried_again(cluster: None, tmp_path: Path) -> None:
    trainer = Trainer(max_epochs=1, num_workers=2, storage_path=str(tmp_path), name="run", max_failures=3)
    with pytest.raises(TrainingError, match=r"worker 0: KeyError: 'a bug in the model'") as failure:
        trainer.fit(BuggyModel(), MNISTDataModule(dataset="digits"))
    assert "training_step" in failure.value.details
    assert len((tmp_path / "run" / "failures.jsonl").read_text().splitlines()) == 1


def test_a_batch_that_the_workers_cannot_share_is_refused(cluster: None, tmp_path: Path) -> None:
    trainer = Trainer(num_workers=3, storage_path=str(tmp_path), name="run")
    with pytest.raises(RequestError, match=r"--batch-size 2 is the batch over all workers, .*: use at least 3"):
        trainer.fit(SimpleModel(), MNISTDataModule(dataset="digits", batch_size=2))
    assert list(tmp_path.iterdir()) == []


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """A run on two workers and a Ray of its own, as a person would start it."""
    options = {"--dataset": "digits", "--num-workers": 2, "--seed": 3, "--name": "run", "--checkpoint-every-n-steps": 5}
    return subprocess.Popen(
        [sys.executable, "-m", "ray_mnist.train", *(f"{key}={value}" for key, value in options.items()), *arguments],
        cwd=folder,
        env=os.environ | {"ALONE": "1"},  # what its Ray's processes are forked from is its own
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def started_by(driver: int) -> list[psutil.Process]:
    """Its descendants, and those of the server that its Ray's processes are forked from."""
    server = ["ray_mnist.launch.fork_server", str(driver)]  # and what it forked, until that has a name of its own
    servers = [each for each in psutil.process_iter(["cmdline"]) if (each.info["cmdline"] or [])[3:5] == server]
    assert servers
    return [*{*servers}.union(*(each.children(recursive=True) for each in (*servers, psutil.Process(driver))))]


def is_agent(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return "agent" in " ".join([process.name(), *process.cmdline()]).lower()
    return False


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_run_whose_driver_ends_leaves_nothing_and_resumes(how: signal.Signals, tmp_path: Path, command: Any) -> None:
    driver = start(tmp_path, "--max-epochs", "1000")
    folder = RunFolder(str(tmp_path / "runs"), "run")
    try:
        wait_until(lambda: len(folder.checkpoints()) > 0 or driver.poll() is not None, 600, "the first checkpoint")
        started = started_by(driver.pid)
        agents = [process for process in started if how == signal.SIGKILL and is_agent(process)]
        driver.send_signal(how)
        output, _ = driver.communicate(timeout=600)
        # Where nobody is left to end Ray's agents, they notice that they are alone after a minute or two.
        _, alive = psutil.wait_procs([process for process in started if process not in agents], timeout=240)
    finally:
        driver.kill()
        for process in agents:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    assert started
    assert not alive
    assert driver.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}[how], output
    if how != signal.SIGKILL:
        said = "interrupted" if how == signal.SIGINT else "terminated"
        assert output.splitlines()[-1] == f"{said}: go on with `python -m ray_mnist.train --resume --name run`"
    if how != signal.SIGTERM:  # one is enough
        return
    newest = int(folder.checkpoints()[0].removeprefix("checkpoint_"))
    epochs = newest // STEPS_PER_EPOCH + 2
    done = command("--resume", "--name", "run", "--max-epochs", str(epochs))
    assert done.returncode == 0, done.stderr
    result = result_of(tmp_path / "runs" / "run")
    assert (result["epochs"], result["steps"]) == (epochs, epochs * STEPS_PER_EPOCH)
    assert [row["epoch"] for row in read_metrics(folder)] == list(range(1, epochs + 1))
