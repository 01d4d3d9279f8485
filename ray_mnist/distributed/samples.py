"""The samples of a shard, fetched from the user's data set: what they draw is a function of their places alone."""

import zlib
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate

from ray_mnist.distributed.sharding import SeededIndices, seed_cpu, seed_generators


class SeededDataset(Dataset[Any]):
    """The user's map-style data set; what a sample draws is a function of the seed and its place in the training.

    Where the data set fetches many samples at once, it is what they draw together.

    Args:
        dataset: the user's.
        seed: of all that is drawn.
        collates: whether samples that are rows of tensors are handed out as the batch that default_collate makes.
    """

    def __init__(self, dataset: Any, seed: object, collates: bool = False) -> None:
        self.dataset, self.seed, self.collates = dataset, seed, collates

    def __getitems__(self, indices: SeededIndices) -> Any:
        if fetches_batches(self.dataset):
            epoch, again = indices.epoch_pass
            # As repr has tuples, at a tenth of its time.
            positions = f"), ({epoch}, {again}, 'sample', ".join(map(str, indices.positions))
            seed_cpu(zlib.crc32(f"({self.seed!r}, ({epoch}, {again}, 'sample', {positions}))".encode()))
            return self.dataset.__getitems__(list(indices))
        if holds_tensors(self.dataset):
            # Rows draw nothing: only what comes after the last of them can tell how they were seeded.
            seed_generators(self.seed, *indices.epoch_pass, "sample", indices.positions[-1])
            return rows(self.dataset, indices) if self.collates else [self.dataset[index] for index in indices]
        samples = []
        for index, position in zip(indices, indices.positions, strict=True):
            seed_generators(self.seed, *indices.epoch_pass, "sample", position)
            samples.append(self.dataset[index])
        return samples


def fetches_batches(dataset: Any) -> bool:
    """Whether a data set has a way of its own to fetch many samples: a Subset only hands on what it is a part of."""
    while isinstance(dataset, Subset) and type(dataset).__getitems__ is Subset.__getitems__:
        dataset = dataset.dataset
    return callable(getattr(dataset, "__getitems__", None))


def holds_tensors(dataset: Any) -> bool:
    """Whether a data set is torch's TensorDataset, or a Subset of one: its samples are rows of tensors."""
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return type(dataset) is TensorDataset


def collates_rows(loader: DataLoader[Any]) -> bool:
    """Whether a loader's batches are rows of tensors, one below the other."""
    if not (holds_tensors(loader.dataset) and loader.collate_fn is default_collate):
        return False
    dataset: Any = loader.dataset
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return all(type(tensor) is Tensor and tensor.layout is torch.strided for tensor in dataset.tensors)


def rows(dataset: Any, indices: list[int]) -> list[Tensor]:
    """The samples as default_collate puts them together."""
    while isinstance(dataset, Subset):
        indices, dataset = [dataset.indices[index] for index in indices], dataset.dataset
    places = torch.tensor(indices)
    places = torch.where(places < 0, places + len(dataset), places)
    return [tensor.index_select(0, places.to(tensor.device)) for tensor in dataset.tensors]
