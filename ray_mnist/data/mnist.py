"""MNISTDataModule: MNIST and its like, in memory that the processes of a machine share."""

from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ray_mnist.config import global_seed
from ray_mnist.data import decoded, download, sources
from ray_mnist.distributed.orders import EpochOrder
from ray_mnist.errors import RequestError

Batch = tuple[Tensor, Tensor]
SHARE_OF_GPU = 10  # the data set stays on a GPU if it takes no more than one such part of what is free there
EVALUATION_BATCH = 1024  # the larger the faster; it has no part in the result


class ImageDataset(Dataset[Batch]):
    """Images uint8 (N, C, H, W) with labels int64 (N,); `__getitems__` gives a whole batch at a time.

    Args:
        all_images: uint8 (M, C, H, W), which are not copied: other processes may share them.
        all_labels: int64 (M,).
        rows: int64 (N,), which of them are in the data set, and in which order (default: all).
    """

    takes_arrays = True  # of indices, not only lists
    there: tuple[Tensor, Tensor] | None = None  # copies of all images and labels on a GPU, to gather batches from

    def __init__(self, all_images: Tensor, all_labels: Tensor, rows: Tensor | None = None) -> None:
        self.all_images, self.all_labels = all_images, all_labels
        self.rows = torch.arange(len(all_labels)) if rows is None else rows

    @property
    def images(self) -> Tensor:
        """A copy of those in the data set."""
        return self.all_images[self.rows]

    @property
    def labels(self) -> Tensor:
        """A copy of theirs."""
        return self.all_labels[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        row = self.rows[index]
        return self.all_images[row], self.all_labels[row]

    def __getitems__(self, indices: Any) -> Batch:
        images, labels = self.there or (self.all_images, self.all_labels)
        rows = self.rows.index_select(0, torch.as_tensor(indices)).to(images.device, non_blocking=True)
        # Faster than indexing, which copies pixel by pixel.
        return images.index_select(0, rows), labels.index_select(0, rows)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is on a GPU, which other processes may not have."""
        return vars(self) | {"there": None}


def has_room(device: torch.device, size: int) -> bool:
    """Whether it is a GPU on which so many bytes leave enough for a model."""
    return device.type == "cuda" and size <= torch.cuda.mem_get_info(device)[0] // SHARE_OF_GPU


def together(batch: Any) -> Any:
    """The batch as it is: its samples came together."""
    return batch


class MNISTDataModule(LightningDataModule):
    """MNIST and its like: images as float32 (N, C, H, W) in [0, 1] with labels int64 (N,).

    It has `input_shape`, the (C, H, W) of the images, `num_classes`, `class_names`, what each label means, and `box`,
    how many pixels the longer side of what an image shows has.

    Args:
        dataset: mnist, fashion-mnist, kmnist, cifar10, or digits, which needs no network.
        data_dir: where the files are, or are to be put. It may be shared between machines.
        batch_size: the *global* batch, which all workers share.
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
        source = sources.source_of(dataset)
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
        self.input_shape, self.num_classes = source.input_shape, source.num_classes
        self.class_names, self.box = source.class_names, source.box

    def check_batch_size(self, world_size: int) -> None:
        """Raises RequestError if a batch has not a sample for each of `world_size` workers; reads no data."""
        if self.batch_size < world_size:
            raise RequestError(
                f"--batch-size {self.batch_size} is the batch over all workers, and {world_size} workers cannot share "
                f"it: use at least {world_size}."
            )

    def check(self, world_size: int, sizes: dict[str, int] | None = None) -> dict[str, int]:
        """Finds out, before any worker starts, whether `world_size` workers can train on this.

        Args:
            world_size: how many workers there will be.
            sizes: what a `check` of the same data set has returned, which then need not be loaded again.

        Returns:
            How many samples each part has.

        Raises:
            RequestError: the data cannot be had, is damaged, or cannot be shared out.
        """
        self.check_batch_size(world_size)
        if sizes is None:
            self.prepare_data()
            sizes = {part: len(data) for part, data in self._split(decoded.load(self.dataset, self.data_dir)).items()}
        if self.batch_size > sizes["train"]:
            raise RequestError(
                f"--batch-size {self.batch_size} is more than the {sizes['train']} training samples: use at most "
                f"{sizes['train']}."
            )
        if (least := min(sizes["val"], sizes["test"])) < world_size:
            raise RequestError(
                f"{least} evaluation samples are fewer than the {world_size} workers: use at most {least}."
            )
        return sizes

    def prepare_data(self) -> None:
        """Fetches the files unless they are there; Lightning calls it once on each node."""
        download.prepare(self.dataset, self.data_dir, self.mirror)

    def setup(self, stage: str) -> None:
        """Reads the data and splits it, the same way on every worker; it stays on a GPU where that has room."""
        if not self.parts:
            self.parts = self._split(decoded.load(self.dataset, self.data_dir))
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        held = {id(tensor): tensor for part in self.parts.values() for tensor in (part.all_images, part.all_labels)}
        stays = not self.num_workers and has_room(device, sum(tensor.nbytes for tensor in held.values()))
        copies = {key: tensor.to(device) for key, tensor in held.items()} if stays else {}
        for part in self.parts.values():
            part.there = (copies[id(part.all_images)], copies[id(part.all_labels)]) if stays else None

    def _split(self, data: sources.Images) -> dict[str, ImageDataset]:
        order = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(self.seed))
        val, train = order.tensor_split([len(order) // 5])
        return {
            "train": ImageDataset(data.train_images, data.train_labels, train),
            "val": ImageDataset(data.train_images, data.train_labels, val),
            "test": ImageDataset(data.test_images, data.test_labels),
        }

    def train_dataloader(self) -> DataLoader[Batch]:
        """Global batches; the last one of an epoch is left out if it is not full."""
        order = EpochOrder(len(self.parts["train"]), self.seed)
        return self._loader("train", batch_size=self.batch_size, sampler=order, drop_last=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """The validation set."""
        return self._loader("val", batch_size=max(EVALUATION_BATCH, self.batch_size))

    def test_dataloader(self) -> DataLoader[Batch]:
        """The test set."""
        return self._loader("test", batch_size=max(EVALUATION_BATCH, self.batch_size))

    predict_dataloader = test_dataloader

    def _loader(self, part: str, **options: Any) -> DataLoader[Batch]:
        return DataLoader(self.parts[part], collate_fn=together, num_workers=self.num_workers, **options)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Scales the images on the device, where it is cheap: they get there as uint8."""
        images, labels = batch
        images = images.float().div(255)
        # Lightning has given the batch its precision's type before, when the images were whole numbers.
        return (self.trainer.precision_plugin.convert_input(images) if self.trainer else images), labels
