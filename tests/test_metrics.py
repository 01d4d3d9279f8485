"""What Prometheus, Grafana and Ray's dashboard have of a run."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
from conftest import free_port, lacking, wait_until
from ray.util.metrics import Gauge

from ray_mnist import MNISTDataModule, RequestError, SimpleModel, Trainer
from ray_mnist.config import RunConfig
from ray_mnist.distributed import loaders
from ray_mnist.distributed.loaders import ResumableLoader, seconds_waited
from ray_mnist.launch import connection, metrics
from ray_mnist.launch.metrics import METRICS, RunMetrics
from ray_mnist.launch.ray import ray_train_settings
from ray_mnist.run.events import EpochEnded, Progress, WorkersFailed

ROOT = Path(__file__).parents[1]
DASHBOARD = json.loads((ROOT / "cluster" / "grafana-dashboard.json").read_text())
EXPORTED = {f"ray_mnist_{name}" for name in METRICS}


def test_the_wait_for_data_is_that_for_the_loader_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(loaders, "time", SimpleNamespace(perf_counter=lambda: now))

    def batches() -> Iterator[int]:
        nonlocal now
        for number in range(3):
            now += 2
            yield number

    loader = ResumableLoader(batches(), 0, lambda: (0, 0))
    for _ in loader:
        now += 10  # the step
    assert seconds_waited(loader) == 6


def test_what_the_training_tells_is_set_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[str, float] = {}

    class Recorded(Gauge):
        def set(self, value: Any, tags: Any = None) -> None:
            super().set(value, tags)
            assert self.info["default_tags"] == {"run": "run"}
            values[self.info["name"]] = value

    monkeypatch.setattr(metrics, "Gauge", Recorded)
    exported = RunMetrics("run")
    exported.take(Progress("validation", 1, 2, 3, 9.0, 9.0, None, 2, None, 9, 9.0, 9.0))
    exported.take(EpochEnded({"epoch": 1, "loss": 9.0}))
    assert values == {}
    exported.take(Progress("training", 1, 1, 3, None, None, 0.5, 2, None, 1, None, None))
    assert values == {"mnist_epoch": 1, "mnist_step": 1, "mnist_loss": 0.5, "mnist_restarts": 0}
    exported.take(WorkersFailed([1], "died"))
    assert values["mnist_restarts"] == 1
    exported.take(Progress("training", 2, 1, 3, 80.0, 9.0, 0.25, 2, None, 4, 0.125, 0.0625))
    assert {f"ray_{name}": value for name, value in values.items()} == {
        "ray_mnist_epoch": 2,
        "ray_mnist_step": 4,
        "ray_mnist_loss": 0.25,
        "ray_mnist_samples_per_second": 80.0,
        "ray_mnist_step_seconds": 0.125,
        "ray_mnist_data_wait_seconds": 0.0625,
        "ray_mnist_restarts": 1,
    }
    assert values.keys() == {f"mnist_{name}" for name in METRICS}


def test_grafana_has_a_panel_for_each_metric_and_no_other() -> None:
    """In the form of Grafana's classic dashboards, which it imports."""
    assert {"title", "uid", "schemaVersion", "version", "time", "templating", "panels"} <= DASHBOARD.keys()
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["query"] == "prometheus"
    expressions: list[str] = []
    for panel in DASHBOARD["panels"]:
        assert {"id", "type", "title", "gridPos", "fieldConfig"} <= panel.keys()
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        for target in panel["targets"]:
            assert target["refId"]
            expressions += re.findall(r"\bray_\w+", target["expr"])
            assert set(re.findall(r"\$(\w+)", target["expr"])) == {"run"} <= variables.keys()
    assert sorted(expressions) == sorted(EXPORTED)
    assert re.findall(r"\bray_\w+", variables["run"]["definition"]) == ["ray_mnist_step"]
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    cells = [
        (column, row)
        for x, y, width, height in (map(panel["gridPos"].get, "xywh") for panel in DASHBOARD["panels"])
        for column in range(x, x + width)
        for row in range(y, y + height)
    ]
    assert len(cells) == len(set(cells))  # none is over another
    assert max(column for column, _ in cells) < 24


class DiesOnce(pl.Callback):
    """Has rank 1 die, once."""

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        died = Path("died")
        if trainer.global_rank == 1 and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def answer(url: str) -> str:
    """What is there, or nothing as long as there is none."""
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            return str(response.read().decode())
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return ""


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[str]:
    """The address of the API of a Prometheus that is set up as the documentation says, but looks every second."""
    if not (command := shutil.which("prometheus")):
        lacking("there is no prometheus")
    (said,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "watching.md").read_text(), re.DOTALL)
    # The tests' Ray has its files in a folder of their own.
    (tmp_path / "prometheus.yml").write_text(said.replace("/tmp/", f"{tempfile.gettempdir()}/").replace("10s", "1s"))
    address = f"127.0.0.1:{free_port()}"
    options = ["--config.file=prometheus.yml", "--storage.tsdb.path=series", f"--web.listen-address={address}"]
    with (tmp_path / "prometheus.log").open("w") as log:
        running = subprocess.Popen([command, *options], cwd=tmp_path, stderr=log)
    try:
        wait_until(lambda: bool(answer(f"http://{address}/-/ready")), 60, "Prometheus")
        yield f"http://{address}/api/v1"
    finally:
        running.terminate()
        running.wait(60)


