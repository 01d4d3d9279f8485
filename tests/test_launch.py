"""What a launch on Ray asks of the cluster, and gives its workers: seen without one."""

import random
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from ray import cloudpickle
from ray._raylet import GcsErrorSubscriber

from ray_mnist import MNISTDataModule, RequestError, SimpleModel, Trainer
from ray_mnist.checks.preflight import CPUS_FOR_DATA, Cluster
from ray_mnist.config import RunConfig
from ray_mnist.launch import ahead, connection
from ray_mnist.launch import ray as on_ray
from ray_mnist.launch.channel import Sender
from ray_mnist.search.trial import bundles
from ray_mnist.worker import Job

NODES = [{"Resources": {"CPU": 9.0, "GPU": 2.0}}]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job("fit", SimpleModel(), {}, str(tmp_path), "run", seed=0)


@pytest.fixture
def trained(job: Job, monkeypatch: pytest.MonkeyPatch) -> Callable[[RunConfig], Any]:
    """What stands in for a TorchTrainer in a launch of the job, with the arguments that it was `given`."""
    made: list[Any] = []

    class FakeTrainer:
        def __init__(self, function: Any, **arguments: Any) -> None:
            self.given = arguments
            made.append(self)

        def fit(self) -> Any:
            return SimpleNamespace(return_value=cloudpickle.dumps(None))

        def abort(self) -> None:
            """Never called: nobody interrupts."""

    def launch(config: RunConfig) -> Any:
        on_ray.launch(job, config, print, FakeTrainer)  # type: ignore[arg-type]
        return made.pop()

    monkeypatch.setattr(on_ray, "over_ray", lambda *_: nullcontext(Sender(MagicMock())))
    return launch


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"CPU": 1}),
        ({"cpus_per_worker": 3}, {"CPU": 3}),
        ({"use_gpu": True}, {"CPU": 4, "GPU": 1}),
        ({"use_gpu": True, "cpus_per_worker": 2}, {"CPU": 2, "GPU": 1}),
    ],
)
def test_a_worker_reserves_its_cpus(
    options: dict[str, Any], expected: dict[str, float], trained: Callable[[RunConfig], Any]
) -> None:
    config = on_ray.with_cpus(RunConfig(num_workers=2, **options), Cluster("h:1", NODES))
    given = trained(config).given
    assert given["scaling_config"].resources_per_worker == expected
    assert given["train_loop_config"]["threads"] == expected["CPU"]
    assert len(str(given["train_loop_config"]["job"])) < 100  # what Ray's dashboard has of it
    assert bundles(2, on_ray.bundle(config))[1:] == [expected, expected]


class CountsThreads(SimpleModel):
    """Sees how many threads it computes on."""

    threads = 0

    def on_train_start(self) -> None:
        self.threads = torch.get_num_threads()


@pytest.mark.parametrize(("options", "threads"), [({}, 1), ({"cpus_per_worker": 3}, 3)])
def test_a_worker_computes_on_as_many_threads_as_it_has_cpus(
    options: dict[str, int], threads: int, gloo: None, tmp_path: Path
) -> None:
    model = CountsThreads()
    trainer = Trainer(max_epochs=1, num_workers=2, storage_path=str(tmp_path), name="run", **options)
    trainer.fit(model, MNISTDataModule("digits"))
    assert model.threads == threads


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
def test_cpus_that_cannot_be(value: Any) -> None:
    with pytest.raises(RequestError, match=f"^--cpus-per-worker {value} is not possible: give a whole number of at"):
        Trainer(num_workers=2, cpus_per_worker=value)


@pytest.mark.parametrize(
    ("wish", "options", "threads"), [(None, {}, "1"), (None, {"cpus_per_worker": 3}, "3"), ("7", {}, "7")]
)
def test_workers_that_are_started_ahead_and_spares_are_told_their_threads_as_ray_tells_others(
    wish: str | None,
    options: dict[str, int],
    threads: str,
    trained: Callable[[RunConfig], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[Any] = []

    def remote(**told: Any) -> Any:
        started.append(told.get("runtime_env"))
        return MagicMock()

    monkeypatch.setattr("ray.init", MagicMock())
    monkeypatch.setattr("ray.remote", remote)
    monkeypatch.delenv("OMP_NUM_THREADS")
    if wish:
        monkeypatch.setenv("OMP_NUM_THREADS", wish)
    config = RunConfig(num_workers=1, max_failures=1, **options)
    ahead.start_ray(config)
    ahead._workers.clear()
    assert started == [{"env_vars": {"OMP_NUM_THREADS": threads}}]
    assert trained(config).spares.threads == threads


@pytest.mark.parametrize(("address", "times"), [("somewhere:6379", 2), (None, 1)])
def test_runs_with_the_same_seed_are_told_apart_by_ray(
    address: str | None, times: int, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster is joined twice, the second time with a folder to send there."""
    ids: list[int] = []
    monkeypatch.setattr("ray.init", lambda **_: ids.append(random.getrandbits(64)))
    monkeypatch.setattr("ray.shutdown", MagicMock())
    for name in ("needs_folder", "may_use_other_machines"):
        monkeypatch.setattr(connection, name, lambda *_: True)
    monkeypatch.setattr(connection, "address_to_join", lambda _: address)
    monkeypatch.setattr(connection, "KEEPER", MagicMock())
    for _ in range(2):
        random.seed(1)
        connection.start_or_join(RunConfig(num_workers=1, use_gpu=True), job, cpus=0)
    assert len(ids) == len({*ids}) == 2 * times
    after = random.random()
    random.seed(1)
    assert random.random() == after
    random.seed(1)
    GcsErrorSubscriber(address="somewhere:6379")
    assert random.random() != after, "Ray draws the ids of drivers otherwise now: nothing has to be done about them"


def test_a_local_ray_has_cpus_for_ray_data_beside_a_runs_workers_but_no_more_than_a_sweeps_trials_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    config = RunConfig(num_workers=2, cpus_per_worker=3)
    assert ahead.enough_cpus(config) == 6 + CPUS_FOR_DATA
    assert ahead.enough_cpus(config, cpus=14) == 14
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    assert ahead.enough_cpus(config) == ahead.enough_cpus(config, cpus=14) == 64
