"""The run's configuration: one typed definition behind the API, the command line, YAML files and sweeps."""

import math
import os
import re
from dataclasses import dataclass, field, fields
from typing import Any

from ray_mnist.errors import RequestError

MAX_SEED = 2**32 - 1  # NumPy's
WORKERS = "give a whole number of at least 0, or the fewest and the most, such as 2:4"


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(kw_only=True)
class RunConfig:
    """The options of a run, as `Trainer` and the command line take them.

    Raises:
        RequestError: an option, or two of them together, cannot mean anything.
    """

    num_workers: int | tuple[int, int] | str = _option(
        0, "training workers on Ray, or the fewest and the most, such as 2:4; 0 trains in this process, without Ray"
    )
    use_gpu: bool = _option(False, "give each worker one GPU")
    cpus_per_worker: int | None = _option(
        None, "CPUs and threads of each worker (default: 1, or with --use-gpu the GPU's share of its node's CPUs)"
    )
    tpu_cores: int = _option(0, "train on so many cores of this TPU host, or of a TPU slice in a Ray cluster")
    max_epochs: int = _option(10, "passes over the training set")
    seed: int = _option(0, "seeds the weights, the split and the order of the samples")
    precision: str = _option("32-true", "Lightning's precision, such as 32-true, 16-mixed, bf16-mixed")
    storage_path: str = _option(
        os.environ.get("RAY_MNIST_STORAGE_PATH", "runs"),  # a cluster's nodes have it set
        "folder or URI that the run folder is made in",
    )
    name: str | None = _option(None, "the run folder's name (default: data set, model and time)")
    resume: bool = _option(False, "go on from the newest checkpoint of the run called --name")
    max_failures: int = _option(3, "how often to start again from the newest checkpoint when a worker dies")
    checkpoint_every_n_steps: int | None = _option(
        None, "also checkpoint every so many optimizer steps, not only after each epoch"
    )
    stall_timeout: float = _option(
        300, "seconds without progress of any worker, or an answer of one, after which they start again; 0 waits on"
    )
    checkpoint_every_s: int | None = _option(None, "also checkpoint when the last one is so many seconds old")
    allow_nan: bool = _option(False, "go on when the loss is NaN or infinite, which otherwise ends the run")
    profile: bool = _option(False, "write a trace of some training steps of each rank to the run folder")
    compile: bool = _option(False, "compile the model in each worker, as torch.compile(model) does")
    dashboard: bool = _option(False, "say where Ray's dashboard is, which a Ray that is started for the run then has")
    address: str | None = _option(
        None, "the Ray cluster to join (default: the one this machine is part of, or else a new local one)"
    )

    def __post_init__(self) -> None:
        self.num_workers = workers_of(self.num_workers)
        self._at_least("tpu_cores", 0)
        self._at_least("max_epochs", 1)
        self._at_least("seed", 0)
        if self.seed > MAX_SEED:
            raise RequestError(f"--seed {self.seed} is not possible: give a whole number of at most {MAX_SEED}.")
        self._at_least("max_failures", 0)
        for name in ("checkpoint_every_n_steps", "checkpoint_every_s", "cpus_per_worker"):
            if getattr(self, name) is not None:
                self._at_least(name, 1)
        if isinstance(self.stall_timeout, bool | str) or not 0 <= self.stall_timeout < math.inf:
            raise RequestError(f"--stall-timeout {self.stall_timeout} is not possible: give seconds, or 0 to wait on.")
        if self.use_gpu and self.tpu_cores:
            raise RequestError("--use-gpu and --tpu-cores were both given: a run trains on GPUs or on a TPU, drop one.")
        if self.num_workers and self.tpu_cores:
            raise RequestError("--num-workers and --tpu-cores were both given: each TPU core is a worker, drop one.")
        if self.resume and not self.name:
            raise RequestError("--resume needs --name, the run to go on with.")
        if self.name is not None and (not self.name or set("/\\") & set(self.name) or self.name.startswith(".")):
            raise RequestError(f"--name {self.name!r} cannot be a folder's name: leave out '/' and a leading dot.")

    @property
    def elastic(self) -> bool:
        """Whether the number of workers may change while the run goes on."""
        return isinstance(self.num_workers, tuple)

    @property
    def min_workers(self) -> int:
        """The fewest workers that the run goes on with."""
        return self.num_workers[0] if isinstance(self.num_workers, tuple) else int(self.num_workers)

    @property
    def max_workers(self) -> int:
        """The most workers that the run has use for."""
        return self.num_workers[1] if isinstance(self.num_workers, tuple) else int(self.num_workers)

    def _at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise RequestError(f"{flag(name)} {value} is not possible: give a whole number of at least {least}.")


@dataclass(kw_only=True)
class SweepConfig:
    """How to search, as `tune` and its command line take it.

    Raises:
        RequestError: an option cannot mean anything.
    """

    num_samples: int = _option(12, "how many trials; a grid search has one for each combination")
    search: str = _option("random", "random, grid or optuna (a package of its own)")
    scheduler: str = _option("asha", "asha stops trials that fall behind, fifo stops none")
    max_concurrent: int | None = _option(None, "how many trials at a time (default: as many as fit)")
    time_budget: float | None = _option(None, "seconds after which no trial goes on")
    metric: str = _option("val_loss", "what the best trial is chosen by, of the validation set")
    mode: str = _option("min", "whether the metric is to be as small (min) or as large (max) as possible")

    def __post_init__(self) -> None:
        for name, allowed in (
            ("search", ("random", "grid", "optuna")),
            ("scheduler", ("asha", "fifo")),
            ("mode", ("min", "max")),
        ):
            if getattr(self, name) not in allowed:
                raise RequestError(f"--{name} {getattr(self, name)} is not known: use one of {', '.join(allowed)}.")
        for name, value in (("num-samples", self.num_samples), ("max-concurrent", self.max_concurrent)):
            if value is not None and value < 1:
                raise RequestError(f"--{name} {value} is not possible: give a whole number of at least 1.")
        if self.time_budget is not None and self.time_budget <= 0:
            raise RequestError(f"--time-budget {self.time_budget} is not possible: give a positive number of seconds.")


def workers_of(given: Any) -> int | tuple[int, int]:
    """How many workers, or the fewest and the most where these differ: of 4, (2, 4), [2, 4] or "2:4".

    Raises:
        RequestError: it is none of these.
    """
    text = ":".join(map(str, given)) if isinstance(given, list | tuple) else str(given)
    if not re.fullmatch("[0-9]+(:[0-9]+)?", text):
        raise RequestError(f"--num-workers {text} is not possible: {WORKERS}.")
    least, *more = map(int, text.split(":"))
    most = more[0] if more else least
    if more and not 1 <= least <= most:
        raise RequestError(f"--num-workers {text} is not possible: give at least one, and the fewest first.")
    return least if least == most else (least, most)


def flag(name: str) -> str:
    """The option's spelling on the command line, such as `--num-workers` for `num_workers`."""
    return "--" + name.replace("_", "-")


OPTIONS = tuple(option.name for option in fields(RunConfig))


def global_seed() -> int:
    """The seed that `pytorch_lightning.seed_everything` set last, or 0: Lightning keeps it in the environment."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))
