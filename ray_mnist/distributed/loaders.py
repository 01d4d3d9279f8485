"""The loaders that Lightning trains and evaluates with: the user's, sharded among the workers."""

import copy
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain, count, islice
from typing import Any

from lightning_fabric.utilities.data import sized_len
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities import CombinedLoader
from pytorch_lightning.utilities.data import extract_batch_size
from torch.utils.data import DataLoader, IterableDataset, default_convert

from ray_mnist.distributed.samples import SeededDataset, collates_rows
from ray_mnist.distributed.shard_rules import ALL, ShardBatches
from ray_mnist.distributed.sharding import (
    SHARES_ITSELF_OUT,
    CollateShard,
    EpochPass,
    ShardedBatchSampler,
    ShardedStream,
    WorkerInit,
    seed_generators,
)
from ray_mnist.errors import RequestError
from ray_mnist.lightning_internals import record_like

BatchSlice = tuple[int, int | None, int]


class ResumableLoader:
    """A loader whose place in the training is Lightning's: it begins where the run stands, in a resumed epoch too.

    What is drawn on the way to a batch is a function of the seed and the batch's place in the training. Attributes
    that are not its own are those of the user's `loader`.

    Args:
        loader: any iterable over batches.
        seed: of all that is drawn.
        position: gives the epoch, counted from 0, and the batch to begin with.
        number: tells several loaders of a model apart, which then do not draw the same.
        training: whether it is trained on. Lightning then goes through it again within an epoch where another loader
            is longer.
        weighing: whether `weights` are kept, for a LossWeighting.
        batch_slice: which of the batches are handed out, as (first, stop, step).
    """

    def __init__(
        self,
        loader: Any,
        seed: int,
        position: Callable[[], tuple[int, int]],
        number: int = 0,
        training: bool = False,
        weighing: bool = False,
        batch_slice: BatchSlice = ALL,
    ) -> None:
        self.loader, self.seed, self.position, self.batch_slice = loader, seed, position, batch_slice
        self.training, self.weighing, self.draws = training, weighing, (seed, number)
        self.source = loader  # what is iterated over
        self.epoch_pass: EpochPass = (0, 0)
        self.start = 0  # the batch that the next time through begins with
        self.ended = False
        self.samples = 0  # handed out so far; of an evaluation, those of this one
        self.epoch_samples = deque([0], 2)  # of the epoch, resumed or not, up to each of the last two batches
        self.waited = 0.0  # seconds for the user's loader
        self.repeated = 0  # batches of a prediction that do not count
        self.batch = 0  # the next one's number in the epoch
        self.weights: dict[int, float] = {}  # of the epoch's batches not yet trained on, by their numbers
        self.seeds_itself = False  # whether all that draws on the way to a batch is seeded where it draws

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # which a copy in the making does not have yet
            raise AttributeError(name)
        return getattr(self.loader, name)

    @property
    def _iterator(self) -> Any:
        """The persistent loader workers, which Lightning ends when it is done with them."""
        return getattr(self.source, "_iterator", None)

    @_iterator.setter
    def _iterator(self, iterator: Any) -> None:
        if isinstance(self.source, DataLoader):
            self.source._iterator = iterator

    def __len__(self) -> int:
        return sliced_length(self.batch_slice, len(self.loader))

    def __iter__(self) -> Iterator[Any]:
        epoch, batch = self.position()
        if not self.training:
            self.samples = self.repeated = 0
        if not (self.training and self.ended and epoch == self.epoch_pass[0]):
            self.epoch_pass, self.start, self.batch = (epoch, 0), batch, batch
            self.epoch_samples = deque([0], 2)
        self.ended = False
        seed_generators(self.draws, *self.epoch_pass)
        first, batches = self._begin()
        for number in count(first):
            if not self.seeds_itself:
                seed_generators(self.draws, *self.epoch_pass, number)
            began = time.perf_counter()
            found = next(batches, None)
            self.waited += time.perf_counter() - began
            if found is None:
                break
            samples, weight, batch = found
            if number < self.start:
                self.epoch_samples[-1] += samples
                continue
            self.epoch_samples.append(self.epoch_samples[-1] + samples)
            self.samples += samples
            self.repeated += not weight
            if self.weighing:
                self.weights[self.batch] = weight
            self.batch += 1
            yield batch
        self._end()

    def _begin(self) -> tuple[int, Iterator[tuple[int, float, Any]]]:
        """The batches, with the number of the first of them; those before `start` do not count."""
        return 0, ((batch_size_of(batch), 1.0, batch) for batch in islice(self.source, *self.batch_slice))

    def _end(self) -> None:
        """Gets ready for another time through in this epoch, of which a resumed run has some behind it."""
        size = sized_len(self) if self.start else None
        behind, self.start = divmod(self.start - size, size) if size and self.start > size else (0, 0)
        self.epoch_pass, self.ended = (self.epoch_pass[0], self.epoch_pass[1] + 1 + behind), True

    def close(self) -> None:
        """Ends what it has in other processes, on all ranks together: nobody iterates any more."""

    def state_dict(self) -> dict[str, Any]:
        """What cuts an epoch up into batches. Where in the epoch the run stands is for Lightning to keep."""
        return {"batch_size": getattr(self.loader, "batch_size", None), "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compares.

        Raises:
            RequestError: the run resumes inside an epoch that it would now cut up differently.
        """
        for name, now in self.state_dict().items():
            if now != state.get(name, now) and self.position()[1]:
                raise RequestError(
                    f"The checkpoint was taken inside an epoch with {name} {state[name]}, which {name} {now} would "
                    "cut up differently: resume with the same value."
                )


class ShardedLoader(ResumableLoader):
    """Hands out this rank's shard of each batch of a DataLoader.

    Args:
        shard_batches: which part of the batches is this rank's.
        length: how many shards there are where the user's loader has so many batches; None has them counted.
        **options: as for `ResumableLoader`.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        seed: int,
        position: Callable[[], tuple[int, int]],
        shard_batches: ShardBatches,
        length: Callable[[int], int] | None,
        **options: Any,
    ) -> None:
        super().__init__(loader, seed, position, **options)
        self.length = length
        # A copy has the user's class and arguments; what guards its attributes is meant for a loader in use.
        self.source = copy.copy(loader)
        self.source.worker_init_fn = WorkerInit(loader.worker_init_fn)
        # Shares and batches go in step, and the copy has loader workers of its own.
        vars(self.source).update(in_order=True, _iterator=None)
        self.shards: ShardedBatchSampler | ShardedStream
        if isinstance(loader.dataset, IterableDataset):
            self.shards = ShardedStream(loader, shard_batches, self.draws)
            vars(self.source).update(dataset=self.shards, batch_size=None, batch_sampler=None)
            self.source.collate_fn = CollateShard(loader.collate_fn)
        else:
            own: Any = loader.batch_sampler
            self.shards = ShardedBatchSampler(own, shard_batches, self.draws)
            sampler = record_like(own, self.shards)
            # By place, of samplers whose indices are known to be whole numbers.
            collates = self.shards.draws_at_once and collates_rows(loader)
            dataset = SeededDataset(loader.dataset, self.draws, collates)
            vars(self.source).update(dataset=dataset, batch_sampler=sampler)
            if collates:
                self.source.collate_fn = default_convert  # the batch as it is
            self.batch_sampler = sampler
            in_this_process = type(loader).__iter__ is DataLoader.__iter__ and not loader.num_workers
            self.seeds_itself = in_this_process and self.shards.draws_at_once

    def __len__(self) -> int:
        size = len(self.loader)  # a TypeError for one that is without end
        if isinstance(self.shards, ShardedStream) and self.batch_slice != ALL:
            raise TypeError("whether all batches of a stream are this rank's is known once it has begun")
        if self.length:
            return self.length(size)
        assert isinstance(self.shards, ShardedBatchSampler)
        return sum(1 for _ in self.shards.shards())

    def _begin(self) -> tuple[int, Iterator[tuple[int, float, Any]]]:
        if isinstance(self.shards, ShardedStream):
            self.shards.begin(self.epoch_pass)
            return 0, self._slice(iter(self.source))
        self.shards.begin(self.epoch_pass, self.start)
        drawn = self.shards.drawn
        # zip would take a batch's shard before the batch, when it may not have been drawn.
        batches = ((shard.samples, shard.weight, batch) for batch in iter(self.source) for shard in [drawn.popleft()])
        return self.start, batches

    def _slice(self, batches: Iterator[Any]) -> Iterator[Any]:
        """All batches of a stream that shares itself out, which is known with its first."""
        first = list(islice(batches, 1))
        whole = self.shards.digest == SHARES_ITSELF_OUT
        _, stop, _ = self.batch_slice
        yield from islice(chain(first, batches), *((0, stop, 1) if whole else self.batch_slice))


