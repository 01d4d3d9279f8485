"""The samples of a shard, fetched from the user's data set: what they draw is a function of their places alone."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate

from ray_mnist.distributed.sharding import SeededIndices, plain, seed_generators


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
            places = indices.positions
            seed_generators(self.seed, *indices.epoch_pass, "samples", places[0], places[-1], len(places))
            # A list of thousands takes longer to make than their batch on a GPU.
            takes_arrays = getattr(self.dataset, "takes_arrays", False)
            return self.dataset.__getitems__(indices.indices if takes_arrays else list(indices))
        if holds_tensors(self.dataset):
            # Rows draw nothing: only what comes after the last of them can tell how they were seeded.
            seed_generators(self.seed, *indices.epoch_pass, "sample", indices.positions[-1])
            return rows(self.dataset, indices.indices) if self.collates else [self.dataset[index] for index in indices]
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


def rows(dataset: Any, indices: Any) -> list[Tensor]:
    """The samples as default_collate puts them together; the indices are a list or an array."""
    while isinstance(dataset, Subset):
        indices, dataset = [dataset.indices[index] for index in plain(indices)], dataset.dataset
    places = torch.as_tensor(indices)
    places = torch.where(places < 0, places + len(dataset), places)
    return [tensor.index_select(0, places.to(tensor.device)) for tensor in dataset.tensors]
