"""What is added to a strategy, whoever made it, Lightning, Ray or the user: a subclass of its class takes it over."""

import os
import pickle
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import pyarrow.fs
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, Strategy

from ray_mnist.distributed.loaders import shard_loader
from ray_mnist.distributed.weighting import LossWeighting
from ray_mnist.run.folder import fetched, scratch_path
from ray_mnist.run.trust import refused


def extend(strategy: Any, mixin: type[Any], **attributes: Any) -> None:
    """Makes `strategy`, with new `attributes`, one of a subclass of its class, in which `mixin` comes first.

    Python allows it where the first bases of its class lead to Lightning's Strategy.
    """
    found = type(strategy)
    strategy.__class__ = type(found.__name__, (mixin, found), {})
    vars(strategy).update(attributes)


class ShardsLoaders(Strategy):
    """Hands the trainer its shard of each loader, or one that is `presharded` from where the run stands.

    The `limit` on the batches of a prediction is for all ranks together.
    """

    seed: int
    presharded: bool
    limit: int | float
    loaders_seen: Counter[Any]

    def process_dataloader(self, dataloader: object) -> object:
        """Shards it."""
        assert self.lightning_module is not None
        trainer: pl.Trainer = self.lightning_module.trainer
        where = trainer.state.stage, trainer.current_epoch  # so that reloaded loaders have the numbers they had
        number = self.loaders_seen[where]
        self.loaders_seen[where] += 1
        shard = shard_loader(trainer, dataloader, self.seed, self.presharded, self.limit, number)
        return super().process_dataloader(shard)


def shard_loaders(trainer: pl.Trainer, seed: int, presharded: bool) -> None:
    """Has each of the trainer's loaders sharded among its workers, or left `presharded` but for where it begins."""
    limit, trainer.limit_predict_batches = trainer.limit_predict_batches, 1.0
    extend(trainer.strategy, ShardsLoaders, seed=seed, presharded=presharded, limit=limit, loaders_seen=Counter())


class StaysOnDevice(DDPStrategy):
    """Asks for its device once: Ray's strategies ask Ray, at each of the many times that Lightning wants to know."""

    @cached_property
    def root_device(self) -> torch.device:
        """Where this rank trains."""
        return super().root_device


class FollowsFreezing(DDPStrategy):
    """Begins DDP anew at a batch before which weights were frozen or unfrozen.

    DDP waits for the gradients of the weights that it began with, and would leave those of others apart.
    """

    known: frozenset[str] = frozenset()

    def _trainable(self) -> frozenset[str]:
        assert self.lightning_module is not None
        return frozenset(name for name, weight in self.lightning_module.named_parameters() if weight.requires_grad)

    def configure_ddp(self) -> None:
        """Remembers what it begins with."""
        super().configure_ddp()
        self.known = self._trainable()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Compares."""
        super().on_train_batch_start(batch, batch_idx)
        if self.known != (now := self._trainable()) and now:
            self.model = self.lightning_module
            self.configure_ddp()


class WeighsLosses(Strategy):
    """Shows what each training step returns to a LossWeighting, before there are gradients of it."""

    weighting: LossWeighting

    def training_step(self, *arguments: Any, **named: Any) -> Any:
        """Does the step."""
        assert self.lightning_module is not None
        return self.weighting.weigh(self.lightning_module.trainer, super().training_step(*arguments, **named))


class LoadsOncePerNode(Strategy):
    """Has a checkpoint in an object store downloaded once on each node, and there only while it is being loaded."""

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads it, from a path or a URI. Raises RequestError if `weights_only` keeps something out."""
        with on_each_node(self, str(checkpoint_path)) as path:
            try:
                return super().load_checkpoint(path, weights_only)
            except pickle.UnpicklingError as error:
                raise refused(str(checkpoint_path)) from error


@contextmanager
def on_each_node(strategy: Any, location: str) -> Iterator[str]:
    """The file at a path or URI as a path that is the same on all nodes, as FSDP needs it, for the time of the `with`.

    The first rank of each node downloads; the others wait for as long as a collective may take.
    """
    if "://" not in location:
        yield location
        return
    fs, path = pyarrow.fs.FileSystem.from_uri(location)
    folder = strategy.broadcast(scratch_path())
    with ExitStack() as copy:
        if strategy.local_rank == 0:
            copy.enter_context(fetched(fs, path, folder))
        strategy.barrier()
        yield os.path.join(folder, os.path.basename(path))
        strategy.barrier()  # the others may be reading still
