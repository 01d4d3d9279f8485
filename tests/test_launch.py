"""What a launch on Ray asks of the cluster, and gives its workers: seen without one."""

import json
import os
import random
import shlex
import subprocess
import sys
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
from ray_mnist.launch import ahead, connection, ray_setup_worker
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
def test_workers_are_forked_from_what_computes_on_as_many_threads_as_ray_tells_others(
    wish: str | None,
    options: dict[str, int],
    threads: str,
    trained: Callable[[RunConfig], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    if wish:
        monkeypatch.setenv("OMP_NUM_THREADS", wish)
    asked: list[Any] = []
    monkeypatch.setattr("ray.init", lambda **given: asked.append(given["runtime_env"]))
    monkeypatch.setattr("ray.remote", MagicMock())
    monkeypatch.setattr("subprocess.run", lambda command, **_: asked.append(command))
    config = RunConfig(num_workers=1, **options)
    ahead.start_ray(config)
    begun, of_the_job = asked
    of_workers = trained(config).given["run_config"].worker_runtime_env
    assert shlex.split(of_workers["py_executable"])[3:] == begun
    assert of_the_job["py_executable"] == of_workers["py_executable"]
    assert begun[-2:] == ["pytorch_lightning", threads]


OWN_PYTHONS = pytest.mark.parametrize(
    "given", [{"pip": ["numpy"]}, {"conda": "mine"}, {"py_executable": "uv run python"}]
)


@OWN_PYTHONS
def test_what_a_submitted_job_says_of_its_python_stays(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    job: dict[str, Any] = {"runtime_env": {"working_dir": "gcs://package.zip"}, "metadata": {}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))  # as Ray does, before there is a connection
    assert ahead.forked(RunConfig()) != {}
    job["runtime_env"] |= given
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    assert ahead.forked(RunConfig()) == {}


@OWN_PYTHONS
def test_what_users_say_of_their_python_stays(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    context = SimpleNamespace(runtime_env={"env_vars": {}})
    monkeypatch.setattr("ray.get_runtime_context", lambda: context)
    ours = ahead.forked(RunConfig())
    context.runtime_env |= ours
    assert ahead.forked(RunConfig()) == ours != {}
    context.runtime_env |= given
    assert ahead.forked(RunConfig()) == {}


def test_a_node_with_other_folders_starts_its_own_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "lib/python3.11/site-packages/ray/_private/workers/default_worker.py"
    script.parent.mkdir(parents=True)
    script.touch()
    python = tmp_path / "bin/python3"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho its own: "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(ahead.sys, "executable", "/nowhere/bin/python")
    # As Ray writes it.
    command = f"exec {ahead.forked(RunConfig())['py_executable']} {script} --node 'a b'"
    said = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
    assert said == f"its own: {script} --node a b\n"


@pytest.mark.parametrize(
    ("python", "more", "is_rays"),
    [
        ("forked_python.py", {"env_vars": {"MINE": "a b"}}, False),
        ("forked_python.py", {"env_vars": {"MINE": "${TERM}"}}, True),
        ("forked_python.py", {"command_prefix": ["MINE='a b'"]}, True),
        ("", {"env_vars": {"MINE": "a b"}}, True),
    ],
)
def test_what_is_to_be_forked_is_asked_for_without_ray_and_all_else_by_rays_own_script(
    python: str, more: dict[str, Any], is_rays: bool, tmp_path: Path
) -> None:
    seen = tmp_path / "script.py"
    seen.write_text("import os, sys; print(os.environ['MINE'], sys.argv[1:])")
    script = [str(seen), "--node=a b", "--worker-id=1"]
    executable = f"{sys.executable} {tmp_path / python}" if python else sys.executable
    (tmp_path / "forked_python.py").write_text("import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0])")
    context = {"command_prefix": [], "env_vars": {}, "py_executable": executable, "java_jars": []} | more
    # As Ray's raylet does it.
    command = [sys.executable, "-v", ray_setup_worker.__file__, *script, "--language=PYTHON"]
    command.append(f"--serialized-runtime-env-context={json.dumps(context)}")
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TERM": "a b"}, check=True)
    assert done.stdout == "a b ['--node=a b', '--worker-id=1']\n"
    assert ("import 'ray'" in done.stderr) == is_rays


@pytest.mark.parametrize(("address", "times"), [("somewhere:6379", 2), (None, 1)])
def test_runs_with_the_same_seed_are_told_apart_by_ray_and_all_that_is_theirs_is_forked(
    address: str | None, times: int, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster is joined twice, the second time with a folder to send there."""
    ids: list[int] = []
    given: list[dict[str, Any]] = []

    def init(runtime_env: dict[str, Any], **_: Any) -> None:
        ids.append(random.getrandbits(64))
        given.append(runtime_env)

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("ray.shutdown", MagicMock())
    for name in ("needs_folder", "may_use_other_machines"):
        monkeypatch.setattr(connection, name, lambda *_: True)
    monkeypatch.setattr(connection, "address_to_join", lambda _: address)
    monkeypatch.setattr(connection, "KEEPER", MagicMock())
    monkeypatch.setattr("ray.remote", MagicMock())
    for _ in range(2):
        random.seed(1)
        connection.start_or_join(RunConfig(num_workers=1), job, cpus=0)
    assert len(ids) == len({*ids}) == 2 * times
    assert [each["py_executable"] for each in given] == [ahead.forked(RunConfig())["py_executable"]] * len(ids)
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
