"""What each rank has of a loader: by which rule it is shared out, or that it cannot be."""

from functools import partial
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from ray_mnist.distributed.loaders import ResumableLoader, ShardedLoader, sliced_length
from ray_mnist.distributed.ray_data import RayDataLoader, ShardedRayData, ShardsOfRank
from ray_mnist.distributed.ray_data_streams import neighbours
from ray_mnist.distributed.shard_rules import (
    ALL,
    ShardBatches,
    round_robin,
    round_robin_in_step,
    shard_evaluation,
    shard_training,
)
from ray_mnist.errors import RequestError
from ray_mnist.lightning_internals import is_sharded


def shard_loader(
    trainer: pl.Trainer, loader: Any, seed: int, presharded: bool, limit: int | float, number: int = 0
) -> ResumableLoader:
    """What this rank has of `loader`, the `number`th of its kind.

    Of a model in shards all ranks have equally many batches, in prediction too.

    Raises:
        RequestError: it cannot be shared out.
    """
    rank, world_size, training = trainer.global_rank, trainer.world_size, trainer.training
    if isinstance(loader, ResumableLoader):
        loader = loader.loader  # of an earlier trainer, in a CombinedLoader

    def position() -> tuple[int, int]:
        return training_position(trainer) if training else (trainer.current_epoch, 0)

    options: dict[str, Any] = {"seed": seed, "position": position, "number": number, "training": training}
    options["weighing"] = training and world_size > 1
    stop = limit_of(limit, loader) if trainer.predicting else None
    if presharded or has_distributed_sampler(loader):
        return ResumableLoader(loader, batch_slice=(0, stop, 1), **options)  # the user's own code shards it
    if isinstance(loader, RayDataLoader):
        return shard_ray_data(trainer, loader, stop, options)
    if trainer.predicting:
        return shard_prediction(trainer, loader, stop, options)
    if not is_batched(loader):
        if world_size == 1:
            return ResumableLoader(loader, **options)
        raise RequestError(
            f"{describe(loader)} hands out finished batches, which {world_size} workers cannot share: use a DataLoader "
            "with a batch_size, or share the data out yourself and give Trainer use_distributed_sampler=False."
        )
    stream = is_stream(loader)
    if training and not stream and loader.batch_size:
        check_batch_size(loader.batch_size, world_size)
    shard_batches = partial(shard_training if training else shard_evaluation, rank=rank, world_size=world_size)
    return ShardedLoader(
        loader, shard_batches=shard_batches, length=int if training or stream or world_size == 1 else None, **options
    )


def shard_prediction(trainer: pl.Trainer, loader: Any, stop: int | None, options: dict[str, Any]) -> ResumableLoader:
    """The same in a prediction, which ends with batch `stop`: the ranks take turns."""
    turns = (trainer.global_rank, stop, trainer.world_size)
    batched, stream = is_batched(loader), is_stream(loader)
    if in_step(trainer):
        if not batched or stream:
            raise RequestError(
                f"{describe(loader)} cannot be shared out batch by batch for a model in shards, which all workers "
                "need together: predict from a DataLoader over a data set that is no stream."
            )
        length = partial(sliced_length, (0, *turns[1:]))
        return ShardedLoader(
            loader, shard_batches=partial(round_robin_in_step, batch_slice=turns), length=length, **options
        )
    if not batched:
        return ResumableLoader(loader, batch_slice=turns, **options)
    # Those of a stream can come from several processes, and take turns only once they are here.
    here, there = (turns, ALL) if stream else (ALL, turns)
    length = partial(sliced_length, turns)
    return ShardedLoader(
        loader, shard_batches=partial(round_robin, batch_slice=there), length=length, batch_slice=here, **options
    )


def shard_ray_data(
    trainer: pl.Trainer, loader: RayDataLoader, stop: int | None, options: dict[str, Any]
) -> ShardedRayData:
    """The same of a Ray Data set; a prediction ends with batch `stop`. To be called on all ranks together."""
    ranks, world_size = range(trainer.world_size), trainer.world_size
    shard_batches: list[ShardBatches]
    if trainer.predicting:
        turns = round_robin_in_step if in_step(trainer) else round_robin
        shard_batches = [partial(turns, batch_slice=(rank, stop, world_size)) for rank in ranks]
    else:
        if trainer.training:
            check_batch_size(loader.batch_size, world_size)
        rule = shard_training if trainer.training else shard_evaluation
        shard_batches = [partial(rule, rank=rank, world_size=world_size, share=neighbours) for rank in ranks]
    shards = ShardsOfRank(loader, shard_batches, trainer.global_rank, trainer.strategy.broadcast)
    return ShardedRayData(loader, shards=shards, **options)


def is_batched(loader: Any) -> bool:
    """Whether it is a DataLoader that makes batches of samples, and not one of finished batches."""
    return isinstance(loader, DataLoader) and (loader.batch_sampler is not None or loader.batch_size is not None)


def is_stream(loader: Any) -> bool:
    """Whether it makes batches of a stream of samples."""
    return is_batched(loader) and isinstance(loader.dataset, IterableDataset)


def in_step(trainer: pl.Trainer) -> bool:
    """Whether all ranks need each batch together, since each has a part of the model."""
    return is_sharded(trainer.strategy) and trainer.world_size > 1


def check_batch_size(batch_size: int, world_size: int) -> None:
    """Raises RequestError where a batch has fewer samples than there are workers."""
    if batch_size < world_size:
        raise RequestError(
            f"batch_size={batch_size} is the batch over all workers, and {world_size} workers cannot share it: "
            f"use at least {world_size}."
        )


def has_distributed_sampler(loader: Any) -> bool:
    """Whether the user's own sampler gives each rank a shard."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    return any(isinstance(getattr(each, "sampler", None), DistributedSampler) for each in (loader, batch_sampler))


def limit_of(limit: int | float, loader: Any) -> int | None:
    """So many batches are `limit`, a number of them or a part of the loader's; None where that is all of them."""
    if isinstance(limit, int):
        return limit
    return None if limit == 1.0 else int(len(loader) * limit)


def describe(loader: Any) -> str:
    """Such as `A DataLoader with batch_size=None`."""
    return f"A {type(loader).__name__}{' with batch_size=None' if isinstance(loader, DataLoader) else ''}"


def training_position(trainer: pl.Trainer) -> tuple[int, int]:
    """The epoch, counted from 0, and the batch that the run stands at."""
    epoch: Any = trainer.fit_loop.epoch_progress.current
    batch: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return epoch.processed, batch.processed if epoch.ready > epoch.processed else 0
