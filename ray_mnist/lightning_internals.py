"""All that this package uses of Lightning beyond its public API, and why: the one file to look at with a new Lightning.

The way that Lightning brings metrics together is not exact (see `distributed/metrics.py`), and has no public way in.
tests/test_internals.py names what a new release moved.
"""

import copy
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.load import _METADATA_FILENAME
from pytorch_lightning.overrides.distributed import _IndexBatchSamplerWrapper
from pytorch_lightning.strategies import FSDPStrategy, ModelParallelStrategy
from pytorch_lightning.trainer.connectors.logger_connector.result import _ResultMetric
from torch import Tensor
from torchmetrics import Metric

REST_OF_SHARDS = _METADATA_FILENAME  # the file with all of a checkpoint in shards that is no shard
MetricPart = tuple[str, Tensor, float]  # how to reduce it, a worker's value, and the weight that it has


class SettledMetric(_ResultMetric):
    """What was logged. Lightning moves it at each step, in a copy of all that it holds; one that is there stays."""

    def to(self, device: torch.device) -> "SettledMetric":  # type: ignore[override]
        """On `device`."""
        if not (self.is_tensor and self.value.device == device):
            super().to(device)
        return self


def spare_each_step(trainer: pl.Trainer) -> None:
    """Leaves out what Lightning does in each step of the training without an effect."""
    loop: Any = trainer.fit_loop.epoch_loop
    # All ranks ask in a collective whether rank 0 was told to end by a SIGTERM, to which Lightning listens only in the
    # main thread of a process. Ray runs a training in another.
    if threading.current_thread() is not threading.main_thread():
        loop._broadcast_sigterm_tensor = lambda: None
    results, log = loop._results, loop._results.log

    @torch.compiler.disable  # as what it calls is
    def log_settled(fx: str, name: str, *arguments: Any, **named: Any) -> None:
        log(fx, name, *arguments, **named)
        results[f"{fx}.{name}"].__class__ = SettledMetric

    results.log = log_settled


def leave_sigterm_alone(trainer: pl.Trainer) -> None:
    """Keeps the process's answer to SIGTERM: Lightning's would end the run without a checkpoint."""
    connector: Any = trainer._signal_connector
    register = connector.register_signal_handlers

    def register_others() -> None:
        answer = signal.getsignal(signal.SIGTERM)
        register()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, answer)

    connector.register_signal_handlers = register_others


def hook_into_metrics(
    trainer: pl.Trainer,
    batch_ended: Callable[[], None],
    epoch_ended: Callable[[], None],
    sync: Callable[..., Tensor],
    weight: Callable[[], float],
) -> None:
    """Comes between the trainer and its metrics.

    Args:
        trainer: whose metrics.
        batch_ended: called before anyone reads the metrics of a training batch.
        epoch_ended: called before the hooks of an epoch's end, which read its metrics, and after them, since they may
            have logged more.
        sync: reduces a value that is logged with `sync_dist=True`, given that and its weight.
        weight: gives the weight that what is logged now has among all workers, unless it comes with a `batch_size`.
    """
    connector: Any = trainer._logger_connector
    training: Any = trainer.fit_loop.epoch_loop
    for loop in (training, training.val_loop, trainer.validate_loop, trainer.test_loop):
        count_no_mean_of_nothing(loop._results)
    results: Any = training._results
    on_batch_end, epoch_end_reached = connector.on_batch_end, connector.epoch_end_reached
    on_epoch_end, log, weights = connector.on_epoch_end, results.log, [1.0]

    def batch_end() -> None:
        if trainer.training:
            batch_ended()
        on_batch_end()

    def reached() -> None:
        epoch_end_reached()
        epoch_ended()

    def epoch_end() -> None:
        epoch_ended()
        on_epoch_end()

    @torch.compiler.disable
    def weighed(fx: str, name: str, *arguments: Any, batch_size: Any = None, **named: Any) -> None:
        weights[0] = weight() if batch_size is None else batch_size * (weight() > 0)
        log(fx, name, *arguments, batch_size=batch_size, **named | {"sync_dist_fn": weighed_sync})
        results[f"{fx}.{name}"].weight = weights[0]

    def weighed_sync(value: Tensor, *arguments: Any, **named: Any) -> Tensor:
        return sync(value, weights[0], *arguments, **named)

    connector.on_batch_end, connector.epoch_end_reached, connector.on_epoch_end = batch_end, reached, epoch_end
    results.log = weighed


