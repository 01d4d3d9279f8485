"""What a run on a TPU needs, found out without torch_xla.

Imported beside another torch than its own, torch_xla crashes; and where there is no TPU it asks the cloud's metadata
server, which may not be there to answer.
"""

import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

import ray
from packaging.requirements import Requirement
from ray.util import tpu

from ray_mnist.checks import preflight
from ray_mnist.config import RunConfig
from ray_mnist.errors import RequestError

PRECISIONS = ("32", "32-true", "16-true", "bf16-true")  # those of Lightning's XLAPrecision


def check(config: RunConfig) -> None:
    """Finds out in no time whether this process can train on a TPU, here or on a cluster.

    Raises:
        RequestError: there is no TPU, or not the cores that were asked for, or not what it takes to train on them.
    """
    if config.precision not in PRECISIONS:
        raise RequestError(
            f"--precision {config.precision} is not one of a TPU's: use {', '.join(PRECISIONS[1:])}; with bf16-true, "
            "weights are kept in bfloat16 too."
        )
    if not on_cluster(config):
        check_chips(config.tpu_cores, tpu.get_num_tpu_chips_on_node())
    check_backend(find_spec("torch_tpu") is not None)
    check_torch_xla()


def on_cluster(config: RunConfig) -> bool:
    """Whether the run goes to TPU hosts of a Ray cluster: where it is told to, or this host has not the cores."""
    if config.address:
        return True
    chips = tpu.get_num_tpu_chips_on_node()
    if chips and config.tpu_cores in (1, chips):
        return False
    return ray.is_initialized() or bool(os.environ.get("RAY_ADDRESS") or preflight.this_machines_cluster())


def check_chips(cores: int, chips: int) -> None:
    """Raises RequestError unless Lightning can train on so many cores of a host that has `chips`."""
    if not chips:
        raise RequestError(
            f"--tpu-cores {cores}: this machine has no TPU (no such device in /dev/accel* or /dev/vfio): start the run "
            "on a TPU host, or name with --address a Ray cluster that has one, or drop --tpu-cores."
        )
    if cores not in (1, chips):
        raise RequestError(
            f"--tpu-cores {cores}: Lightning trains on one core of this host or on all of them: use 1"
            f"{f' or {chips}' if chips > 1 else ''}."
        )
    hosts = tpu.get_current_pod_worker_count() or 1
    if cores > 1 and hosts > 1:
        raise RequestError(
            f"--tpu-cores {cores}: this host is one of {hosts} of a TPU slice, all of which have to run the program: "
            f"join them to a Ray cluster and use --tpu-cores {cores * hosts}."
        )


def check_backend(has_torch_tpu: bool) -> None:
    """Chooses between Ray Train's own TPU backend, where its package is installed, and Lightning's XLA trainer.

    Raises:
        RequestError: it would be Ray Train's, which Lightning has no accelerator for.
    """
    if has_torch_tpu:
        raise RequestError(
            "--tpu-cores: torch_tpu is installed, the package of Ray Train's TPU backend, which Lightning cannot train "
            f"with yet: use an environment with torch_xla instead ({how_to_install()})."
        )


def check_torch_xla() -> None:
    """Looks at what is installed, before torch_xla is imported.

    Raises:
        RequestError: it is not installed, or not with the torch that it was built for.
    """
    for requirement in requirements():
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            raise RequestError(
                f"--tpu-cores needs {requirement.name} {requirement.specifier}, which is not installed in this "
                f"environment: {how_to_install()}."
            ) from None
        if found.partition("+")[0] not in requirement.specifier:
            raise RequestError(
                f"--tpu-cores needs {requirement.name} {requirement.specifier}, and this environment has {found}, with "
                f"which torch_xla would crash: {how_to_install()}."
            )
    # Where it cannot have the TPU, it would train on the CPU and call that a TPU.
    os.environ.setdefault("PJRT_DEVICE", "TPU")


def requirements() -> Iterator[Requirement]:
    """What the extra `tpu` adds to this project's own requirements."""
    for requirement in map(Requirement, requires("ray-mnist") or ()):
        if requirement.marker and requirement.marker.evaluate({"extra": "tpu"}):
            yield requirement


def how_to_install() -> str:
    """The commands that make an environment for a TPU."""
    packages = " ".join(f"'{requirement.name}{requirement.specifier}'" for requirement in requirements())
    packages = packages.replace("torch-xla", "torch-xla[tpu]")
    return f"`scripts/setup --tpu` makes one in .venv-tpu, `pip install {packages}` changes this one"
