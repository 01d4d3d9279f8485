"""Has the ranks compare what they draw from the loaders, before they train on it."""

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback

from ray_mnist.distributed.loaders import ShardedLoader, resumable_loaders
from ray_mnist.distributed.sharding import ShardedStream
from ray_mnist.errors import RequestError, TrainingError


class SameDraws(Callback):
    """Compares the first batches that the ranks draw from a loader, at the start of each epoch and evaluation.

    Each rank takes its shard of what it draws; where they draw different things, samples would be lost and others
    counted twice, in silence.
    """

    due = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Also where a run resumes inside an epoch and no epoch starts."""
        self.due = True

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first batch is drawn once the epoch has started."""
        self.due = True

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Compares, at the first batch."""
        if self.due:
            compare_draws(trainer, trainer.train_dataloader)
        self.due = False

    def on_validation_batch_start(self, trainer: pl.Trainer, _: Any, __: Any, batch_idx: int, *___: Any) -> None:
        """Compares, at a loader's first batch."""
        if batch_idx == 0:
            compare_draws(trainer, trainer.val_dataloaders)

    def on_test_batch_start(self, trainer: pl.Trainer, _: Any, __: Any, batch_idx: int, *___: Any) -> None:
        """Compares, at a loader's first batch."""
        if batch_idx == 0:
            compare_draws(trainer, trainer.test_dataloaders)


def compare_draws(trainer: pl.Trainer, loaders: Any) -> None:
    """To be called on all ranks together.

    Raises:
        RequestError: they draw different batches from one of the loaders.
        TrainingError: they do so only after the training has begun.
    """
    if trainer.world_size == 1:
        return
    sharded = [loader for loader in resumable_loaders(loaders) if isinstance(loader, ShardedLoader)]
    found: list[list[int]] = [[] for _ in range(trainer.world_size)]
    torch.distributed.all_gather_object(found, [loader.shards.digest for loader in sharded])
    for loader, digests in zip(sharded, zip(*found, strict=True), strict=True):
        if len({*digests} - {0}) > 1:
            raise (TrainingError if trainer.global_step else RequestError)(different_draws(loader))


def different_draws(loader: ShardedLoader) -> str:
    """What is wrong, and the way out."""
    what, ask = f"batches with a {type(loader.loader.sampler).__name__}", ""
    if isinstance(loader.shards, ShardedStream):
        what = f"samples from the stream {type(loader.dataset).__name__}"
        ask = "have it ask torch.distributed for its rank, or "
    return (
        f"The workers draw different {what}: give what shuffles it a seed, the same on all of them; where it shares "
        f"the data out itself, {ask}give Trainer use_distributed_sampler=False."
    )
