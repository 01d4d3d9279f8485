"""Workers that do not go on are noticed and named; honest ones, however slow, are left alone."""

import os
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import ray.train
import torch
from conftest import wait_until
from pytorch_lightning.profilers import SimpleProfiler
from ray import cloudpickle
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ray_mnist import Trainer
from ray_mnist.checks.preflight import WAIT_FOR_NODES_S
from ray_mnist.config import RunConfig
from ray_mnist.errors import RequestError, Stalled
from ray_mnist.launch import stalls
from ray_mnist.launch.failures import Failures, describe_all, is_bug
from ray_mnist.launch.stalls import StallWatch
from ray_mnist.ray_controller_internals import WatchedGroup
from ray_mnist.ray_train_internals import AbortableTorchTrainer
from ray_mnist.run.folder import RunFolder
from ray_mnist.run.progress import HERE, Position, Stacks, count, position, stacks
from ray_mnist.run.records import read_failures

TIMEOUT_S = 100.0


class Fake:
    """A worker, as the controller sees it: it answers at once, or not at all."""

    def __init__(self) -> None:
        self.position, self.waits, self.answers = Position("training", 1, 1), False, True

    def goes_on(self) -> None:
        self.position = Position("training", self.position.step + 1, self.position.actions + 9)

    def ask(self, what: Callable[[], Any]) -> Future[Any]:
        answer: Future[Any] = Future()
        if self.answers:
            answer.set_result(self.position if what is position else Stacks(f"{id(self)} in training_step", self.waits))
        return answer


class Group:
    """Workers that are watched, and a clock."""

    def __init__(self, folder: Path, size: int = 2) -> None:
        self.workers, self.now = [Fake() for _ in range(size)], 0.0
        self.watch = StallWatch(RunFolder(str(folder), "run"), TIMEOUT_S, lambda: self.now)
        self.watch.begin([(f"host-{rank}", worker.ask) for rank, worker in enumerate(self.workers)])

    def found_in(self, seconds: float, *going_on: int) -> tuple[float, dict[int, str]]:
        """When which are found to be stalled, if so many seconds pass in which some go on; Ray looks twice a second."""
        until = self.now + seconds
        while self.now < until:
            self.now += 0.5
            for rank in going_on:
                self.workers[rank].goes_on()
            if found := self.watch.look():
                return self.now, {rank: str(error) for rank, error in found.items()}
        return self.now, {}


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stalls, "ANSWER_S", 0.01)  # fakes answer at once


def test_who_goes_on_is_never_found(tmp_path: Path) -> None:
    assert Group(tmp_path).found_in(20 * TIMEOUT_S, 0, 1)[1] == {}


def test_who_waits_for_one_that_goes_on_is_not_found(tmp_path: Path) -> None:
    assert Group(tmp_path).found_in(20 * TIMEOUT_S, 1)[1] == {}
    assert list(tmp_path.iterdir()) == []


def test_a_step_below_the_bound_is_no_stall(tmp_path: Path) -> None:
    group = Group(tmp_path)
    for _ in range(5):
        assert group.found_in(0.9 * TIMEOUT_S)[1] == {}
        assert group.found_in(0.1 * TIMEOUT_S, 0, 1)[1] == {}


def test_the_one_that_the_others_wait_for_is_named(tmp_path: Path) -> None:
    group = Group(tmp_path, 3)
    group.found_in(10, 0, 1, 2)
    group.workers[0].waits = group.workers[2].waits = True
    when, found = group.found_in(2 * TIMEOUT_S)
    assert TIMEOUT_S < when - 10 < 1.15 * TIMEOUT_S
    assert found == {1: "on host-1 stalled in training after step 21: no progress for 100 s"}
    for rank, worker in enumerate(group.workers):
        text = (tmp_path / f"run/stalls/rank-{rank}.txt").read_text()
        assert text == f"worker {rank} on host-{rank}, in training after step 21\n\n{id(worker)} in training_step"


def test_where_all_wait_all_are_named_and_where_none_does_the_one_behind(tmp_path: Path) -> None:
    """The one is a collective that some rank left out, the other a GPU, on which who computes seems to work."""
    group = Group(tmp_path)
    group.workers[0].waits = group.workers[1].waits = True
    assert [*group.found_in(2 * TIMEOUT_S)[1]] == [0, 1]
    group = Group(tmp_path)
    group.workers[0].goes_on()
    assert [*group.found_in(2 * TIMEOUT_S)[1]] == [1]


