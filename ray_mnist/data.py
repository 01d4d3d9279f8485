"""MNISTDataModule and the samplers: which sample goes where, and when."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ray_mnist import download, sources
from ray_mnist.config import global_seed
from ray_mnist.errors import RequestError

Batch = tuple[Tensor, Tensor]


class TrainSampler(Sampler[Tensor]):
    """Yields this rank's share of each global batch, as int64 indices (global_batch / world_size,).

    The order is a pure function of (seed, epoch), and global batch k holds the same samples at every world size.
    A last batch that is not full is left out of its epoch: each epoch has another order, so no sample is always the
    one left out.

    The sampler also keeps the place in the training: `epoch` and `batch`, the next global batch to train on. It is
    the loader that moves it on, since only the loader knows what has been handed out rather than prefetched.
    """

    def __init__(self, size: int, global_batch: int, *, rank: int = 0, world_size: int = 1, seed: int = 0) -> None:
        self.size, self.global_batch, self.seed = size, global_batch, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.batch = 0
        check_share(size, global_batch, world_size)

    def __len__(self) -> int:
        return self.size // self.global_batch

    def __iter__(self) -> Iterator[Tensor]:
        entropy = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint64)[0]
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(int(entropy >> 1)))
        for batch in range(self.batch, len(self)):
            start = batch * self.global_batch
            yield order[start : start + self.global_batch][self.rank :: self.world_size]

    def set_epoch(self, epoch: int) -> None:
        """Goes to the start of `epoch`, or stays where it is within it."""
        if epoch != self.epoch:
            self.epoch, self.batch = epoch, 0

    def advance(self) -> None:
        """One more global batch was handed out."""
        self.batch += 1
        if self.batch == len(self):
            self.epoch, self.batch = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """Where the training stands: the same on every rank and at every world size."""
        return {"epoch": self.epoch, "batch": self.batch, "global_batch": self.global_batch, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to where `state_dict` was taken.

        Raises:
            RequestError: it was taken inside an epoch that another batch size or seed would cut up differently.
        """
        here = {"global_batch": self.global_batch, "seed": self.seed}
        changed = [name for name, value in here.items() if value != state[name]]
        if state["batch"] and changed:
            name = changed[0]
            raise RequestError(
                f"The checkpoint was taken inside an epoch with {name} {state[name]}, which {name} {here[name]} would "
                "cut up differently: resume with the same value."
            )
        self.epoch, self.batch = state["epoch"], state["batch"]


