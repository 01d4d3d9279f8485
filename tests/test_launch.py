"""What a launch on Ray asks of the cluster, and gives its workers: seen without one."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ray_mnist import RequestError, SimpleModel, Trainer
from ray_mnist.checks.preflight import Cluster
from ray_mnist.config import RunConfig
from ray_mnist.launch import ray as on_ray
from ray_mnist.search.trial import bundles
from ray_mnist.worker import Job

NODES = [{"Resources": {"CPU": 9.0, "GPU": 2.0}}]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job("fit", SimpleModel(), {}, str(tmp_path), "run", seed=0)


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"CPU": 1}),
        ({"cpus_per_worker": 3}, {"CPU": 3}),
        ({"use_gpu": True}, {"CPU": 4, "GPU": 1}),
        ({"use_gpu": True, "cpus_per_worker": 2}, {"CPU": 2, "GPU": 1}),
    ],
)
def test_a_worker_reserves_its_cpus_and_computes_on_as_many_threads(
    options: dict[str, Any], expected: dict[str, float], job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    class FakeTrainer:
        def __init__(self, function: Any, **arguments: Any) -> None:
            given.update(arguments)

        def fit(self) -> Any:
            return SimpleNamespace(return_value=None)

    config = on_ray.with_cpus(RunConfig(num_workers=2, **options), Cluster("h:1", NODES))
    on_ray.launch(job, config, FakeTrainer)  # type: ignore[arg-type]
    assert given["scaling_config"].resources_per_worker == expected
    assert bundles(2, on_ray.bundle(config))[1:] == [expected, expected]

    monkeypatch.setattr(on_ray, "RayContext", lambda *_: None)
    monkeypatch.setattr(on_ray, "run_and_collect", lambda *_: torch.get_num_threads())
    assert on_ray.train_function(given["train_loop_config"]) == expected["CPU"]


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
def test_cpus_that_cannot_be(value: Any) -> None:
    with pytest.raises(RequestError, match=f"^--cpus-per-worker {value} is not possible: give a whole number of at"):
        Trainer(num_workers=2, cpus_per_worker=value)
