"""Which sample goes to which worker, and when: shares out the batches of any DataLoader.

A loader's batch is the *global* batch: every worker draws the same batches in the same order, and takes its share of
each. What is drawn (the order, a sample's augmentation) is a function of the seed and the place in the training alone.
"""

import random
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from pytorch_lightning.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, get_worker_info

from ray_mnist.errors import RequestError

Deal = Callable[[Iterator[list[Any]]], Iterator["Share"]]
Place = tuple[int, int]  # the epoch, and how often the loader has been gone through in it before


@dataclass
class Share:
    """One worker's part of a global batch.

    `items` are pairs of index and position in the epoch, or the samples themselves where they come as a stream.

    `samples` of the items count. `weight` is what makes the mean of the workers' mean losses the global batch's.
    """

    items: list[Any]
    samples: int
    weight: float


def split(batches: Iterable[list[Any]], rank: int, world_size: int) -> Iterator[Share]:
    """For training: a share of each batch, and where a batch is too small for all, a sample that weighs nothing."""
    for batch in batches:
        mine = batch[rank::world_size]
        yield Share(mine or batch[:1], len(mine), len(mine) * world_size / len(batch))


def split_all(batches: Iterable[list[Any]], rank: int, world_size: int) -> Iterator[Share]:
    """For evaluation: every sample once, and equally many shares on all ranks, none of them empty.

    Models whose metrics meet at every step would otherwise wait for a rank that has no batch left. Batches too small
    for all ranks are joined to their neighbours.

    Raises:
        RequestError: there are fewer samples than ranks.
    """
    ready: list[Any] = []
    small: list[Any] = []
    for batch in batches:
        small = small + batch
        if len(small) >= world_size:
            if ready:
                yield from split([ready], rank, world_size)
            ready, small = small, []
    ready = ready + small
    if 0 < len(ready) < world_size:
        raise RequestError(
            f"{len(ready)} evaluation samples are fewer than the {world_size} workers: use at most {len(ready)}."
        )
    if ready:
        yield from split([ready], rank, world_size)


def deal_out(batches: Iterable[list[Any]], turns: tuple[int, int | None, int]) -> Iterator[Share]:
    """For prediction: whole batches in turns, so that each prediction is what it would have been on one worker."""
    for batch in islice(batches, *turns):
        yield Share(batch, len(batch), 1.0)


def in_turns(dealt: Sequence[Sequence[Any]]) -> list[Any]:
    """Undoes `deal_out`: what each rank made of its batches, in the order of the batches."""
    return [rank[turn] for turn in range(max(map(len, dealt))) for rank in dealt if turn < len(rank)]


def draw_from(*state: object) -> None:
    """Makes what is drawn from here on, on the CPU, a function of `state` alone."""
    seed = zlib.crc32(repr(state).encode())
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


class Indices(list[Any]):
    """The indices of a share, with where in the training each of them is drawn."""

    def __init__(self, items: Sequence[tuple[Any, int]], place: Place) -> None:
        super().__init__(index for index, _ in items)
        self.places = [(*place, "sample", position) for _, position in items]


