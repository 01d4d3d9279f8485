"""An epoch's order of the samples as one array, of which each rank takes its part: of samplers that draw it at once."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)


class EpochOrder(Sampler[int]):
    """Each epoch's own order of the samples, a function of the seed and the epoch alone, inside Lightning or not."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.epoch = size, seed, 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(self.order().tolist())

    def order(self) -> Tensor:
        """The epoch's, int64 (size,)."""
        entropy = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint64)[0]
        return torch.randperm(self.size, generator=torch.Generator().manual_seed(int(entropy >> 1)))

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls it as `epoch`, counted from 0, begins."""
        self.epoch = epoch


def random_order(sampler: RandomSampler) -> Tensor:
    """What a RandomSampler draws."""
    size, wanted, generator = len(sampler.data_source), sampler.num_samples, sampler.generator
    if generator is None:
        generator = torch.Generator().manual_seed(int(torch.empty((), dtype=torch.int64).random_()))
    if sampler.replacement:
        return torch.randint(high=size, size=(wanted,), dtype=torch.int64, generator=generator)
    permutations = [torch.randperm(size, generator=generator) for _ in range(-(-wanted // size))]
    return torch.cat(permutations)[:wanted]


def subset_order(sampler: SubsetRandomSampler) -> Tensor:
    """What a SubsetRandomSampler draws."""
    return torch.as_tensor(sampler.indices)[torch.randperm(len(sampler.indices), generator=sampler.generator)]


def weighted_order(sampler: WeightedRandomSampler) -> Tensor:
    """What a WeightedRandomSampler draws."""
    return torch.multinomial(sampler.weights, sampler.num_samples, sampler.replacement, generator=sampler.generator)


# By the very class: a subclass may draw in a way of its own.
ORDERS: dict[type, Callable[[Any], Tensor]] = {
    EpochOrder: EpochOrder.order,
    SequentialSampler: lambda sampler: torch.arange(len(sampler)),
    RandomSampler: random_order,
    SubsetRandomSampler: subset_order,
    WeightedRandomSampler: weighted_order,
}


def draws_at_once(batches: Any) -> bool:
    """Whether a batch sampler only cuts up an order that is drawn as an epoch begins."""
    if type(batches) is not BatchSampler or type(batches.sampler) not in ORDERS:
        return False
    # Indices of other kinds are handed out as they are.
    return not isinstance(batches.sampler, SubsetRandomSampler) or all(type(i) is int for i in batches.sampler.indices)


def draw_order(batches: BatchSampler) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The indices of the samples of the epoch, the very ones that iterating over `batches` would draw here."""
    order: Any = ORDERS[type(batches.sampler)](batches.sampler).numpy()
    return order[: len(batches) * batches.batch_size]
