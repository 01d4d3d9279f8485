"""What is used of Ray and Lightning beyond their public APIs is in one file each; what a new release moved is named."""

import ast
import copy
import dataclasses
import importlib
import inspect
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.logger import _convert_params, _flatten_dict
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import MLFlowLogger, WandbLogger
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop
from pytorch_lightning.overrides.distributed import _IndexBatchSamplerWrapper
from pytorch_lightning.profilers import PassThroughProfiler, SimpleProfiler
from pytorch_lightning.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from pytorch_lightning.trainer.connectors.logger_connector.result import _ResultMetric
from ray.train import ScalingConfig
from torch.utils.data import BatchSampler, DataLoader, TensorDataset

from ray_mnist.launch.local import LocalContext
from ray_mnist.lightning_internals import (
    REST_OF_SHARDS,
    leave_sigterm_alone,
    parallel_sizes,
    record_like,
    saves_shards,
    spare_each_step,
)
from ray_mnist.lightning_logger_internals import continue_wandb, make_sendable
from ray_mnist.worker import Job, make_trainer

PACKAGE = Path(__file__).parents[1] / "ray_mnist"
INTERNALS = (
    "ray_internals.py",
    "ray_controller_internals.py",
    "ray_train_internals.py",
    "ray_scaling_internals.py",
    "ray_data_internals.py",
    "ray_fork_internals.py",
    "lightning_internals.py",
    "lightning_logger_internals.py",
)
THEIRS = ("ray", "pytorch_lightning", "lightning_fabric")
# Private names of the standard library and of torch, each in the one file that needs it.
OTHERS = {
    ("callbacks.py", "_version"),
    ("cli/console.py", "_exit"),
    ("launch/fork_server.py", "_exit"),
    ("launch/xla.py", "_exit"),
    ("distributed/loaders.py", "_iterator"),
    ("run/progress.py", "_current_frames"),
}


