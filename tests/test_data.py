"""MNISTDataModule: the published images, cut in two by the seed, in batches that any number of workers can share."""

import os
import pickle
import socket
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from cuda_stand_in import StaysOnCpu
from torch.utils.data import DataLoader
from torchvision.transforms.functional import to_tensor

from ray_mnist import MNISTDataModule, RequestError
from ray_mnist.data.mnist import Batch, ImageDataset
from ray_mnist.data.sources import MNIST_FILES, load
from ray_mnist.distributed.loaders import ShardedLoader
from ray_mnist.distributed.shard_rules import shard_evaluation, shard_training


def refusal(call: Callable[[], object]) -> str:
    """The one line that a call is refused with."""
    with pytest.raises(RequestError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


# The data module


def rows(*parts: ImageDataset) -> Counter[bytes]:
    """How often each image, with its label, is in the parts."""
    return Counter(
        image.tobytes() + bytes([label])
        for part in parts
        for image, label in zip(part.images.numpy(), part.labels.tolist(), strict=True)
    )


@pytest.fixture
def digits() -> MNISTDataModule:
    module = MNISTDataModule("digits")
    module.setup("fit")
    return module


@pytest.mark.parametrize(("dataset", "sizes"), [("digits", (1151, 287, 359)), ("mnist", (48_000, 12_000, 10_000))])
def test_training_and_validation_set_are_the_published_training_set_cut_in_two(
    dataset: str, sizes: tuple[int, ...], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    data_dir = request.getfixturevalue("mnist_files") if dataset == "mnist" else tmp_path
    module = MNISTDataModule(dataset, data_dir=str(data_dir))
    module.setup("fit")
    published = load(dataset, data_dir)
    parts = module.parts
    assert tuple(len(parts[name]) for name in ("train", "val", "test")) == sizes
    assert {part.images.dtype for part in parts.values()} == {torch.uint8}
    whole = ImageDataset(published.train_images, published.train_labels)
    assert rows(parts["train"], parts["val"]) == rows(whole)
    assert torch.equal(parts["test"].images, published.test_images)
    assert torch.equal(parts["test"].labels, published.test_labels)
    # A draw, not the first samples: these would be single writers' digits.
    assert not torch.equal(parts["val"].labels, published.train_labels[: sizes[1]])


def test_the_split_is_the_seeds_and_the_same_every_time() -> None:
    modules = [MNISTDataModule("digits", seed=seed, batch_size=batch) for seed, batch in ((3, 64), (3, 32), (4, 64))]
    for number, module in enumerate(modules):
        torch.manual_seed(number)
        module.setup("fit")
    one, same, other = modules
    for part in ("train", "val"):
        assert torch.equal(one.parts[part].images, same.parts[part].images)
        assert torch.equal(one.parts[part].labels, same.parts[part].labels)
        assert not torch.equal(one.parts[part].labels, other.parts[part].labels)
    assert torch.equal(one.parts["test"].images, other.parts["test"].images)


def test_the_seed_is_seed_everythings_unless_it_is_given() -> None:
    assert MNISTDataModule("digits").seed == 0
    pl.seed_everything(5, verbose=False)
    assert MNISTDataModule("digits").seed == MNISTDataModule("digits").hparams["seed"] == 5
    assert MNISTDataModule("digits", seed=6).seed == 6


def test_bytes_are_transferred_and_what_totensor_gives_arrives(digits: MNISTDataModule) -> None:
    images, labels = next(iter(digits.train_dataloader()))
    assert (images.dtype, images.shape, labels.dtype) == (torch.uint8, (64, 1, 28, 28), torch.int64)
    scaled, same_labels = digits.on_after_batch_transfer((images, labels), 0)
    assert (scaled.dtype, scaled.min().item(), scaled.max().item()) == (torch.float32, 0, 1)
    assert torch.equal(scaled, torch.stack([to_tensor(image.permute(1, 2, 0).numpy()) for image in images]))
    assert torch.equal(same_labels, labels)


@pytest.mark.parametrize("part", ["val", "test"])
def test_an_evaluation_loader_gives_its_whole_part_in_order(digits: MNISTDataModule, part: str) -> None:
    batches = list(getattr(digits, f"{part}_dataloader")())
    assert torch.equal(torch.cat([images for images, _ in batches]), digits.parts[part].images)
    assert torch.equal(torch.cat([labels for _, labels in batches]), digits.parts[part].labels)


def test_an_epoch_is_full_batches_of_different_samples(digits: MNISTDataModule) -> None:
    batches = list(digits.train_dataloader())
    assert len(digits.train_dataloader()) == len(batches) == 1151 // 64
    assert {len(labels) for _, labels in batches} == {64}
    trained = rows(*(ImageDataset(*batch) for batch in batches))
    assert trained.total() == 1151 // 64 * 64
    assert trained <= rows(digits.parts["train"])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_workers_share_its_batches(world_size: int, num_workers: int, digits: MNISTDataModule) -> None:
    digits.num_workers = num_workers

    def shares(loader: DataLoader[Batch], shard: Any, world_size: int) -> list[list[ImageDataset]]:
        shards = [partial(shard, rank=rank, world_size=world_size) for rank in range(world_size)]
        ranks = [ShardedLoader(loader, 0, lambda: (1, 0), shard, int) for shard in shards]
        return [[ImageDataset(*batch) for batch in rank] for rank in ranks]

    [alone], together = (shares(digits.train_dataloader(), shard_training, count) for count in (1, world_size))
    assert [rows(*batch) for batch in zip(*together, strict=True)] == [rows(batch) for batch in alone]
    evaluated = shares(digits.val_dataloader(), shard_evaluation, world_size)
    assert rows(*chain(*evaluated)) == rows(digits.parts["val"])


def test_it_is_sent_without_the_data() -> None:
    module = MNISTDataModule("digits", batch_size=60, seed=3)
    module.check(world_size=4)
    packed = pickle.dumps(module)
    assert len(packed) < 5_000
    copy = pickle.loads(packed)
    copy.setup("fit")
    assert (copy.batch_size, copy.seed, len(copy.parts["train"])) == (60, 3, 1151)


def test_a_relative_data_dir_is_that_of_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = MNISTDataModule("digits", data_dir="somewhere/data")
    os.chdir("/")
    assert module.data_dir == tmp_path / "somewhere/data"
    assert MNISTDataModule("digits", data_dir="~/data").data_dir == Path.home() / "data"


# What cannot be trained on


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (
            {"dataset": "minst"},
            "--dataset minst is not known: use one of mnist, fashion-mnist, kmnist, cifar10, digits.",
        ),
        ({"batch_size": 0}, "--batch-size 0 is not possible: give a whole number of at least 1."),
        ({"num_workers": -1}, "--data.num_workers -1 is not possible: give 0 or more."),
    ],
)
def test_an_argument_out_of_range_is_refused(arguments: dict[str, object], complaint: str) -> None:
    assert refusal(lambda: MNISTDataModule(**arguments)) == complaint


