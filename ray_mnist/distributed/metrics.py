"""Makes what a model logs a total over all workers, whether or not it says `sync_dist=True`.

Lightning's own way is not exact: without `sync_dist` each worker keeps the metric of its own shard, and with it the
count of samples that a mean is divided by is itself averaged over the workers, and rounded down to a whole number.
It also waits for ever where the workers do not log the same names. Lightning has no public way in, so this file is the
one place that reaches into its results.
"""

import copy
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torchmetrics import Metric

from ray_mnist.distributed.loaders import LossWeighting

MetricPart = tuple[str, Tensor, float]  # how to reduce it, the value so far, and the weight that it has


class MetricSync(pl.Callback):
    """Has the trainer bring the workers' metrics together: where an epoch ends, and at each step that somebody reads.

    Args:
        weighting: knows how much this worker's shard of a training batch weighs.
    """

    def __init__(self, weighting: LossWeighting) -> None:
        self.weighting = weighting
        # The metrics' states before a shard that weighs nothing.
        self.before: dict[int, dict[str, Any]] = {}

    def attach(self, trainer: pl.Trainer) -> None:
        """Comes between the trainer and its results."""
        if trainer.world_size == 1:
            return
        connector: Any = trainer._logger_connector
        results: Any = trainer.fit_loop.epoch_loop._results
        weighting = self.weighting
        epoch_end_reached, on_epoch_end = connector.epoch_end_reached, connector.on_epoch_end
        on_batch_end, log = connector.on_batch_end, results.log

        def batch_ended() -> None:
            if trainer.training:
                self._forget_weightless_shard(trainer)
                if (trainer.loggers and connector.should_update_logs) or rate_follows_steps(trainer):
                    sync_step_metrics(trainer)
            on_batch_end()

        def reached() -> None:  # before the hooks of the epoch's end, which read the metrics
            epoch_end_reached()
            sync_step_metrics(trainer)
            sync_epoch_metrics(trainer)

        def ended() -> None:  # after them: they may have logged more
            sync_step_metrics(trainer)
            sync_epoch_metrics(trainer)
            on_epoch_end()

        def sync(value: Tensor, group: Any = None, reduce_op: str = "mean") -> Tensor:  # with `sync_dist=True`
            mine = shard_contribution(reduce_op, value, weighting.weight)
            reduced: Tensor = trainer.strategy.reduce(mine, group=group, reduce_op=reduce_op)
            return reduced

        def weighed(fx: str, name: str, *arguments: Any, **named: Any) -> None:
            log(fx, name, *arguments, **named | {"sync_dist_fn": sync})
            results[f"{fx}.{name}"].weight = weighting.weight

        connector.on_batch_end, connector.epoch_end_reached, connector.on_epoch_end = batch_ended, reached, ended
        results.log = weighed

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Keeps the metrics as they are where the shard to come is only there to keep the workers in step."""
        if self.weighting.weight == 0:
            metrics = metrics_of(trainer)
            # In one copy: metrics of a collection may have their states in common.
            states = copy.deepcopy([{name: getattr(metric, name) for name in metric._defaults} for metric in metrics])
            self.before = {id(metric): state for metric, state in zip(metrics, states, strict=True)}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """For checkpoints that are chosen by what a step logged."""
        every = [getattr(callback, "_every_n_train_steps", 0) for callback in trainer.checkpoint_callbacks]
        if trainer.world_size > 1 and any(steps and trainer.global_step % steps == 0 for steps in every):
            sync_step_metrics(trainer)

    def on_validation_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """For callbacks that go, after the validation, by what the step before it logged."""
        if trainer.world_size > 1:
            sync_step_metrics(trainer)

    def _forget_weightless_shard(self, trainer: pl.Trainer) -> None:
        if self.weighting.weight == 0:
            for metric in metrics_of(trainer):
                before = self.before.get(id(metric))
                vars(metric).update(copy.deepcopy(metric._defaults) if before is None else before, _computed=None)


def rate_follows_steps(trainer: pl.Trainer) -> bool:
    """Whether a learning rate goes by what each step logs: it has to be the same on all workers."""
    return any(config.reduce_on_plateau and config.interval == "step" for config in trainer.lr_scheduler_configs)


def metrics_of(trainer: pl.Trainer) -> list[Metric]:
    """All that collects over an epoch: the model's torchmetrics, and what was logged."""
    results: Any = trainer._results
    return [*(part for part in trainer.lightning_module.modules() if isinstance(part, Metric)), *results.values()]