def test_one_that_gives_no_answer_is_where_the_others_wait_for_it(tmp_path: Path) -> None:
    group = Group(tmp_path)
    group.workers[1].answers = False
    group.found_in(3, 0)
    assert group.found_in(2 * TIMEOUT_S)[1] == {1: "on host-1 stalled in training after step 7: no answer for 100 s"}


@pytest.mark.parametrize("phase", ["start-up", "validation"])
def test_one_that_gives_no_answer_is_named_even_if_the_others_go_on(phase: str, tmp_path: Path) -> None:
    group = Group(tmp_path)
    group.workers[1].position = Position(phase, 27, 3)
    group.found_in(10)
    group.workers[1].answers = False
    for _ in range(20):  # an evaluation, say, which needs no other worker
        group.workers[0].position = Position("training", 1, group.workers[0].position.actions + 1)
        when, found = group.found_in(0.1 * TIMEOUT_S)
        if found:
            break
    assert TIMEOUT_S <= when - 10 < 1.15 * TIMEOUT_S
    where = {"start-up": "start-up", "validation": "validation after step 27"}[phase]
    assert found == {1: f"on host-1 stalled in {where}: no answer for 100 s"}
    assert (tmp_path / "run/stalls/rank-1.txt").read_text().endswith("\n\nIt gave no answer.\n")


def test_one_that_answers_late_is_not_named(tmp_path: Path) -> None:
    group = Group(tmp_path)
    group.workers[1].answers = False
    group.found_in(0.9 * TIMEOUT_S, 0)
    group.workers[1].answers = True  # but for the question that it was asked meanwhile
    assert group.found_in(TIMEOUT_S, 0)[1] == {}
    assert list(tmp_path.iterdir()) == []


def test_start_up_has_a_bound_of_its_own(tmp_path: Path) -> None:
    group = Group(tmp_path)
    group.workers[0].position = Position("start-up", 0, 4)  # as while rank 0 downloads data
    bound = TIMEOUT_S + WAIT_FOR_NODES_S
    when, found = group.found_in(2 * bound)
    assert bound < when < bound + 0.15 * TIMEOUT_S
    assert found == {0: f"on host-0 stalled in start-up: no progress for {bound:g} s"}


def test_a_controller_that_could_not_look_blames_nobody(tmp_path: Path) -> None:
    group = Group(tmp_path)
    group.found_in(10, 0, 1)
    group.now += 10 * TIMEOUT_S
    for worker in group.workers:
        worker.goes_on()
    assert group.watch.look() == {}  # the answers that are there are as old
    assert group.found_in(0.8 * TIMEOUT_S)[1] == {}


def test_a_storage_that_hangs_keeps_nobody_from_starting_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_mnist.launch.failures.PATIENCE_S", 0.01)
    fifo = tmp_path / "run" / "failures.jsonl"
    fifo.parent.mkdir()
    os.mkfifo(fifo)  # to read it waits for a writer
    failures = Failures(RunFolder(str(tmp_path), "run"), max_failures=1, send=list)
    failures.after_exception(None, {1: Stalled("on host-1 stalled in checkpoint after step 3: no progress for 9 s")})
    fifo.write_bytes(b"")  # lets the thread go


def test_a_stall_is_a_failure_like_any_other(tmp_path: Path) -> None:
    error: Stalled = pickle.loads(pickle.dumps(Stalled("on host-1 stalled in test after step 9: no progress", "stack")))
    assert not is_bug(error)
    folder = RunFolder(str(tmp_path), "run")
    Failures(folder, max_failures=1, send=list).after_exception(None, {1: error})
    (line,) = read_failures(folder)
    assert line.startswith("worker 1 on host-1 stalled in test after step 9: no progress; starting again")
    assert describe_all({1: error}).details == "stack"


