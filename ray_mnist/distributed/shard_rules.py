"""The rules by which batches are shared out among the ranks. It imports no torch, which takes seconds."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ray_mnist.errors import RequestError

ShardBatches = Callable[[Iterator[Any]], Iterator["Shard"]]  # of batches that can be sliced and added
Share = Callable[[Any, int, int], Any]  # the part of a batch that is a rank's, of so many ranks
ALL = (0, None, 1)  # as a slice of batches


@dataclass
class Shard:
    """One worker's part of a global batch.

    `items` are a part of a `Batch`, or a list of samples where they come as a stream; `samples` of them count.
    `weight` is what makes the mean of the workers' mean losses the global batch's.
    """

    items: Any
    samples: int
    weight: float


def every_nth(batch: Any, rank: int, world_size: int) -> Any:
    """The samples of a batch that are this rank's."""
    return batch[rank::world_size]


def shard_training(batches: Iterable[Any], rank: int, world_size: int, share: Share = every_nth) -> Iterator[Shard]:
    """For training: a shard of each batch, and where a batch is too small for all, a sample that weighs nothing."""
    for batch in batches:
        mine = share(batch, rank, world_size)
        yield Shard(mine or batch[:1], len(mine), len(mine) * world_size / len(batch))


def shard_evaluation(batches: Iterable[Any], rank: int, world_size: int, share: Share = every_nth) -> Iterator[Shard]:
    """For evaluation: every sample once, and equally many shards on all ranks, none of them empty.

    Models whose metrics meet at every step would otherwise wait for a rank that has no batch left. Batches too small
    for all ranks are joined to their neighbours.

    Raises:
        RequestError: there are fewer samples than ranks.
    """
    ready: Any = []
    small: Any = []
    for batch in batches:
        small = small + batch if small else batch
        if len(small) >= world_size:
            if ready:
                yield from shard_training([ready], rank, world_size, share)
            ready, small = small, []
    ready = ready + small if ready and small else ready or small
    if 0 < len(ready) < world_size:
        raise RequestError(
            f"{len(ready)} evaluation samples are fewer than the {world_size} workers: use at most {len(ready)}."
        )
    if ready:
        yield from shard_training([ready], rank, world_size, share)


def round_robin(batches: Iterable[Any], batch_slice: tuple[int, int | None, int]) -> Iterator[Shard]:
    """For prediction: whole batches in turn, so that each prediction is what it would have been on one worker."""
    for batch in islice(batches, *batch_slice):
        yield Shard(batch, len(batch), 1.0)


def round_robin_in_step(batches: Iterable[Any], batch_slice: tuple[int, int | None, int]) -> Iterator[Shard]:
    """For prediction with a model of which each rank has a part: as many batches for each, which they need together.

    A rank that would have one less than others has the last batch of all in its place, which does not count.
    """
    rank, stop, world_size = batch_slice
    number, batch = -1, None
    for number, batch in enumerate(islice(batches, stop)):
        if number % world_size == rank:
            yield Shard(batch, len(batch), 1.0)
    if batch is not None and number % world_size < rank:
        yield Shard(batch, 0, 0.0)


def interleave(per_rank: Sequence[Sequence[Any]]) -> list[Any]:
    """Undoes `round_robin`: what each rank made of its batches, in the order of the batches."""
    return [rank[turn] for turn in range(max(map(len, per_rank))) for rank in per_rank if turn < len(rank)]
