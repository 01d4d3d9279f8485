"""The arguments of Lightning's Trainer and its methods; those that say where to run are Ray's to answer here."""

from importlib.metadata import version
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import BatchSizeFinder, LearningRateFinder, ProgressBar
from pytorch_lightning.strategies import ModelParallelStrategy

from ray_mnist.cli import console
from ray_mnist.compiling import refuse_compiling
from ray_mnist.config import RunConfig
from ray_mnist.errors import RequestError, one_line
from ray_mnist.lightning_internals import parallel_sizes
from ray_mnist.lightning_package import is_foreign, package_in_use
from ray_mnist.run import trackers

FIND_UNUSED = "ddp_find_unused_parameters_true"
STRATEGIES = ("auto", "ddp", FIND_UNUSED, "ddp_find_unused_parameters_false", "fsdp")


def as_list(value: Any) -> list[Any]:
    """None, one or several, as a list of the caller's own."""
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def for_lightning(arguments: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """What the Trainer inside each worker is given.

    Raises:
        RequestError: an argument means nothing on Ray, or Lightning does not take it.
    """
    refuse_other_version()
    refuse_foreign(**arguments)
    refuse_places(arguments, config)
    if config.compile:
        refuse_compiling("--compile", arguments.get("strategy"), bool(config.tpu_cores))
    taken = {name: value for name, value in arguments.items() if name not in ("devices", "num_nodes", "accelerator")}
    if taken.get("strategy") == "auto":
        del taken["strategy"]
    taken["callbacks"], taken["plugins"] = as_list(taken.get("callbacks")), as_list(taken.get("plugins"))
    refuse_finders(taken["callbacks"])
    logger = taken.get("logger")
    taken["logger"] = logger is not False if logger is None or isinstance(logger, bool) else as_list(logger)
    trackers.make_sendable(as_list(logger))
    taken["precision"] = config.precision
    if taken.pop("barebones", False):
        raise RequestError("barebones=True leaves out the checkpoints that a run recovers from: drop it.")
    taken.pop("enable_checkpointing", None)  # about checkpoints beside the run folder's own, which make it recover
    limited = "max_epochs" in arguments or not ends_otherwise(arguments)
    taken["max_epochs"] = config.max_epochs if limited else -1
    if any(isinstance(callback, ProgressBar) for callback in taken["callbacks"]):
        taken["enable_progress_bar"] = True
    refuse_what_lightning_refuses(taken)
    return taken


def refuse_other_version() -> None:
    """Raises RequestError where the program has imported a `lightning` that this package was not made for."""
    if package_in_use() == "lightning.pytorch" and version("lightning") != (ours := version("pytorch-lightning")):
        raise RequestError(
            f"lightning {version('lightning')} is not the same code as pytorch-lightning {ours}, which is here too: "
            f"pip install lightning=={ours}."
        )


def refuse_foreign(**given: Any) -> None:
    """Raises RequestError for an object of the other of the two packages that Lightning comes as."""
    for name, value in given.items():
        for item in as_list(value):
            if is_foreign(item):
                raise RequestError(
                    f"{name}: {type(item).__name__} is of the package lightning, which was imported beside "
                    "pytorch_lightning before ray_mnist could make one of the two: put `import ray_mnist` before both."
                )


def ends_otherwise(arguments: dict[str, Any]) -> bool:
    """Whether something other than epochs ends the run."""
    return arguments.get("max_steps", -1) != -1 or arguments.get("max_time") is not None


def refuse_places(arguments: dict[str, Any], config: RunConfig) -> None:
    """Raises RequestError for what another option says here, naming that option."""
    devices, nodes = arguments.get("devices", "auto"), arguments.get("num_nodes", 1)
    if devices not in ("auto", 1, "1"):
        raise RequestError(
            f"devices={devices!r} means nothing here, where every worker has one device: give "
            f"num_workers={devices if isinstance(devices, int) and devices > 1 else 'N'} for as many workers."
        )
    if nodes != 1:
        raise RequestError(f"num_nodes={nodes!r} means nothing here, where Ray places the workers: give num_workers=N.")
    accelerator = arguments.get("accelerator", "auto")
    instead = {"cpu": "drop use_gpu", "gpu": "use_gpu=True", "cuda": "use_gpu=True", "tpu": "tpu_cores=N"}
    fits = {"auto": True, "cpu": not config.use_gpu, "gpu": config.use_gpu, "cuda": config.use_gpu}
    if not isinstance(accelerator, str) or not fits.get(accelerator, accelerator == "tpu" and config.tpu_cores):
        advice = instead.get(accelerator, "leave it out") if isinstance(accelerator, str) else "leave it out"
        raise RequestError(f"accelerator={accelerator!r} is not how a run chooses its devices: {advice}.")
    refuse_strategy(arguments.get("strategy", "auto"), config)
    for plugin in as_list(arguments.get("plugins")):
        if isinstance(plugin, ClusterEnvironment):
            raise RequestError(f"plugins: {type(plugin).__name__} has no place where Ray is the cluster: drop it.")


def refuse_strategy(strategy: Any, config: RunConfig) -> None:
    """Raises RequestError for one that does not run on workers that Ray starts, or not on a TPU."""
    if config.tpu_cores and strategy != "auto":
        raise RequestError("strategy: on a TPU it is Lightning's XLA strategy, leave it out.")
    if isinstance(strategy, str):
        if strategy not in STRATEGIES:
            raise RequestError(
                f"strategy={strategy!r} cannot run on workers that Ray starts: use one of {', '.join(STRATEGIES)}."
            )
        if strategy == "fsdp" and not config.use_gpu:
            raise RequestError(
                "strategy='fsdp' needs GPUs: give use_gpu=True, or use 'ddp', or Lightning's ModelParallelStrategy(), "
                "which shards on CPUs too."
            )
    elif isinstance(strategy, ModelParallelStrategy):
        data, tensors = parallel_sizes(strategy)
        if data not in ("auto", config.num_workers) or tensors not in ("auto", 1):
            raise RequestError(
                f"ModelParallelStrategy(data_parallel_size={data!r}, tensor_parallel_size={tensors!r}): here all "
                "workers share the data, and none shares a layer: leave both out."
            )
    elif not type(strategy).__module__.startswith("ray.train.lightning"):
        raise RequestError(
            f"strategy={type(strategy).__name__}(…) cannot run on workers that Ray starts: use ray.train.lightning's, "
            "such as RayDDPStrategy with the same arguments, Lightning's ModelParallelStrategy, or one of "
            f"{', '.join(STRATEGIES)}."
        )


def refuse_finders(callbacks: list[Any]) -> None:
    """Raises RequestError for Lightning's tuner."""
    for callback in callbacks:
        if isinstance(callback, LearningRateFinder | BatchSizeFinder):
            raise RequestError(
                f"{type(callback).__name__} tries values out in trainings of its own, on one device: search with "
                "ray_mnist.tune, or call Lightning's Tuner with Lightning's Trainer, and give the run what it finds."
            )


def refuse_what_lightning_refuses(taken: dict[str, Any]) -> None:
    """Finds out here, rather than in a worker far away."""
    # Lightning adds to the list of callbacks that it is given.
    here = taken | {"accelerator": "cpu", "callbacks": [*taken["callbacks"]], "enable_checkpointing": True}
    here |= {"strategy": "auto", "logger": False, "enable_progress_bar": True, "enable_model_summary": False}
    with console.quiet():
        try:
            pl.Trainer(**here)
        except (TypeError, ValueError, MisconfigurationException) as error:
            raise RequestError(f"Lightning's Trainer refuses its arguments: {one_line(error)}") from error


def data_of(datamodule: pl.LightningDataModule | None, **loaders: Any) -> dict[str, Any]:
    """The data that a method was given, as arguments for Lightning's method of that name.

    Raises:
        RequestError: it was given both loaders and a data module.
    """
    given = {name: value for name, value in loaders.items() if value is not None}
    for name, value in given.items():
        if hasattr(value, "prepare_data_per_node") and hasattr(value, "setup"):
            datamodule, given = value, {other: loader for other, loader in given.items() if other != name}
            break
    if datamodule is not None and given:
        raise RequestError(f"Give either datamodule or {' and '.join(given)}, not both.")
    return given if datamodule is None else {"datamodule": datamodule}


def check_kind(model: Any, data: dict[str, Any]) -> None:
    """Raises RequestError unless model and data module are Lightning's."""
    refuse_foreign(model=model, datamodule=data.get("datamodule"))
    for name, value, kind in (
        ("model", model, pl.LightningModule),
        ("datamodule", data.get("datamodule"), pl.LightningDataModule | None),
    ):
        if not isinstance(value, kind):
            raise RequestError(
                f"{name} is of {type(value).__module__}.{type(value).__name__}, which is none of Lightning's: derive "
                "it from a class of the package lightning or pytorch_lightning."
            )