def test_ray_takes_a_worker_that_is_found_for_failed(tmp_path: Path) -> None:
    """And tells the run's UserCallback of it."""
    from ray.train.v2._internal.execution.callback import WorkerGroupCallback
    from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus, WorkerStatus

    for name in ("after_worker_group_training_start", "after_worker_group_poll_status"):
        assert hasattr(WorkerGroupCallback, name), f"Ray moved WorkerGroupCallback.{name}"
    error = Stalled("on host-1 stalled")
    watch: Any = SimpleNamespace(look=lambda: {1: error})
    status = WorkerGroupPollStatus({rank: WorkerStatus(running=True) for rank in range(2)})
    failures = Failures(RunFolder(str(tmp_path), "run"), max_failures=1, send=list)
    run_config = ray.train.RunConfig(callbacks=[failures, WatchedGroup(watch)])
    trainer = AbortableTorchTrainer(print, run_config=run_config, scaling_config=ray.train.ScalingConfig(num_workers=2))
    for callback in trainer._create_default_callbacks():
        if isinstance(callback, WorkerGroupCallback):
            callback.after_worker_group_poll_status(status)
    assert status.errors == {1: error}
    assert len(read_failures(RunFolder(str(tmp_path), "run"))) == 1


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), "5", True])
def test_a_bound_that_is_none_is_refused(seconds: Any) -> None:
    with pytest.raises(RequestError, match=rf"--stall-timeout {seconds} is not possible: give seconds, or 0 to wait"):
        RunConfig(stall_timeout=seconds)


# What a worker answers


class Net(pl.LightningModule):
    """Notes where its worker is, whatever it does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[Position] = []

    def note(self, *_: Any) -> Tensor:
        self.seen.append(position())
        return self.layer(torch.ones(1, 1)).sum()

    training_step = note

    def validation_step(self, *_: Any) -> None:
        self.note()

    test_step = predict_step = validation_step

    def setup(self, stage: str) -> None:
        self.note()

    def configure_optimizers(self) -> Any:
        self.note()
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def loader(self) -> Any:
        self.note()
        return DataLoader(TensorDataset(torch.ones(3, 1)), batch_size=1)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader


def test_a_worker_tells_its_phase_and_step_and_that_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    monkeypatch.setattr("ray_mnist.callbacks.check_saved", net.note)
    profiler = SimpleProfiler()
    trainer = Trainer(max_epochs=2, storage_path=str(tmp_path), logger=False, profiler=profiler)
    trainer.fit(net)
    trainer.predict(net)
    seen = [(each.phase, each.step) for each in net.seen]
    assert list(dict.fromkeys(seen)) == [
        ("start-up", 0),
        *(("training", step) for step in range(3)),
        ("validation", 3),
        ("checkpoint", 3),
        *(("training", step) for step in (3, 4, 5)),
        ("validation", 6),
        ("checkpoint", 6),
        ("start-up", 6),
        ("test", 6),
        ("prediction", 0),
    ]
    of_batches = [each.actions for each in net.seen if each.phase in ("training", "validation", "test", "prediction")]
    assert of_batches == sorted(set(of_batches))
    # The profiler is the user's, who may give it to the next trainer, here or elsewhere.
    assert profiler.recorded_durations["run_training_epoch"]
    found: Any = cloudpickle.loads(cloudpickle.dumps(profiler))
    before = HERE.actions
    with found.profile("action"):
        assert HERE.actions == before + 1
    assert vars(profiler)["profile"].func is count


class Hangs(pl.LightningModule):
    """Hangs in the sixth step of rank 1 until a file is there, which whoever looks on makes."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.folder = folder

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.global_step == 5:
            if self.global_rank == 1:
                self.tell(stacks())
                wait_until((self.folder / "0").exists, 600, "rank 0 to be seen waiting")
            else:
                threading.Thread(target=self.look).start()
        return self.layer(batch[0]).sum()

    def look(self) -> None:
        while not (found := stacks()).waits:
            time.sleep(0.01)
        self.tell(found)

    def tell(self, found: Stacks) -> None:
        aside = self.folder / f".{self.global_rank}"
        aside.write_bytes(pickle.dumps((position(), found)))
        aside.rename(self.folder / str(self.global_rank))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_who_waits_for_gradients_says_so_and_who_hangs_does_not(gloo: None, tmp_path: Path) -> None:
    trainer = Trainer(max_epochs=1, num_workers=2, storage_path=str(tmp_path / "runs"), name="run", logger=False)
    trainer.fit(Hangs(tmp_path), DataLoader(TensorDataset(torch.ones(20, 1)), batch_size=2))
    (waiting, stuck) = (pickle.loads((tmp_path / str(rank)).read_bytes()) for rank in range(2))
    for where, found in (waiting, stuck):
        assert (where.phase, where.step) == ("training", 5)
        assert "training_epoch_loop.py" in found.text
    assert (waiting[1].waits, stuck[1].waits) == (True, False)
    assert "in backward" in waiting[1].text
    assert "in training_step" in stuck[1].text