@pytest.mark.parametrize(
    ("batch_size", "world_size", "complaint"),
    [
        (6, 7, "--batch-size 6 is the batch over all workers, and 7 workers cannot share it: use at least 7."),
        (1152, 2, "--batch-size 1152 is more than the 1151 training samples: use at most 1151."),
        (288, 288, "287 evaluation samples are fewer than the 288 workers: use at most 287."),
    ],
)
def test_check_refuses_what_cannot_be_shared_out(batch_size: int, world_size: int, complaint: str) -> None:
    assert refusal(lambda: MNISTDataModule("digits", batch_size=batch_size).check(world_size)) == complaint
    for batch_size, world_size in [(287, 287), (64, 7), (1151, 1), (1, 1)]:
        MNISTDataModule("digits", batch_size=batch_size).check(world_size)


def test_check_refuses_data_that_cannot_be_had(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        mirror = f"http://127.0.0.1:{closed.getsockname()[1]}/"
    text = refusal(lambda: MNISTDataModule(data_dir=str(tmp_path), mirror=mirror).check(1))
    assert f"mnist could not be downloaded from {mirror}" in text


def test_check_refuses_damaged_data(tmp_path: Path) -> None:
    for name in MNIST_FILES:
        (tmp_path / name).write_bytes(b"damaged")
    text = refusal(lambda: MNISTDataModule(data_dir=str(tmp_path)).check(1))
    assert f"{tmp_path / MNIST_FILES[0]} is not an IDX file" in text


def test_the_samples_stay_on_a_gpu_that_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA is stood in for: what is to go there stays on the CPU."""
    data = MNISTDataModule("digits")
    data.setup("fit")
    train, val, test = (data.parts[part] for part in ("train", "val", "test"))
    size = sum(part.all_images.nbytes + part.all_labels.nbytes for part in (train, test))
    on_gpu: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda:0")))
    data.trainer = on_gpu
    for free, workers, stays in ((10 * size, 0, True), (10 * size - 1, 0, False), (10 * size, 1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, free))
        data.num_workers = workers
        with StaysOnCpu():
            data.setup("fit")
        assert (train.there is not None) == stays
        if stays:
            assert train.there[0] is val.there[0]  # once
            assert pickle.loads(pickle.dumps(train)).there is None
            batch = train.__getitems__([3, 1, 2])
    data.trainer = None
    data.setup("fit")
    assert all(map(torch.equal, train.__getitems__([3, 1, 2]), batch))


def test_a_batch_is_gathered_where_the_samples_are() -> None:
    data = ImageDataset(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.arange(4))
    data.there = data.all_images.to("meta"), data.all_labels.to("meta")
    images, labels = data.__getitems__([2, 0])
    assert images.is_meta
    assert labels.is_meta
    assert images.shape == (2, 1, 8, 8)