def asked(url: str, **parameters: str) -> Any:
    return json.loads(answer(f"{url}?{urllib.parse.urlencode(parameters)}"))["data"]


def runs_to_choose(prometheus: str) -> list[str]:
    """What Grafana offers above the panels."""
    (variable,) = (each for each in DASHBOARD["templating"]["list"] if each["name"] == "run")
    ((metric, label),) = re.findall(r"^label_values\((\w+), (\w+)\)$", variable["query"]["query"])
    found: list[str] = asked(f"{prometheus}/label/{label}/values", **{"match[]": metric})
    return found


def shown(prometheus: str, run: str) -> dict[str, dict[str, float]]:
    """What Grafana's panels show with `run` for the variable: of each the run's names, with their values."""
    panels: dict[str, dict[str, float]] = {}
    for panel in DASHBOARD["panels"]:
        (target,) = panel["targets"]
        lines = asked(f"{prometheus}/query", query=target["expr"].replace("$run", run))["result"]
        panels[panel["title"]] = {line["metric"]["run"]: float(line["value"][1]) for line in lines}
    return panels


def train_runs(dashboard: str) -> list[tuple[str, str, list[tuple[str, int]]]]:
    """Name and status of each run, and of each of its attempts the status and the number of workers."""
    return [
        (run["name"], run["status"], [(each["status"], len(each["workers"])) for each in run["attempts"]])
        for run in json.loads(answer(f"{dashboard}/api/train/v2/runs/v1") or '{"train_runs": []}')["train_runs"]
    ]


@pytest.mark.slow
def test_rays_dashboard_and_grafanas_over_prometheus_know_a_local_run(tmp_path: Path, prometheus: str) -> None:
    options = ["--num-workers", "2", "--dashboard", "--dataset", "digits", "--max-epochs", "100000", "--name", "run.1"]
    run = subprocess.Popen(
        [sys.executable, "-m", "ray_mnist.train", *options, "--trainer.callbacks", "test_metrics.DiesOnce"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    said: list[str] = []
    reading = threading.Thread(target=lambda: said.extend(run.stdout or ()), daemon=True)
    reading.start()
    try:
        wait_until(lambda: bool(said), 600, "the address")
        (dashboard,) = re.findall(r"^Ray's dashboard (http://127\.0\.0\.1:\d+)$", said[0].strip())
        wait_until(lambda: all(shown(prometheus, ".*").values()), 900, "each of Grafana's panels to show the run")
        assert runs_to_choose(prometheus) == ["run.1"]
        chosen = shown(prometheus, r"run\\.1")  # as Grafana writes the name
        assert {tuple(runs) for runs in chosen.values()} == {("run.1",)}
        values = {title: runs["run.1"] for title, runs in chosen.items()}
        assert values["Restarts"] == 1
        assert values["Epoch"] >= 1
        assert values["Optimizer steps"] >= values["Epoch"]
        assert 0 < values["Data wait"] < values["Step"] < 60
        assert values["Samples a second"] > 0
        assert 0 < values["Loss"] < 10
        assert not any(shown(prometheus, "another").values())
        assert train_runs(dashboard) == [("run.1", "RUNNING", [("ERRORED", 2), ("RUNNING", 2)])]
        run.terminate()
        assert run.wait(600) == 143
    finally:
        run.kill()
    reading.join(60)
    assert any(line.startswith("failure: ") and "worker 1 died" in line for line in said)
    assert answer(dashboard) == ""  # with the run, that Ray ends


@pytest.mark.parametrize("options", [{}, {"tpu_cores": 1}], ids=["here", "on a TPU"])
def test_without_workers_on_ray_there_is_no_dashboard(
    options: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray_mnist.launch.tpu.check", lambda config: None)  # that there is a TPU
    trainer = Trainer(dashboard=True, storage_path=str(tmp_path), name="run", **options)
    with pytest.raises(
        RequestError, match=r"^--dashboard shows workers on Ray: give --num-workers, such as 1, or drop"
    ):
        trainer.fit(SimpleModel(), MNISTDataModule("digits"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("cluster")
def test_a_cluster_without_a_dashboard_is_named(tmp_path: Path, ray_cluster: str) -> None:
    trainer = Trainer(num_workers=1, dashboard=True, storage_path=str(tmp_path), name="run")
    with pytest.raises(RequestError, match=f"^--dashboard: the Ray at {ray_cluster} was started without its dashboard"):
        trainer.fit(SimpleModel(), MNISTDataModule("digits"))
    assert list(tmp_path.iterdir()) == []


def test_a_dashboard_that_does_not_start_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise Exception("no port is free")  # as Ray does

    monkeypatch.setattr("ray.init", fail)
    config = RunConfig(num_workers=2, dashboard=True)
    monkeypatch.setattr(connection, "address_to_join", lambda _: None)
    connection.start_if_local(config)
    with pytest.raises(RequestError, match=r"^Ray cannot be started here: no port is free$"):
        connection.start_or_join(config, None, 0)  # type: ignore[arg-type]


def test_ray_train_is_tracked_only_for_the_dashboard() -> None:
    shown, others = (ray_train_settings(RunConfig(num_workers=2, dashboard=asked)) for asked in (True, False))
    assert shown.keys() - others.keys() == {"RAY_TRAIN_ENABLE_STATE_TRACKING"}