def sliced_length(batch_slice: BatchSlice, batches: int) -> int:
    """How many of so many batches are handed out."""
    return len(range(*slice(*batch_slice).indices(batches)))


def batch_size_of(batch: Any) -> int:
    """How many samples are in a batch; 0 where Lightning cannot tell."""
    try:
        return extract_batch_size(batch)
    except MisconfigurationException:
        return 0


def resumable_loaders(loaders: Any) -> list[ResumableLoader]:
    """Those in one of the trainer's `train_dataloader`, `val_dataloaders` and so on."""
    return [loader for loader in CombinedLoader(loaders).flattened if isinstance(loader, ResumableLoader)]


def samples_seen(loaders: Any) -> int:
    """How many samples this rank has had of them: in the training so far, or in this evaluation."""
    return sum(loader.samples for loader in resumable_loaders(loaders))


def epoch_samples(loaders: Any, batches: int) -> int:
    """How many samples of them this rank has trained on in the epoch, of which it has trained on so many batches.

    Lightning may have fetched one more. Where the run was resumed inside the epoch, the samples before that count if
    the data set is a stream.
    """
    return sum(loader.epoch_samples[-1 - (loader.batch > batches)] for loader in resumable_loaders(loaders))


def seconds_waited(loaders: Any) -> float:
    """How long this rank has waited for batches of them so far."""
    return sum(loader.waited for loader in resumable_loaders(loaders))
