"""A TPU that is not there, or not all that it takes: one sentence, in seconds, in an environment without torch_xla."""

import importlib.metadata
import os
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray.util.tpu
from packaging.requirements import Requirement
from ray.air._internal.device_manager import register_custom_torch_dist_backend

from ray_mnist import Trainer, train
from ray_mnist.cli import console
from ray_mnist.config import RunConfig
from ray_mnist.errors import RequestError
from ray_mnist.launch import tpu

INSTALL = (
    "`scripts/setup --tpu` makes one in .venv-tpu, `pip install 'torch-xla[tpu]==2.9.0' 'torch==2.9.*' 'torchvision"
)
TPU_ENVIRONMENT = {"torch-xla": "2.9.0", "torch": "2.9.1+cu128", "torchvision": "0.24.1"}


@pytest.fixture
def chips(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Gives this machine TPU chips, and makes it one of so many hosts of a slice."""

    def pretend(count: int, hosts: int = 1) -> None:
        monkeypatch.setattr(ray.util.tpu, "get_num_tpu_chips_on_node", lambda: count)
        monkeypatch.setattr(ray.util.tpu, "get_current_pod_worker_count", lambda: hosts)

    return pretend


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """Makes an environment with these versions of the packages that a TPU takes."""

    def pretend(versions: dict[str, str]) -> None:
        def version(name: str) -> str:
            if name not in versions:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(tpu, "version", version)
        monkeypatch.setenv("PJRT_DEVICE", "")  # has what is set later undone
        monkeypatch.delenv("PJRT_DEVICE")

    return pretend


def refusal(**options: Any) -> str:
    with pytest.raises(RequestError) as refused:
        Trainer(**options)
    return str(refused.value)


def test_no_tpu_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", "--dataset", "digits", "--tpu-cores", "8"])
    assert console.exit_status(train.train) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "error: --tpu-cores 8: this machine has no TPU (no such device in /dev/accel* or /dev/vfio): start the run on "
        "a TPU host, or name with --address a Ray cluster that has one, or drop --tpu-cores.\n"
    )
    assert not any(tmp_path.iterdir())


def test_torch_xla_is_missing(chips: Callable[..., None], packages: Callable[[dict[str, str]], None]) -> None:
    chips(8)
    packages({"torch": "2.15.0", "torchvision": "0.29.2"})
    said = refusal(tpu_cores=8)
    assert said.startswith("--tpu-cores needs torch-xla ==2.9.0, which is not installed in this environment: ")
    assert INSTALL in said


@pytest.mark.parametrize(
    ("name", "version", "needs"), [("torch", "2.15.0", "==2.9.*"), ("torch-xla", "2.8.1", "==2.9.0")]
)
def test_torch_and_torch_xla_do_not_match(
    name: str, version: str, needs: str, chips: Callable[..., None], packages: Callable[[dict[str, str]], None]
) -> None:
    chips(8)
    packages(TPU_ENVIRONMENT | {name: version})
    said = refusal(tpu_cores=8)
    assert said.startswith(
        f"--tpu-cores needs {name} {needs}, and this environment has {version}, with which torch_xla"
    )
    assert INSTALL in said
    assert "torch_xla" not in sys.modules


def test_what_matches_is_taken(chips: Callable[..., None], packages: Callable[[dict[str, str]], None]) -> None:
    chips(8)
    packages(TPU_ENVIRONMENT)
    for cores in (1, 8):
        assert Trainer(tpu_cores=cores).config.tpu_cores == cores
    assert os.environ["PJRT_DEVICE"] == "TPU"


def test_the_versions_are_those_of_the_extra() -> None:
    pyproject = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())
    extra = pyproject["project"]["optional-dependencies"]["tpu"]
    wanted = {Requirement(line).name: Requirement(line).specifier for line in extra}
    assert {requirement.name: requirement.specifier for requirement in tpu.requirements()} == wanted


@pytest.mark.parametrize(
    ("cores", "host", "said"),
    [
        (3, {"count": 8}, "--tpu-cores 3: Lightning trains on one core of this host or on all of them: use 1 or 8."),
        (8, {"count": 1}, "--tpu-cores 8: Lightning trains on one core of this host or on all of them: use 1."),
        (4, {"count": 4, "hosts": 4}, "join them to a Ray cluster and use --tpu-cores 16."),
    ],
)
def test_cores_that_the_host_has_not(
    cores: int, host: dict[str, int], said: str, chips: Callable[..., None], packages: Callable[[dict[str, str]], None]
) -> None:
    chips(**host)
    packages(TPU_ENVIRONMENT)
    assert said in refusal(tpu_cores=cores)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "64-true"])
def test_precisions_that_xla_has_not(precision: str) -> None:
    said = refusal(tpu_cores=1, precision=precision)
    assert said.startswith(f"--precision {precision} is not one of a TPU's: use 32-true, 16-true, bf16-true")


def test_a_strategy_of_the_users(chips: Callable[..., None], packages: Callable[[dict[str, str]], None]) -> None:
    chips(1)
    packages(TPU_ENVIRONMENT)
    assert refusal(tpu_cores=1, strategy="ddp") == "strategy: on a TPU it is Lightning's XLA strategy, leave it out."


def test_ray_trains_backend_only_where_its_package_is() -> None:
    tpu.check_backend(has_torch_tpu=False)
    with pytest.raises(RequestError, match="torch_tpu is installed, the package of Ray Train's TPU backend"):
        tpu.check_backend(has_torch_tpu=True)


def test_that_package_is_what_rays_backend_needs() -> None:
    with pytest.raises(ImportError, match="torch_tpu"):
        register_custom_torch_dist_backend("tpu_dist")


def test_where_the_run_goes(chips: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    clusters: list[str | None] = [None]
    monkeypatch.setattr("ray_mnist.checks.preflight.this_machines_cluster", lambda: clusters[0])
    chips(4)
    assert not tpu.on_cluster(RunConfig(tpu_cores=4))
    assert not tpu.on_cluster(RunConfig(tpu_cores=16))  # and is refused
    assert tpu.on_cluster(RunConfig(tpu_cores=4, address="192.0.2.2:6379"))
    clusters[0] = "192.0.2.2:6379"
    assert not tpu.on_cluster(RunConfig(tpu_cores=4))
    assert tpu.on_cluster(RunConfig(tpu_cores=16))
    chips(0)
    assert tpu.on_cluster(RunConfig(tpu_cores=1))
