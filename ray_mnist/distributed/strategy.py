"""What is added to a strategy, whoever made it, Lightning, Ray or the user: a subclass of its class takes it over."""

from collections import Counter
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.strategies import DDPStrategy, Strategy

from ray_mnist.distributed.loaders import shard_loader


def extend(strategy: Any, mixin: type[Any], **attributes: Any) -> None:
    """Makes `strategy`, with new `attributes`, one of a subclass of its class, in which `mixin` comes first."""
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
