"""Which sample goes to which worker, and when: shards the batches of any DataLoader.

A loader's batch is the *global* batch: every worker draws the same batches in the same order, and takes its shard of
each. What is drawn (the order, a sample's augmentation) is a function of the seed and the position in the
training alone.
"""

import random
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import Any

import numpy as np
import torch
from pytorch_lightning.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ray_mnist.distributed.inspection import digest, watching_for_the_rank
from ray_mnist.distributed.orders import draw_order, draws_at_once
from ray_mnist.distributed.shard_rules import ALL, Shard, ShardBatches, round_robin

SHARES_ITSELF_OUT = -1  # in place of a digest
EpochPass = tuple[int, int]  # the epoch, and how often the loader has been gone through in it before


def seed_generators(*state: object) -> None:
    """Makes what is drawn from here on, on the CPU, a function of `state` alone."""
    seed_cpu(zlib.crc32(repr(state).encode()))


def seed_cpu(seed: int) -> None:
    """Seeds torch's generator for the CPU, NumPy's and Python's with a whole number below 2**32."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


class Batch:
    """The indices of samples, a list or an array, and their positions in the epoch's order; it can be sliced."""

    def __init__(self, indices: Any, positions: range) -> None:
        self.indices, self.positions = indices, positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, part: slice) -> "Batch":
        return Batch(self.indices[part], self.positions[part])

    def __add__(self, following: "Batch") -> "Batch":
        together = [*plain(self.indices), *plain(following.indices)]
        return Batch(together, range(self.positions.start, following.positions.stop))


def plain(indices: Any) -> list[Any]:
    """A list of what a sampler handed out, with plain numbers where it was an array."""
    return indices.tolist() if isinstance(indices, torch.Tensor | np.ndarray) else list(indices)


@dataclass(eq=False)  # arrays cannot be compared as fields are
class SeededIndices(Sequence[Any]):
    """The indices of a shard, as its batch has them, with where in the training each of them is drawn."""

    indices: Any
    positions: range
    epoch_pass: EpochPass

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, place: Any) -> Any:
        return plain(self.indices)[place]

    def __iter__(self) -> Iterator[Any]:
        return iter(plain(self.indices))


class ShardedBatchSampler:
    """A batch sampler: this rank's shard of each batch of the user's sampler."""

    def __init__(self, sampler: Any, shard_batches: ShardBatches, seed: object) -> None:
        self.sampler, self.shard_batches, self.seed = sampler, shard_batches, seed
        self.epoch_pass: EpochPass = (0, 0)
        self.start = 0
        self.drawn: deque[Shard] = deque()
        self.first: Batch | None = None  # the first batch, of all ranks together
        self.parts = [sampler, getattr(sampler, "sampler", None)]
        own = {getattr(part, "generator", None) for part in self.parts}
        self.generators = [each for each in own if isinstance(each, torch.Generator)]
        self.draws_at_once = draws_at_once(sampler)

    def begin(self, epoch_pass: EpochPass, start: int) -> None:
        """Has it go through `epoch_pass` next, from batch `start` on."""
        self.epoch_pass, self.start = epoch_pass, start

    def __iter__(self) -> Iterator[SeededIndices]:
        self.drawn.clear()
        for shard in islice(self.shards(), self.start, None):
            self.drawn.append(shard)
            yield SeededIndices(shard.items.indices, shard.items.positions, self.epoch_pass)

    def shards(self) -> Iterator[Shard]:
        """All of them."""
        batches = self._batches()
        self.first = next(batches, None)
        return self.shard_batches(chain([] if self.first is None else [self.first], batches))

    @property
    def digest(self) -> int:
        """Of the first batch, before it is sharded; 0 if none was drawn."""
        return 0 if self.first is None else digest(plain(self.first.indices))

    def _batches(self) -> Iterator[Batch]:
        epoch, again = self.epoch_pass
        for part in self.parts:
            # Lightning does so too, but in a resumed epoch it may have asked for the first batch before.
            if set_epoch := getattr(part, "set_epoch", None):
                set_epoch(epoch)
        # The user's generators would go on where the last epoch ended, which a resumed run cannot know.
        # Of a seed only the lower 32 bits count.
        seeds = [(each.initial_seed() + epoch + (again << 20)) % 2**64 for each in self.generators]
        states = [torch.Generator().manual_seed(seed).get_state() for seed in seeds]
        return self._cut(states) if self.draws_at_once else self._draw(states)

    def _cut(self, states: list[torch.Tensor]) -> Iterator[Batch]:
        """Batches of an order that is drawn once, of which no more is looked at than what a rank takes."""
        with self._drawing(0, states):
            order = draw_order(self.sampler)
        for start in range(0, len(order), self.sampler.batch_size):
            part = order[start : start + self.sampler.batch_size]
            yield Batch(part, range(start, start + len(part)))

    def _draw(self, states: list[torch.Tensor]) -> Iterator[Batch]:
        """Batches of any sampler, which may draw anew for each."""
        batches: Iterator[Any] | None = None
        position = 0
        for number in count():
            with self._drawing(number, states):
                batches = iter(self.sampler) if batches is None else batches
                batch = next(batches, None)
            if batch is None:
                return
            indices = plain(batch)
            yield Batch(indices, range(position, position + len(indices)))
            position += len(indices)

    @contextmanager
    def _drawing(self, number: int, states: list[torch.Tensor]) -> Iterator[None]:
        """Makes what is drawn for batch `number` a function of its place alone, and leaves all generators as they were.

        `states`, those of the user's generators, go on from batch to batch.
        """
        with isolate_rng(include_cuda=False):
            seed_generators(self.seed, *self.epoch_pass, "indices", number)
            as_found = swap_states(self.generators, states)
            yield
            states[:] = swap_states(self.generators, as_found)


