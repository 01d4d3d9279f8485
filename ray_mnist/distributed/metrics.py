"""Makes what a model logs a total over all workers, whether or not it says `sync_dist=True`.

Lightning's own way is not exact: without `sync_dist` each worker keeps the metric of its own shard, and with it the
count of samples that a mean is divided by is itself averaged over the workers, and rounded down to a whole number.
It also waits for ever where the workers do not log the same names.
"""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ray_mnist import lightning_internals
from ray_mnist.distributed.collectives import gather
from ray_mnist.distributed.weighting import LossWeighting
from ray_mnist.lightning_internals import MetricPart


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
        """Comes between the trainer, of several workers, and its metrics."""

        def batch_ended() -> None:
            if self.weighting.weight == 0:
                lightning_internals.restore_metric_states(trainer, self.before)
            if lightning_internals.loggers_want_this_step(trainer) or rate_follows_steps(trainer):
                sync_step_metrics(trainer)

        def epoch_ended() -> None:
            sync_step_metrics(trainer)
            sync_epoch_metrics(trainer)

        def sync(value: Tensor, weight: float, group: Any = None, reduce_op: str = "mean") -> Tensor:
            mine = shard_contribution(reduce_op, value, weight)
            if reduce_op != "mean":
                return trainer.strategy.reduce(mine, group=group, reduce_op=reduce_op)
            both = torch.stack([mine, torch.as_tensor(weight).to(mine)])
            summed, weights = trainer.strategy.reduce(both, group=group, reduce_op="sum")
            return summed / weights

        lightning_internals.hook_into_metrics(
            trainer, batch_ended, epoch_ended, sync, weight=lambda: self.weighting.weight
        )

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Keeps the metrics as they are where the shard to come is only there to keep the workers in step."""
        if self.weighting.weight == 0:
            self.before = lightning_internals.metric_states(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """For checkpoints that are chosen by what a step logged."""
        if lightning_internals.checkpoint_at_this_step(trainer):
            sync_step_metrics(trainer)

    def on_validation_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """For callbacks that go, after the validation, by what the step before it logged."""
        sync_step_metrics(trainer)


class EpochSoFar(pl.Callback):
    """Makes what the values of an epoch have collected part of a checkpoint inside it: a resumed epoch goes on from it.

    Each rank goes on from its own; on another number of ranks, rank 0 from all. Two things are not kept: objects of
    torchmetrics, which begin anew in the rest of the epoch, and values that the rest of it does not log.
    """

    KEY = "ray_mnist_epoch_so_far"

    def __init__(self) -> None:
        self.before: dict[str, MetricPart] = {}

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Gathers; with an epoch's last batch there is nothing to go on from."""
        progress: Any = trainer.fit_loop.epoch_progress.current
        inside = progress.processed < progress.ready and not trainer.is_last_batch
        checkpoint[self.KEY] = gather(trainer, lightning_internals.collected(trainer) if inside else {})

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Takes this rank's."""
        ranks: list[dict[str, MetricPart]] = checkpoint.get(self.KEY, [])
        if len(ranks) == trainer.world_size:
            self.before = dict(ranks[trainer.global_rank])
        elif trainer.is_global_zero:
            keys = {key: None for parts in ranks for key in parts}
            self.before = {key: add_parts([parts[key] for parts in ranks if key in parts]) for key in keys}
        lightning_internals.collect_on(trainer, self.before)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Forgets it: a new epoch starts, which one that is resumed does not."""
        self.before.clear()


def add_parts(parts: list[MetricPart]) -> MetricPart:
    """What all ranks together have collected."""
    kind, first, _ = parts[0]
    reduce: Any = {"min": torch.amin, "max": torch.amax}.get(kind, torch.sum)
    value = reduce(torch.stack([value.double() for _, value, _ in parts]), 0).to(first.dtype)
    return kind, value, sum(weight for *_, weight in parts)


def rate_follows_steps(trainer: pl.Trainer) -> bool:
    """Whether a learning rate goes by what each step logs: it has to be the same on all workers."""
    return any(config.reduce_on_plateau and config.interval == "step" for config in trainer.lr_scheduler_configs)


def sync_epoch_metrics(trainer: pl.Trainer) -> None:
    """Puts the total over all workers where the epoch's value on this worker was."""
    parts = lightning_internals.epoch_parts(trainer)
    for key, value in reduce_across_ranks(parts, trainer.world_size).items():
        lightning_internals.set_epoch_value(trainer, key, value)


def sync_step_metrics(trainer: pl.Trainer) -> None:
    """Puts the whole batch's value where that of this worker's shard was, of the last training step."""
    parts = {
        key: (kind, shard_contribution(kind, value, weight), weight)
        for key, (kind, value, weight) in lightning_internals.step_parts(trainer).items()
    }
    for key, value in reduce_across_ranks(parts, trainer.world_size).items():
        lightning_internals.set_step_value(trainer, key, value)


def shard_contribution(kind: str, value: Tensor, weight: float) -> Tensor:
    """What the value of a shard adds to its batch's."""
    return value * {"mean": weight, "sum": float(weight > 0)}.get(kind, 1.0)


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
