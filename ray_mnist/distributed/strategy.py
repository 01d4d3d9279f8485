"""What is added to a strategy, whoever made it, Lightning, Ray or the user: a subclass of its class takes it over."""

import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.tensor import DTensor

from ray_mnist.distributed.loaders import ResumableLoader
from ray_mnist.distributed.shard_loader import shard_loader
from ray_mnist.distributed.weighting import LossWeighting
from ray_mnist.errors import RequestError
from ray_mnist.lightning_internals import is_sharded
from ray_mnist.run.folder import CHECKPOINT
from ray_mnist.run.scratch import fetched, scratch_path
from ray_mnist.run.shards import check_shards, put_together
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
    in_use: dict[Any, ResumableLoader]

    def process_dataloader(self, dataloader: object) -> object:
        """Shards it."""
        assert self.lightning_module is not None
        trainer: pl.Trainer = self.lightning_module.trainer
        where = trainer.state.stage, trainer.current_epoch  # so that reloaded loaders have the numbers they had
        number = self.loaders_seen[where]
        self.loaders_seen[where] += 1
        shard = shard_loader(trainer, dataloader, self.seed, self.presharded, self.limit, number)
        place = trainer.state.stage, number
        if place in self.in_use:
            self.in_use[place].close()
        self.in_use[place] = shard
        return super().process_dataloader(shard)

    def teardown(self) -> None:
        """Closes the loaders."""
        while self.in_use:
            self.in_use.popitem()[1].close()
        super().teardown()


def shard_loaders(trainer: pl.Trainer, seed: int, presharded: bool) -> None:
    """Has each of the trainer's loaders sharded among its workers, or left `presharded` but for where it begins."""
    limit, trainer.limit_predict_batches = trainer.limit_predict_batches, 1.0
    extend(
        trainer.strategy,
        ShardsLoaders,
        seed=seed,
        presharded=presharded,
        limit=limit,
        loaders_seen=Counter(),
        in_use={},
    )


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


class WhollySharded(ModelParallelStrategy):
    """Trains on the device that Ray gave this rank, and nothing that `fully_shard` has left out.

    Each rank would train that on its own shard of the data, and take it elsewhere than the others do.
    """

    ray_device: torch.device

    @property
    def root_device(self) -> torch.device:
        """Where this rank trains."""
        return self.ray_device

    def setup(self, trainer: pl.Trainer) -> None:
        """Looks once the model is sharded. Raises RequestError."""
        super().setup(trainer)
        assert self.lightning_module is not None
        weights = self.lightning_module.named_parameters()
        apart = [name for name, weight in weights if weight.requires_grad and not isinstance(weight, DTensor)]
        if apart and self.world_size > 1:
            raise RequestError(
                f"Nothing shards {', '.join(apart[:5])}{' and others' * (len(apart) > 5)}, which each worker would "
                "train on its own: have configure_model call torch's fully_shard on all of the model."
            )


class WeighsLosses(Strategy):
    """Shows what each training step returns to a LossWeighting, before there are gradients of it."""

    weighting: LossWeighting

    def training_step(self, *arguments: Any, **named: Any) -> Any:
        """Does the step."""
        assert self.lightning_module is not None
        return self.weighting.weigh(self.lightning_module.trainer, super().training_step(*arguments, **named))


class SavesOwnPart(Strategy):
    """Can have this rank write its part of a checkpoint in shards to a path of its own, instead of rank 0's."""

    own_path: Path | None = None

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """What rank `src` has, but for that path."""
        if isinstance(obj, Path) and obj == self.own_path:
            return obj
        return super().broadcast(obj, src)  # type: ignore[safe-super]


class LoadsOncePerNode(Strategy):
    """Has a checkpoint in an object store downloaded once on each node, and there only while it is being loaded.

    One in shards is put together there for a strategy that does not load shards.
    """

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads it, from a path or a URI. Raises RequestError if `weights_only` keeps something out."""
        plain = weights_only is not False
        try:
            with ExitStack() as copies:
                path = copies.enter_context(on_each_node(self, str(checkpoint_path)))
                if os.path.isdir(path) and not is_sharded(self):
                    put = partial(put_together, path, plain)
                    path = copies.enter_context(once_per_node(self, put, CHECKPOINT))
                elif os.path.isdir(path) and plain:
                    check_shards(path)
                return super().load_checkpoint(path, weights_only)
        except pickle.UnpicklingError as error:
            raise refused(str(checkpoint_path)) from error


@contextmanager
def on_each_node(strategy: Any, location: str) -> Iterator[str]:
    """The file or folder at a path or URI as a path that is the same on all nodes, for the time of the `with`.

    FSDP needs it to be the same.
    """
    if "://" not in location:
        yield location
    else:
        fs, path = pyarrow.fs.FileSystem.from_uri(location)
        with once_per_node(strategy, partial(fetched, fs, path), os.path.basename(path)) as copy:
            yield copy


@contextmanager
def once_per_node(strategy: Any, make: Callable[..., AbstractContextManager[str]], name: str) -> Iterator[str]:
    """The path of what the first rank of each node has `make(folder=…)` make there, `name` in a scratch folder.

    The others wait for as long as a collective may take.
    """
    folder = strategy.broadcast(scratch_path())
    with ExitStack() as made:
        if strategy.local_rank == 0:
            made.enter_context(make(folder=folder))
        strategy.barrier()
        yield os.path.join(folder, name)
        strategy.barrier()  # the others may be reading still