def imports(file: Path) -> Iterator[tuple[str, str]]:
    """What `file` imports of Ray and Lightning: the module, and the name in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in THEIRS:
            yield from ((node.module, name.name) for name in node.names)
        elif isinstance(node, ast.Import):
            yield from ((name.name, "") for name in node.names if name.name.split(".")[0] in THEIRS)


def is_private(module: str, name: str) -> bool:
    parts = [*module.split("."), name]
    return any(part.startswith("_") for part in parts) or parts[:2] == ["ray", "core"]


def files() -> list[Path]:
    return [file for file in sorted(PACKAGE.rglob("*.py")) if file.name not in INTERNALS]


def test_no_other_file_imports_what_is_private() -> None:
    found = [(file.name, *each) for file in files() for each in imports(file) if is_private(*each)]
    assert found == []


def test_no_other_file_reaches_into_a_foreign_object() -> None:
    found = set()
    for file in files():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                of_its_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                of_its_base = isinstance(node.value, ast.Call) and ast.unparse(node.value) == "super()"
                if not of_its_own and not of_its_base:
                    found.add((str(file.relative_to(PACKAGE)), node.attr))
    assert found <= OTHERS


@pytest.mark.parametrize("file", [name for name in INTERNALS if name.startswith("ray")])
def test_ray_still_has_what_is_imported_of_it(file: str) -> None:
    moved = []
    for module, name in imports(PACKAGE / file):
        try:
            if not hasattr(importlib.import_module(module), name or "__name__"):
                importlib.import_module(f"{module}.{name}")
        except ImportError as error:
            moved.append(f"Ray moved {module}.{name}, which {file} imports ({error})")
    assert moved == []


def test_ray_data_still_tells_where_rows_are() -> None:
    from ray.data import DataContext, Dataset, ExecutionOptions
    from ray.data._internal.execution.interfaces import RefBundle
    from ray.data._internal.execution.interfaces.ref_bundle import BlockEntry, BlockSlice
    from ray.data.block import BlockAccessor, BlockMetadata

    assert inspect.signature(Dataset.iter_internal_ref_bundles).parameters.keys() == {"self"}
    assert {"num_rows"} <= {field.name for field in dataclasses.fields(BlockMetadata)}
    assert {"blocks", "slices"} <= {field.name for field in dataclasses.fields(RefBundle)}
    assert [field.name for field in dataclasses.fields(BlockEntry)] == ["ref", "metadata"]
    assert [field.name for field in dataclasses.fields(BlockSlice)] == ["start_offset", "end_offset"]
    assert [*inspect.signature(BlockAccessor.slice).parameters][:3] == ["self", "start", "end"]
    assert inspect.signature(BlockAccessor.to_numpy).parameters["columns"].default is None
    names = {field.name for field in dataclasses.fields(DataContext)}
    assert {"enable_progress_bars", "print_on_execution_start", "execution_no_progress_timeout_s"} <= names
    assert ExecutionOptions().preserve_order is False
    assert ExecutionOptions().resource_limits.copy(cpu=2).cpu == 2


def test_ray_still_calls_what_is_overridden() -> None:
    """A method of ours that no class of Ray's has would never be called."""
    from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker

    from ray_mnist import ray_controller_internals, ray_scaling_internals, ray_train_internals
    from ray_mnist.ray_internals import GetClusterStatusReply

    files = (ray_controller_internals, ray_train_internals, ray_scaling_internals)
    ours = {each for file in files for each in vars(file).values() if inspect.isclass(each)}
    for each in (each for each in ours if each.__module__ in [file.__name__ for file in files]):
        bases = [base for base in each.__mro__[1:] if not base.__module__.startswith("ray_mnist.")]
        for name in vars(each):
            if name.startswith("_") and not name.startswith("__"):
                assert any(name in vars(base) for base in bases), f"Ray moved {name}, which {each.__name__} overrides"
    for name in ("run", "get_result", "get_state", "get_worker_group", "worker_group_cls"):
        assert hasattr(ray_controller_internals.TrainController, name), f"Ray moved TrainController.{name}"
    for name in ("make_decision_for_running_worker_group", "before_controller_execute_resize_decision"):
        assert hasattr(ray_scaling_internals.ScalingPolicy, name), f"Ray moved ScalingPolicy.{name}"
    for name in ("make_decision_for_non_running_worker_group", "GET_RESERVED_RESOURCES_INTERVAL_S"):
        assert hasattr(ray_scaling_internals.ElasticScalingPolicy, name), f"Ray moved ElasticScalingPolicy.{name}"
    assert hasattr(ray_scaling_internals.DefaultFailurePolicy, "make_decision")
    assert hasattr(ray_scaling_internals.global_state, "get_draining_nodes")
    config = ScalingConfig(num_workers=(2, 4))
    assert (config.elasticity_enabled, config._resources_per_worker_not_none) == (True, {"CPU": 1})
    for name in ("get_out_file_path", "get_err_file_path"):
        assert hasattr(ray_train_internals.global_worker, name), f"Ray moved global_worker.{name}"
    held = {field.name for field in dataclasses.fields(ray_controller_internals.WorkerGroupState)}
    assert {"workers", "sync_actor", "placement_group_handle"} <= held
    for name in ("_assign_worker_ranks", "get_workers"):
        assert hasattr(ray_controller_internals.WorkerGroup, name), f"Ray moved WorkerGroup.{name}"
    for name in ("get_metadata", "shutdown"):
        assert hasattr(RayTrainWorker, name), f"Ray moved RayTrainWorker.{name}"
    waiting = GetClusterStatusReply().cluster_resource_state
    assert not waiting.pending_resource_requests
    assert not waiting.pending_gang_resource_requests
    assert hasattr(ray_train_internals.global_state, "_connect_and_get_accessor")
    assert hasattr(ray_train_internals.PlacementGroupTableData(), "creator_actor_id")
    assert hasattr(ray_train_internals.ray.actor.ActorHandle, "_actor_id")