def swap_states(generators: list[torch.Generator], states: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gives the generators these states; those that they had until now."""
    had = [generator.get_state() for generator in generators]
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
    return had


class ShardedStream(IterableDataset[Shard]):
    """The user's stream of samples, cut into global batches and shared out, unless it shares itself out.

    It does so if it asks for the rank of its process on the way to its first batch.
    """

    def __init__(self, loader: DataLoader[Any], shard_batches: ShardBatches, seed: object) -> None:
        self.dataset, self.batch_size, self.drop_last = loader.dataset, loader.batch_size, loader.drop_last
        self.shard_batches, self.seed = shard_batches, seed
        # A persistent loader worker has a copy of all but these.
        self.epoch_pass = torch.zeros(2, dtype=torch.int64).share_memory_()
        self.first = torch.zeros(1, dtype=torch.int64).share_memory_()
        self.one_of_several = torch.distributed.is_initialized()

    @property
    def digest(self) -> int:
        """Of the first batch, before it is sharded; SHARES_ITSELF_OUT where that is not done here."""
        return int(self.first)

    def begin(self, epoch_pass: EpochPass) -> None:
        """Has it go through `epoch_pass` next."""
        self.epoch_pass[:] = torch.tensor(epoch_pass)

    def __iter__(self) -> Iterator[Shard]:
        batches = self._batches(self.epoch_pass.tolist())
        if not self.one_of_several:
            return self.shard_batches(batches)
        with watching_for_the_rank() as asked:
            first = list(islice(batches, 1))
        worker = get_worker_info()
        if worker is None or worker.id == 0:  # whose batch is the loader's first
            self.first.fill_(SHARES_ITSELF_OUT if asked else digest(first))
        batches = chain(first, batches)
        return round_robin(batches, ALL) if asked else self.shard_batches(batches)

    def _batches(self, epoch_pass: list[int]) -> Iterator[list[Any]]:
        worker = get_worker_info()
        samples: Iterator[Any] | None = None
        for number in count():
            # What the user's collate_fn draws follows on this.
            seed_generators(self.seed, *epoch_pass, worker.id if worker else 0, number)
            samples = iter(self.dataset) if samples is None else samples
            batch = list(islice(samples, self.batch_size))
            if not batch or (self.drop_last and len(batch) < (self.batch_size or 1)):
                return
            yield batch


@dataclass
class CollateShard:
    """Collates the samples of a shard as the user's loader does, and keeps what else there is to know of it."""

    collate: Callable[[list[Any]], Any]

    def __call__(self, shard: Shard) -> tuple[int, float, Any]:
        return shard.samples, shard.weight, self.collate(shard.items)


@dataclass
class WorkerInit:
    """Begins a loader worker with the user's function, which finds the user's data set where it looks for it."""

    start: Callable[[int], None] | None

    def __call__(self, worker_id: int) -> None:
        worker: Any = get_worker_info()
        object.__setattr__(worker, "dataset", worker.dataset.dataset)
        if self.start is not None:
            self.start(worker_id)