def count_no_mean_of_nothing(results: Any) -> None:
    """Makes a mean that is logged with `batch_size=0` 0: it may be 0 / 0, and a total with NaN in it is NaN."""
    log = results.log

    @torch.compiler.disable
    def counted(fx: str, name: str, value: Any, batch_size: Any = None, **named: Any) -> None:
        # A tensor may be on a device, for which nothing waits here.
        may_be_zero = isinstance(batch_size, Tensor) or batch_size == 0
        if may_be_zero and isinstance(value, Tensor) and named["reduce_fx"] in ("mean", torch.mean):
            value = value.masked_fill(torch.as_tensor(batch_size, device=value.device) == 0, 0)
        log(fx, name, value, batch_size=batch_size, **named)

    results.log = counted


def loggers_want_this_step(trainer: pl.Trainer) -> bool:
    """Whether there are loggers, and the step is one of each `log_every_n_steps`."""
    connector: Any = trainer._logger_connector
    return bool(trainer.loggers and connector.should_update_logs)


def saves_shards(strategy: Any) -> bool:
    """Whether its checkpoints are folders, of which each rank writes a part."""
    if isinstance(strategy, ModelParallelStrategy):
        return strategy._save_distributed_checkpoint
    return isinstance(strategy, FSDPStrategy) and strategy._state_dict_type == "sharded"


def is_sharded(strategy: Any) -> bool:
    """Whether each rank has a part of the model only; all need each other in each step, and such folders are loaded."""
    return isinstance(strategy, ModelParallelStrategy | FSDPStrategy)


def compiled_in_place(module: torch.nn.Module) -> bool:
    """Whether `module.compile()` was called."""
    return module._compiled_call_impl is not None


def parallel_sizes(strategy: ModelParallelStrategy) -> tuple[int | str, int | str]:
    """How many workers share the data, and how many each layer: a number or `auto`."""
    return strategy._data_parallel_size, strategy._tensor_parallel_size


def checkpoint_at_this_step(trainer: pl.Trainer) -> bool:
    """Whether a ModelCheckpoint saves after this step."""
    every = [getattr(callback, "_every_n_train_steps", 0) for callback in trainer.checkpoint_callbacks]
    return any(steps and trainer.global_step % steps == 0 for steps in every)


def logged_values(results: Any) -> dict[str, Any]:
    """The values, not torchmetrics, that were logged in the epoch."""
    return {key: metric for key, metric in results.items() if metric.is_tensor and not metric.has_reset}


def epoch_parts(trainer: pl.Trainer) -> dict[str, MetricPart]:
    """This worker's part of each value of the epoch that no worker has the total of yet."""
    return {
        key: (
            metric.meta.reduce_fx.__name__,
            metric.value.cpu(),
            float(metric.cumulated_batch_size if metric.meta.is_mean_reduction else 1),
        )
        for key, metric in logged_values(trainer._results).items()
        if metric.meta.on_epoch and metric._computed is None
    }


def collected(trainer: pl.Trainer) -> dict[str, MetricPart]:
    """What each value of the training epoch has collected on this worker: of a mean, the sum and its weight."""
    return {
        key: (
            metric.meta.reduce_fx.__name__,
            metric.value.cpu(),
            float(metric.cumulated_batch_size) if metric.meta.is_mean_reduction else 0.0,
        )
        for key, metric in logged_values(trainer.fit_loop.epoch_loop._results).items()
        if metric.meta.on_epoch
    }