def logged(results: Any) -> dict[str, Any]:
    """The values, not torchmetrics, that were logged in the epoch."""
    return {key: metric for key, metric in results.items() if metric.is_tensor and not metric.has_reset}


def sync_epoch_metrics(trainer: pl.Trainer) -> None:
    """Puts the total over all workers where the epoch's value on this worker was."""
    metrics, parts = logged(trainer._results), dict[str, MetricPart]()
    for key, metric in metrics.items():
        if metric.meta.on_epoch and metric._computed is None:
            samples = metric.cumulated_batch_size if metric.meta.is_mean_reduction else 1
            parts[key] = (metric.meta.reduce_fx.__name__, metric.value.cpu(), float(samples))
    for key, value in reduce_across_ranks(parts, trainer.world_size).items():
        metrics[key]._computed = value.to(metrics[key].value.device)


def sync_step_metrics(trainer: pl.Trainer) -> None:
    """Puts the whole batch's value where that of this worker's shard was, of the last training step."""
    metrics, parts = logged(trainer.fit_loop.epoch_loop._results), dict[str, MetricPart]()
    for key, metric in metrics.items():
        value, done = metric._forward_cache, getattr(metric, "step_total", None)
        if metric.meta.on_step and not metric.meta.sync.should and value is not done:
            kind = metric.meta.reduce_fx.__name__
            parts[key] = (kind, shard_contribution(kind, value, metric.weight).cpu(), metric.weight)
    for key, value in reduce_across_ranks(parts, trainer.world_size).items():
        store_step(trainer, metrics[key], value.to(metrics[key].value.device))


def shard_contribution(kind: str, value: Tensor, weight: float) -> Tensor:
    """What the value of a shard adds to its batch's."""
    return value * {"mean": weight, "sum": float(weight > 0)}.get(kind, 1.0)


def store_step(trainer: pl.Trainer, metric: Any, value: Tensor) -> None:
    """Has the trainer's metrics of its last step show `value`."""
    connector: Any = trainer._logger_connector
    metric._forward_cache = metric.step_total = value
    name, step_name = metric.meta.name, metric.meta.forked_name(on_step=True)
    if metric.meta.logger:
        connector._logged_metrics[step_name] = value
    if metric.meta.prog_bar:
        connector._progress_bar_metrics[step_name] = value.item()
    connector._callback_metrics[step_name] = value
    if not metric.meta.on_epoch:
        connector._callback_metrics[name] = value


def reduce_across_ranks(mine: dict[str, MetricPart], world_size: int) -> dict[str, Tensor]:
    """Of each of this worker's parts, the total with those of the other workers."""
    found: list[dict[str, MetricPart]] = [{} for _ in range(world_size)]
    torch.distributed.all_gather_object(found, mine)
    return {key: reduce_parts([parts[key] for parts in found if key in parts]) for key in mine}


def reduce_parts(parts: list[MetricPart]) -> Tensor:
    """The parts' sum, least, greatest or weighted mean, in float64 and then the metric's own type."""
    kind, first, _ = parts[0]
    values = torch.stack([value.double() for _, value, _ in parts])
    if kind == "mean":
        weights = torch.tensor([weight for *_, weight in parts], dtype=torch.float64)
        values = values / weights.sum()
    reduce: Any = {"mean": torch.sum, "sum": torch.sum, "min": torch.amin, "max": torch.amax}[kind]
    return reduce(values, 0).to(first.dtype)