class Logs(pl.LightningModule):
    """Logs a value at each step and over the epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.layer(batch[0]).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Looks(pl.Callback):
    """Goes through the paths while a training is under way."""

    def __init__(self) -> None:
        self.missing: list[str] = []
        self.looked = 0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        metric = "trainer.fit_loop.epoch_loop._results['training_step.loss']"
        for path in (
            "trainer._logger_connector.on_batch_end",
            "trainer._logger_connector.epoch_end_reached",
            "trainer._logger_connector.on_epoch_end",
            "trainer._logger_connector.should_update_logs",
            "trainer._logger_connector._logged_metrics",
            "trainer._logger_connector._progress_bar_metrics",
            "trainer._logger_connector._callback_metrics",
            "trainer._results",
            "trainer.fit_loop.epoch_loop._results.log",
            "trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor",
            "trainer._signal_connector.register_signal_handlers",
            *(
                f"{metric}.{name}"
                for name in ("_computed", "_forward_cache", "_defaults", "value", "cumulated_batch_size")
            ),
            *(f"{metric}.{name}" for name in ("is_tensor", "has_reset", "meta.on_step", "meta.on_epoch")),
            *(f"{metric}.meta.{name}" for name in ("is_mean_reduction", "reduce_fx.__name__", "sync.should")),
            *(f"{metric}.meta.{name}" for name in ("name", "forked_name", "logger", "prog_bar")),
            "trainer.checkpoint_callbacks[0]._every_n_train_steps",
            "trainer.fit_loop.epoch_progress.current.processed",
            "trainer.fit_loop.epoch_progress.current.ready",
        ):
            self.looked += 1
            try:
                eval(path, {"trainer": trainer})
            except (AttributeError, KeyError, TypeError) as error:
                self.missing.append(f"Lightning moved {path} ({error})")


def test_lightning_still_has_what_is_used_of_it(tmp_path: Path) -> None:
    looks = Looks()
    trainer = pl.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[looks, ModelCheckpoint(tmp_path, every_n_train_steps=1)],
    )
    trainer.fit(Logs(), DataLoader(TensorDataset(torch.ones(4, 1)), batch_size=2))
    assert looks.missing == []
    assert looks.looked > 20
    log = inspect.signature(trainer.fit_loop.epoch_loop._results.log).parameters
    assert [*log][:2] == ["fx", "name"]
    assert "sync_dist_fn" in log


def test_lightning_still_says_how_a_model_in_shards_is_saved() -> None:
    in_shards = [ModelParallelStrategy(), FSDPStrategy(state_dict_type="sharded")]
    in_one_file = [ModelParallelStrategy(save_distributed_checkpoint=False), FSDPStrategy(), DDPStrategy()]
    assert [saves_shards(each) for each in [*in_shards, *in_one_file]] == [True] * 2 + [False] * 3
    assert parallel_sizes(ModelParallelStrategy(4, 2)) == (4, 2)
    assert REST_OF_SHARDS == "meta.pt"  # which checkpoints that were saved have


def test_lightnings_trackers_still_keep_what_is_used_of_them_where_it_was(tmp_path: Path) -> None:
    mlflow = MLFlowLogger(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", run_id="given", log_model=True)
    wandb = WandbLogger(offline=True)
    assert (mlflow._run_id, mlflow._log_model, wandb._log_model) == ("given", True, False)
    assert (wandb._experiment, wandb._id, wandb._wandb_init["id"]) == (None, None, None)
    assert wandb._wandb_init["resume"] == "allow"
    assert _flatten_dict(_convert_params({"a": {"b": (1, None)}})) == {"a/b": (1, None)}
    make_sendable(wandb)
    continue_wandb(wandb, "one")
    sent = copy.deepcopy(wandb)
    assert wandb._experiment is None, "Lightning begins a run where the logger is copied"
    assert (type(sent), vars(sent)) == (WandbLogger, vars(wandb))


def train_a_step(callback: pl.Callback, spare: bool = True, leave_sigterm: bool = False) -> pl.Trainer:
    trainer = pl.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    if spare:
        spare_each_step(trainer)
    if leave_sigterm:
        leave_sigterm_alone(trainer)
    trainer.fit(Logs(), DataLoader(TensorDataset(torch.ones(4, 1)), batch_size=2))
    return trainer


@pytest.mark.parametrize("spare", [True, False])
def test_a_metric_that_is_on_its_device_is_not_moved_there_again(spare: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[torch.device] = []
    move = _ResultMetric.to
    monkeypatch.setattr(_ResultMetric, "to", lambda metric, device: (moved.append(device), move(metric, device))[1])
    found: list[Any] = []

    def look(trainer: Any, *_: Any) -> None:
        found.append((len(moved), *trainer._results.values()))

    train_a_step(pl.callbacks.LambdaCallback(on_train_batch_end=look), spare)
    (first, metric), (second, _) = found
    assert (first, second) == ((1, 1) if spare else (1, 2)), "Lightning moves what is logged in another way"
    assert metric.to(torch.device("meta")).value.device.type == "meta"


def test_sigterm_keeps_its_answer_where_lightning_is_told_to_leave_it() -> None:
    found: list[Any] = []
    look = pl.callbacks.LambdaCallback(on_train_start=lambda *_: found.append(signal.getsignal(signal.SIGTERM)))
    train_a_step(look, leave_sigterm=True)
    train_a_step(look)
    assert found[0] == signal.getsignal(signal.SIGTERM) != found[1]


def test_nobody_is_asked_for_a_sigterm_where_lightning_does_not_listen_to_it() -> None:
    """Which it does in the main thread alone: there all ranks go on to ask in each step."""
    before = signal.getsignal(signal.SIGTERM)
    found: list[Any] = []

    def look() -> None:
        trainer = train_a_step(
            pl.callbacks.LambdaCallback(on_train_start=lambda *_: found.append(signal.getsignal(signal.SIGTERM)))
        )
        found.append(vars(trainer.fit_loop.epoch_loop).get("_broadcast_sigterm_tensor"))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    look()
    (listens, spared), (listens_in_main, spared_in_main) = found[:2], found[2:]
    assert (listens, spared_in_main) == (before, None)
    assert listens_in_main != before
    assert spared is not None
    assert "_broadcast_sigterm_tensor()" in inspect.getsource(_TrainingEpochLoop.advance)


@pytest.mark.parametrize("own", [None, SimpleProfiler()])
def test_hooks_are_profiled_only_where_a_profiler_was_asked_for(own: Any, tmp_path: Path) -> None:
    lightning = {"logger": False, "callbacks": [], "profiler": own}
    job = Job("fit", Logs(), {}, str(tmp_path), "run", seed=0, lightning=lightning)
    profiler = make_trainer(job, LocalContext(job, use_gpu=False, tell=print)).profiler
    assert (profiler is own) == (own is not None)
    with profiler.profile("outer"), profiler.profile("inner"):
        pass
    assert isinstance(profiler, PassThroughProfiler) or set(own.recorded_durations) == {"outer", "inner"}


def test_lightnings_record_of_the_samples_of_each_batch_is_kept_of_another_sampler() -> None:
    batches, others = (BatchSampler(range(size), 2, drop_last=False) for size in (3, 5))
    assert record_like(batches, others) is others
    recorded = record_like(_IndexBatchSamplerWrapper(batches), others)
    assert isinstance(recorded, _IndexBatchSamplerWrapper)  # which is what Lightning asks
    assert list(recorded) == recorded.seen_batch_indices == [[0, 1], [2, 3], [4]]
