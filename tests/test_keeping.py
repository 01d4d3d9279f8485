"""The next call finds Ray and the workers of the last, and nobody else has to wait for them."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytorch_lightning as pl
import ray
from conftest import wait_until
from ray._private.worker import Worker
from ray_state import actors, placement_groups

from ray_mnist import ConvModel, MNISTDataModule, RequestError, SimpleModel, Trainer, TrainingError, ray_internals
from ray_mnist.config import RunConfig
from ray_mnist.launch import keeping
from ray_mnist.launch.keeping import KEEPER, Keeper, needs


@pytest.fixture
def data() -> MNISTDataModule:
    return MNISTDataModule("digits")


class Notes(pl.Callback):
    """Takes a note of each worker's process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def setup(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        (self.folder / f"process-{trainer.global_rank}").write_text(str(os.getpid()))

    def take(self) -> list[int]:
        """The processes by rank, of which the notes are gone then."""
        files = sorted(self.folder.glob("process-*"))
        processes = [int(file.read_text()) for file in files]
        for file in files:
            file.unlink()
        return processes


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    return Notes(tmp_path)


@pytest.fixture
def options(tmp_path: Path, notes: Notes) -> Iterator[dict[str, Any]]:
    yield {"num_workers": 2, "max_epochs": 1, "callbacks": [notes], "storage_path": str(tmp_path)}
    KEEPER.give_back()


@ray.remote(num_cpus=1)
def wants_a_cpu() -> str:
    return "done"


@pytest.mark.usefixtures("cluster")
@pytest.mark.slow
def test_workers_stay_for_the_next_call_until_something_else_needs_them(
    options: dict[str, Any], notes: Notes, data: MNISTDataModule
) -> None:
    trainer = Trainer(**options, keep_workers=1000)
    trainer.fit(SimpleModel(), data)
    first = notes.take()
    assert len(first) == 2
    trainer.test(SimpleModel(), data, verbose=False)
    assert notes.take() == first
    assert trainer.predict(SimpleModel(), data)
    assert notes.take() == first
    Trainer(**options, precision="bf16-mixed").fit(ConvModel(), data)
    assert notes.take() == first

    os.kill(first[1], signal.SIGKILL)
    trainer.test(SimpleModel(), data, verbose=False)
    second = notes.take()
    assert not {*first} & {*second}
    assert not psutil.pid_exists(first[0])

    Trainer(**options, keep_workers=0.1).test(SimpleModel(), data, verbose=False)
    assert notes.take() == second
    wait_until(lambda: not actors() and not placement_groups(), 600, "the workers to end")

    # All of the cluster's eight CPUs for the two workers of this process, until a task of somebody's wants one.
    Trainer(**options, cpus_per_worker=4, keep_workers=1000).test(SimpleModel(), data, verbose=False)
    assert not {*second} & {*notes.take()}
    assert KEEPER.controller is not None
    assert ray.get(wants_a_cpu.remote(), timeout=600) == "done"
    wait_until(lambda: not actors() and not placement_groups(), 600, "the workers to end")


class Broken(SimpleModel):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        raise KeyError("a bug in the model")


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_run_that_fails_or_leaves_something_behind_keeps_no_workers(
    options: dict[str, Any], notes: Notes, data: MNISTDataModule
) -> None:
    trainer = Trainer(**options, keep_workers=1000)
    trainer.test(Leaves(), data, verbose=False)
    first = notes.take()
    Trainer(**options, keep_workers=0).test(Leaves(), data, verbose=False)
    assert not {*first} & {*notes.take()}
    wait_until(lambda: not actors() and not placement_groups(), 600, "the workers to end")
    with pytest.raises(TrainingError, match="a bug in the model"):
        trainer.test(Broken(), data, verbose=False)
    wait_until(lambda: not actors() and not placement_groups(), 600, "the workers to end")


class Leaves(SimpleModel):
    """Leaves a variable in the environment of rank 1."""

    def on_test_start(self) -> None:
        assert "LEFT" not in os.environ
        if self.global_rank == 1:
            os.environ["LEFT"] = "1"


SCRIPT = """
import os
del os.pidfd_open  # as on systems other than Linux, where each process imports what it runs
from pathlib import Path
import psutil
import ray
from ray_mnist import MNISTDataModule, SimpleModel, Trainer
from test_keeping import Notes

notes, data = Notes(Path.cwd()), MNISTDataModule("digits")

def call(num_workers=2):
    trainer = Trainer(num_workers=num_workers, max_epochs=1, callbacks=[notes], keep_workers=1000)
    trainer.test(SimpleModel(), data, verbose=False)
    return notes.take(), ray.is_initialized() and ray.get_runtime_context().get_node_id()

workers, node = call()
assert node
started = {actor["ActorClassName"]: actor["Pid"] for actor in ray._private.state.actors().values()}
assert "RayTrainWorker" in started
assert not started.keys() & {"DatasetManager", "_AutoscalingCoordinatorActor"}, started  # each takes a start a second
assert "libtorch" not in Path(f"/proc/{started['KeepingController']}/maps").read_text()  # two seconds, and 500 MB
assert call() == (workers, node)
(worker,), same = call(1)
assert same == node
os.environ["SEEN"] = "1"
(other,), another = call(1)
assert other != worker and another != node
print(*(process.pid for process in psutil.Process().children(recursive=True)))
"""


@pytest.mark.slow
def test_a_ray_of_its_own_stays_too_and_ends_with_the_process(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    script = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, timeout=600
    )
    assert script.returncode == 0
    processes = [int(process) for process in script.stdout.split()]
    assert processes
    wait_until(lambda: not any(map(psutil.pid_exists, processes)), 600, "the processes to end")


def test_the_watch_outlives_a_ray_that_ends_as_it_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = Keeper()
    monkeypatch.setattr(keeping, "session", lambda: keeper.session)  # as it was when the watch looked
    monkeypatch.setattr(ray_internals, "global_worker", Worker())  # of no Ray, as it is a moment later
    keeper.wait(3600)
    wait_until(keeper.called.is_set, 60, "what is kept to be given back")


@pytest.mark.parametrize("seconds", [-1, float("inf"), float("nan"), "60", True])
def test_seconds_that_cannot_be(seconds: Any) -> None:
    with pytest.raises(RequestError, match=r"^keep_workers=.* is not possible: give seconds, or 0 to keep none\.$"):
        Trainer(num_workers=2, keep_workers=seconds)


@pytest.mark.parametrize(
    "options", [{"num_workers": 3}, {"use_gpu": True}, {"cpus_per_worker": 2}, {"address": "a:1"}, {"dashboard": True}]
)
def test_other_options_need_other_workers(options: dict[str, Any]) -> None:
    assert needs(RunConfig(num_workers=2)) != needs(RunConfig(**{"num_workers": 2} | options))
    assert needs(RunConfig(num_workers=2)) == needs(RunConfig(num_workers=2, max_epochs=3, seed=4, name="run"))


def test_another_environment_needs_other_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = [needs(RunConfig())]
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    found.append(needs(RunConfig()))
    monkeypatch.syspath_prepend("somewhere")
    found.append(needs(RunConfig()))
    monkeypatch.chdir(tmp_path)
    found.append(needs(RunConfig()))
    assert all(found.count(each) == 1 for each in found)
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")  # which a seed_everything of the user's sets
    assert needs(RunConfig()) == found[-1]