def collect_on(trainer: pl.Trainer, before: dict[str, MetricPart]) -> None:
    """Has values that are logged go on from what they had collected `before`, which loses each that is taken.

    Lightning makes a metric as it is logged, and forgets at an epoch's first batch what a metric has collected.
    """
    results: Any = trainer.fit_loop.epoch_loop._results
    log = results.log

    def log_on(fx: str, name: str, *arguments: Any, **named: Any) -> None:
        log(fx, name, *arguments, **named)
        if found := before.pop(f"{fx}.{name}", None):
            metric = results[f"{fx}.{name}"]
            kind, value, weight = found
            metric.carried = {"value": value.to(metric.value.device)}
            if kind == "mean":
                metric.carried["cumulated_batch_size"] = metric.cumulated_batch_size.new_tensor(weight)
                metric.cumulated_batch_size = metric.cumulated_batch_size + metric.carried["cumulated_batch_size"]
            add: Any = {"min": torch.minimum, "max": torch.maximum}.get(kind, torch.add)
            metric.value = add(metric.carried["value"], metric.value)

    results.log = log_on


def set_epoch_value(trainer: pl.Trainer, key: str, value: Tensor) -> None:
    """Puts the total over all workers where this worker's part was."""
    metric = logged_values(trainer._results)[key]
    metric._computed = value.to(metric.value.device)


def step_parts(trainer: pl.Trainer) -> dict[str, MetricPart]:
    """This worker's part of each value of the last training step that no worker has the total of yet."""
    return {
        key: (metric.meta.reduce_fx.__name__, metric._forward_cache.cpu(), float(metric.weight))
        for key, metric in logged_values(trainer.fit_loop.epoch_loop._results).items()
        if metric.meta.on_step
        and not metric.meta.sync.should
        and metric._forward_cache is not getattr(metric, "step_total", None)
    }


def set_step_value(trainer: pl.Trainer, key: str, value: Tensor) -> None:
    """Has the trainer's metrics of its last step show the whole batch's value."""
    connector: Any = trainer._logger_connector
    metric = logged_values(trainer.fit_loop.epoch_loop._results)[key]
    metric._forward_cache = metric.step_total = value = value.to(metric.value.device)
    name, step_name = metric.meta.name, metric.meta.forked_name(on_step=True)
    if metric.meta.logger:
        connector._logged_metrics[step_name] = value
    if metric.meta.prog_bar:
        connector._progress_bar_metrics[step_name] = value.item()
    connector._callback_metrics[step_name] = value
    if not metric.meta.on_epoch:
        connector._callback_metrics[name] = value


class SeenIndices(_IndexBatchSamplerWrapper):
    """Lightning's record, for prediction writers, of the samples of each batch: in lists, as it keeps them."""

    def __next__(self) -> list[int]:
        batch = super().__next__()
        self.seen_batch_indices[-1] = list(batch)
        return batch


def record_like(sampler: Any, shards: Any) -> Any:
    """The sampler `shards`, recorded where Lightning has its own record of `sampler`."""
    return SeenIndices(shards) if isinstance(sampler, _IndexBatchSamplerWrapper) else shards


def metrics_of(trainer: pl.Trainer) -> list[Metric]:
    """All that collects over an epoch: the model's torchmetrics, and what was logged."""
    results: Any = trainer._results
    return [*(part for part in trainer.lightning_module.modules() if isinstance(part, Metric)), *results.values()]


def metric_states(trainer: pl.Trainer) -> dict[int, dict[str, Any]]:
    """A copy of what each metric has collected so far, by the metric's id."""
    metrics = metrics_of(trainer)
    # In one copy: metrics of a collection may have their states in common.
    states = copy.deepcopy([{name: getattr(metric, name) for name in metric._defaults} for metric in metrics])
    return {id(metric): state for metric, state in zip(metrics, states, strict=True)}


def restore_metric_states(trainer: pl.Trainer, states: dict[int, dict[str, Any]]) -> None:
    """Takes the metrics back to these states; one that was not there then has collected what it was to go on from."""
    for metric in metrics_of(trainer):
        state = states.get(id(metric))
        first = metric._defaults | getattr(metric, "carried", {})
        vars(metric).update(copy.deepcopy(first) if state is None else state, _computed=None)