class EvaluationSampler(Sampler[Tensor]):
    """Yields every index exactly once over all ranks, in order: rank r has the r-th run of consecutive samples.

    Each rank has the same number of batches, none of them empty, so that models whose metrics meet at every step
    don't wait for a rank that has none left; batches are therefore evened out, at most `batch_size` long (one more
    where `batch_size` is so small that the ranks could not have equally many otherwise).

    Raises:
        RequestError: there are fewer samples than ranks.
    """

    def __init__(self, size: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        if size < world_size:
            raise RequestError(
                f"{size} evaluation samples are fewer than the {world_size} workers: use at most {size} workers."
            )
        shares = torch.arange(size).tensor_split(world_size)
        longest, shortest = len(shares[0]), len(shares[-1])
        self.batches = shares[rank].tensor_split(min(-(-longest // batch_size), shortest))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)


def check_share(size: int, global_batch: int, world_size: int) -> None:
    """Raises RequestError unless every worker gets an equal share of every global batch."""
    if global_batch < 1:
        raise RequestError(f"--batch-size {global_batch} is not possible: give a whole number of at least 1.")
    if global_batch % world_size:
        nearest = max(world_size, round(global_batch / world_size) * world_size)
        raise RequestError(
            f"--batch-size {global_batch} is the batch over all workers, and {world_size} workers cannot share it "
            f"equally: use {nearest}."
        )
    if global_batch > size:
        raise RequestError(f"--batch-size {global_batch} is more than the {size} training samples: use at most {size}.")


class TrainLoader(DataLoader[Batch]):
    """A DataLoader that says, and can be told, which batch comes next: Lightning keeps that in its checkpoints."""

    sampler: TrainSampler

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for batch in super().__iter__():
            self.sampler.advance()
            yield batch

    def state_dict(self) -> dict[str, int]:
        """See `TrainSampler.state_dict`."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """See `TrainSampler.load_state_dict`."""
        self.sampler.load_state_dict(state)


class ImageDataset(Dataset[Batch]):
    """Images uint8 (N, C, H, W) and labels int64 (N,) in memory; an index may be a whole batch of indices."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | int) -> Batch:
        return self.images[index], self.labels[index]


class MNISTDataModule(LightningDataModule):
    """MNIST and its like: images as float32 (N, C, H, W) in [0, 1] with labels int64 (N,).

    Args:
        dataset: mnist, fashion-mnist, kmnist, cifar10, or digits, which needs no network.
        data_dir: where the files are, or are to be put. It may be shared between machines.
        batch_size: the *global* batch: each of W workers trains on batch_size / W samples a step.
        num_workers: processes that a loader fetches with. The data is in memory and fetched a batch at a time, so
            that 0, the training process itself, is usually fastest.
        seed: picks the validation samples and the training order (default: `seed_everything`'s, or else 0).
        mirror: base URL to download from instead of the data set's own, for networks without internet.

    Raises:
        RequestError: an argument is out of range.
    """

    def __init__(
        self,
        dataset: str = "mnist",
        data_dir: str = "data",
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int | None = None,
        mirror: str | None = None,
    ) -> None:
        super().__init__()
        self.source = sources.source_of(dataset)
        if batch_size < 1:
            raise RequestError(f"--batch-size {batch_size} is not possible: give a whole number of at least 1.")
        if seed is not None and not 0 <= seed < 2**32:
            raise RequestError(f"--data.seed {seed} is not possible: give a whole number from 0 to {2**32 - 1}.")
        if num_workers < 0:
            raise RequestError(f"--data.num_workers {num_workers} is not possible: give 0 or more.")
        self.dataset, self.mirror = dataset, mirror
        # Made absolute here, since a worker elsewhere runs in another folder.
        self.data_dir = Path(data_dir).expanduser().absolute()
        self.batch_size, self.num_workers = batch_size, num_workers
        self.seed = global_seed() if seed is None else seed
        self.save_hyperparameters(ignore=["seed"])
        self.save_hyperparameters({"seed": self.seed})
        self.parts: dict[str, ImageDataset] = {}

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        return self.source.input_shape

    @property
    def num_classes(self) -> int:
        """How many labels there are."""
        return self.source.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """What each label means."""
        return self.source.class_names

    def check(self, world_size: int) -> None:
        """Finds out, before any worker starts, whether `world_size` workers can train on this.

        Raises:
            RequestError: the data cannot be had, is damaged, or cannot be shared out.
        """
        if self.batch_size % world_size:
            check_share(self.batch_size, self.batch_size, world_size)
        self.prepare_data()
        parts = self._split(sources.load(self.dataset, self.data_dir))
        check_share(len(parts["train"]), self.batch_size, world_size)
        for part in ("val", "test"):
            EvaluationSampler(len(parts[part]), self.batch_size, world_size=world_size)

    def prepare_data(self) -> None:
        """Fetches the files unless they are there; Lightning calls it once on each node."""
        download.prepare(self.dataset, self.data_dir, self.mirror)

    def setup(self, stage: str) -> None:
        """Reads the data and splits it, the same way on every worker."""
        if not self.parts:
            self.parts = self._split(sources.load(self.dataset, self.data_dir))

    def _split(self, data: sources.Images) -> dict[str, ImageDataset]:
        order = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(self.seed))
        val, train = order.tensor_split([len(order) // 5])
        return {
            "train": ImageDataset(data.train_images[train], data.train_labels[train]),
            "val": ImageDataset(data.train_images[val], data.train_labels[val]),
            "test": ImageDataset(data.test_images, data.test_labels),
        }

    @property
    def _place(self) -> dict[str, int]:
        trainer = self.trainer
        return {"rank": trainer.global_rank, "world_size": trainer.world_size} if trainer else {}

    def train_dataloader(self) -> TrainLoader:
        """This rank's share of every global batch."""
        part = self.parts["train"]
        sampler = TrainSampler(len(part), self.batch_size, seed=self.seed, **self._place)
        return TrainLoader(part, batch_size=None, sampler=sampler, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[Batch]:
        """This rank's share of the validation set, each sample once over all ranks."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """This rank's share of the test set, each sample once over all ranks."""
        return self._evaluation_loader("test")

    predict_dataloader = test_dataloader

    def _evaluation_loader(self, part: str) -> DataLoader[Batch]:
        dataset = self.parts[part]
        # The larger the batch the faster; the size has no part in the result.
        sampler = EvaluationSampler(len(dataset), max(1024, self.batch_size), **self._place)
        return DataLoader(dataset, batch_size=None, sampler=sampler, num_workers=self.num_workers)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Scales the images on the device, where it is cheap: uint8 travels, float32 in [0, 1] arrives."""
        images, labels = batch
        images = images.float().div(255)
        # Lightning has given the batch its precision's type before, when the images were whole numbers.
        return (self.trainer.precision_plugin.convert_input(images) if self.trainer else images), labels