class IndexShares:
    """A batch sampler: this rank's share of each batch of the user's sampler."""

    def __init__(self, sampler: Iterable[Any], deal: Deal, seed: object) -> None:
        self.sampler, self.deal, self.seed = sampler, deal, seed
        self.place: Place = (0, 0)
        self.start = 0
        self.drawn: deque[Share] = deque()
        self.parts = [sampler, getattr(sampler, "sampler", None)]
        own = {getattr(part, "generator", None) for part in self.parts}
        self.generators = [each for each in own if isinstance(each, torch.Generator)]

    def begin(self, place: Place, start: int) -> None:
        """Has it go through `place` next, from batch `start` on."""
        self.place, self.start = place, start

    def __iter__(self) -> Iterator[Indices]:
        self.drawn.clear()
        for share in islice(self.shares(), self.start, None):
            self.drawn.append(share)
            yield Indices(share.items, self.place)

    def shares(self) -> Iterator[Share]:
        """All of them."""
        return self.deal(self._batches())

    def _batches(self) -> Iterator[list[Any]]:
        epoch, again = self.place
        for part in self.parts:
            # Lightning does so too, but in a resumed epoch it may have asked for the first batch before.
            if set_epoch := getattr(part, "set_epoch", None):
                set_epoch(epoch)
        # The user's generators would go on where the last epoch ended, which a resumed run cannot know.
        # Of a seed only the lower 32 bits count.
        seeds = [(each.initial_seed() + epoch + (again << 20)) % 2**64 for each in self.generators]
        states = [torch.Generator().manual_seed(seed).get_state() for seed in seeds]
        batches: Iterator[Any] | None = None
        position = 0
        for number in count():
            with isolate_rng(include_cuda=False):
                draw_from(self.seed, *self.place, "indices", number)
                as_found = swap(self.generators, states)
                batches = iter(self.sampler) if batches is None else batches
                batch = next(batches, None)
                states = swap(self.generators, as_found)
            if batch is None:
                return
            indices = batch.tolist() if isinstance(batch, torch.Tensor | np.ndarray) else list(batch)
            yield [(index, position + i) for i, index in enumerate(indices)]
            position += len(indices)


def swap(generators: list[torch.Generator], states: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gives the generators these states; those that they had until now."""
    had = [generator.get_state() for generator in generators]
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
    return had


class Drawn(Dataset[Any]):
    """The user's map-style data set; what a sample draws is a function of the seed and its place in the training.

    Where the data set fetches many samples at once, it is what they draw together.
    """

    def __init__(self, dataset: Any, seed: object) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitems__(self, indices: Indices) -> Any:
        if fetches_together(self.dataset):
            draw_from(self.seed, *indices.places)
            return self.dataset.__getitems__(list(indices))
        return [self._sample(index, place) for index, place in zip(indices, indices.places, strict=True)]

    def _sample(self, index: Any, place: tuple[object, ...]) -> Any:
        draw_from(self.seed, *place)
        return self.dataset[index]


def fetches_together(dataset: Any) -> bool:
    """Whether a data set has a way of its own to fetch many samples: a Subset only hands on what it is a part of."""
    while isinstance(dataset, Subset) and type(dataset).__getitems__ is Subset.__getitems__:
        dataset = dataset.dataset
    return callable(getattr(dataset, "__getitems__", None))


class Stream(IterableDataset[Share]):
    """The user's stream of samples, cut into global batches and shared out."""

    def __init__(self, loader: DataLoader[Any], deal: Deal, seed: object) -> None:
        self.dataset, self.batch_size, self.drop_last = loader.dataset, loader.batch_size, loader.drop_last
        self.deal, self.seed = deal, seed
        # A persistent loader worker has a copy of all but this.
        self.place = torch.zeros(2, dtype=torch.int64).share_memory_()

    def begin(self, place: Place) -> None:
        """Has it go through `place` next."""
        self.place[:] = torch.tensor(place)

    def __iter__(self) -> Iterator[Share]:
        return self.deal(self._batches(self.place.tolist()))

    def _batches(self, place: list[int]) -> Iterator[list[Any]]:
        worker = get_worker_info()
        samples: Iterator[Any] | None = None
        for number in count():
            # What the user's collate_fn draws follows on this.
            draw_from(self.seed, *place, worker.id if worker else 0, number)
            samples = iter(self.dataset) if samples is None else samples
            batch = list(islice(samples, self.batch_size))
            if not batch or (self.drop_last and len(batch) < (self.batch_size or 1)):
                return
            yield batch


@dataclass
class Collated:
    """Collates the samples of a share as the user's loader does, and keeps what else there is to know of it."""

    collate: Callable[[list[Any]], Any]

    def __call__(self, share: Share) -> tuple[int, float, Any]:
        return share.samples, share.weight, self.collate(share.items)


@dataclass
class WorkerStart:
    """Begins a loader worker with the user's function, which finds the user's data set where it looks for it."""

    start: Callable[[int], None] | None

    def __call__(self, worker_id: int) -> None:
        worker: Any = get_worker_info()
        object.__setattr__(worker, "dataset", worker.dataset.dataset)
        if self.start is not None:
            self.start(worker_id)
