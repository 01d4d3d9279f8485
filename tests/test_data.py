"""Which sample goes to which worker, and when: the same training at every world size, every evaluation sample once."""

import os
import pickle
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torchvision.transforms.functional import to_tensor

from ray_mnist import MNISTDataModule, RequestError
from ray_mnist.data import EvaluationSampler, ImageDataset, TrainLoader, TrainSampler, check_share
from ray_mnist.sources import MNIST_FILES, load

pytestmark = pytest.mark.timeout(120)

SIZE, BATCH = 1003, 24


@pytest.fixture(autouse=True)
def no_global_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has called `seed_everything`, and what a test calls is forgotten after it."""
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)


def samplers(world_size: int, seed: int = 0, batch: int = BATCH) -> list[TrainSampler]:
    return [TrainSampler(SIZE, batch, rank=rank, world_size=world_size, seed=seed) for rank in range(world_size)]


def global_batches(ranks: list[TrainSampler]) -> list[list[int]]:
    """What all ranks together train on, step by step."""
    return [sorted(torch.cat(shares).tolist()) for shares in zip(*ranks, strict=True)]


def epoch_of(seed: int, epoch: int, world_size: int = 1) -> list[list[int]]:
    ranks = samplers(world_size, seed)
    for sampler in ranks:
        sampler.set_epoch(epoch)
    return global_batches(ranks)


def refusal(call: Callable[[], object]) -> str:
    """The one line that a call is refused with."""
    with pytest.raises(RequestError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


# The training order


@pytest.mark.parametrize("world_size", [2, 3, 4, 8, 24])
@pytest.mark.parametrize("epoch", [0, 5])
def test_a_global_batch_is_the_same_samples_at_every_world_size(world_size: int, epoch: int) -> None:
    assert epoch_of(7, epoch, world_size) == epoch_of(7, epoch)


@pytest.mark.parametrize("world_size", [1, 4])
def test_an_epoch_is_full_batches_of_different_samples(world_size: int) -> None:
    ranks = samplers(world_size)
    assert {len(sampler) for sampler in ranks} == {SIZE // BATCH}
    assert {len(share) for sampler in ranks for share in sampler} == {BATCH // world_size}
    samples = [index for batch in global_batches(ranks) for index in batch]
    assert len(set(samples)) == len(samples) == SIZE // BATCH * BATCH
    assert set(samples) <= set(range(SIZE))


def test_the_order_is_a_function_of_seed_and_epoch_and_of_nothing_else() -> None:
    orders = {(seed, epoch): epoch_of(seed, epoch) for seed in (0, 1, 2) for epoch in (0, 1, 2)}
    torch.manual_seed(99)
    assert {key: epoch_of(*key) for key in orders} == orders
    firsts = [tuple(order[0]) for order in orders.values()]
    assert len(set(firsts)) == len(firsts)


def test_the_sample_left_out_is_not_always_the_same() -> None:
    left_out = [set(range(SIZE)).difference(*epoch_of(0, epoch)) for epoch in range(20)]
    assert {len(samples) for samples in left_out} == {SIZE % BATCH}
    assert not set.intersection(*left_out)


@pytest.mark.parametrize("world_size", [1, 2, 8])
@pytest.mark.parametrize("done", [0, 1, 17, SIZE // BATCH])
def test_it_goes_on_at_the_very_next_sample_at_any_world_size(done: int, world_size: int) -> None:
    first = samplers(2, seed=3)[0]
    first.set_epoch(4)
    for _ in range(done):
        first.advance()
    resumed = samplers(world_size, seed=3)
    for sampler in resumed:
        sampler.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    at_the_end = done == SIZE // BATCH
    assert {sampler.epoch for sampler in resumed} == {5 if at_the_end else 4}
    assert global_batches(resumed) == (epoch_of(3, 5) if at_the_end else epoch_of(3, 4)[done:])


def test_setting_the_epoch_it_is_in_stays_where_it_is_and_another_starts_over() -> None:
    sampler = TrainSampler(SIZE, BATCH)
    sampler.load_state_dict({"epoch": 2, "batch": 5, "global_batch": BATCH, "seed": 0})
    sampler.set_epoch(2)
    assert global_batches([sampler]) == epoch_of(0, 2)[5:]
    sampler.set_epoch(3)
    assert global_batches([sampler]) == epoch_of(0, 3)


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        (TrainSampler(SIZE, 48), "with global_batch 24, which global_batch 48 would cut up differently"),
        (TrainSampler(SIZE, BATCH, seed=1), "with seed 0, which seed 1 would cut up differently"),
    ],
    ids=["batch size", "seed"],
)
def test_another_batch_size_or_seed_is_refused_inside_an_epoch_only(other: TrainSampler, complaint: str) -> None:
    sampler = TrainSampler(SIZE, BATCH)
    sampler.advance()
    assert complaint in refusal(lambda: other.load_state_dict(sampler.state_dict()))
    assert (other.epoch, other.batch) == (0, 0)
    sampler.set_epoch(6)
    other.load_state_dict(sampler.state_dict())
    assert (other.epoch, other.batch) == (6, 0)


# Shares


@pytest.mark.parametrize("share", [(1000, 64, 1), (1000, 64, 4), (64, 64, 64), (1, 1, 1)])
def test_a_batch_that_divides_is_accepted(share: tuple[int, int, int]) -> None:
    check_share(*share)


@pytest.mark.parametrize(
    ("size", "batch", "world_size", "complaint"),
    [
        (1000, 0, 1, "--batch-size 0 is not possible: give a whole number of at least 1."),
        (1000, -8, 2, "--batch-size -8 is not possible"),
        (1000, 64, 3, "--batch-size 64 is the batch over all workers, and 3 workers cannot share it equally: use 63."),
        (1000, 2, 8, "and 8 workers cannot share it equally: use 8."),
        (1000, 1001, 1, "--batch-size 1001 is more than the 1000 training samples: use at most 1000."),
    ],
)
def test_a_batch_that_cannot_be_shared_is_refused_with_the_way_out(
    size: int, batch: int, world_size: int, complaint: str
) -> None:
    assert complaint in refusal(lambda: check_share(size, batch, world_size))
    assert complaint in refusal(lambda: TrainSampler(size, batch, world_size=world_size))


# Evaluation


@pytest.mark.parametrize("world_size", range(1, 8))
@pytest.mark.parametrize("batch_size", [1, 2, 7, 100, 143, 144, 333, 1002, 1003, 5000])
def test_every_evaluation_sample_counts_once_in_equally_many_batches(world_size: int, batch_size: int) -> None:
    ranks = [EvaluationSampler(SIZE, batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    batches = [list(sampler) for sampler in ranks]
    assert torch.cat([batch for share in batches for batch in share]).tolist() == list(range(SIZE))
    assert [len(sampler) for sampler in ranks] == [len(batches[0])] * world_size == [len(share) for share in batches]
    lengths = [len(batch) for share in batches for batch in share]
    assert min(lengths) >= 1
    assert max(lengths) <= (batch_size if batch_size > 1 or SIZE % world_size == 0 else 2)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_fewer_evaluation_samples_than_workers_are_refused(size: int) -> None:
    text = refusal(lambda: EvaluationSampler(size, 10, rank=size, world_size=size + 1))
    assert text == f"{size} evaluation samples are fewer than the {size + 1} workers: use at most {size} workers."
    assert [batch.tolist() for batch in EvaluationSampler(size, 10, rank=size - 1, world_size=size)] == [[size - 1]]


# The loader


def loader(num_workers: int, epoch: int = 2) -> TrainLoader:
    """Each image is its own index."""
    dataset = ImageDataset(torch.arange(SIZE), torch.arange(SIZE))
    sampler = TrainSampler(SIZE, BATCH, seed=1)
    sampler.set_epoch(epoch)
    return TrainLoader(dataset, batch_size=None, sampler=sampler, num_workers=num_workers)


def taken(batches: Iterator[tuple[torch.Tensor, torch.Tensor]], count: int) -> list[list[int]]:
    return [sorted(next(batches)[0].tolist()) for _ in range(count)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loader_says_what_was_handed_out_not_what_was_prefetched(num_workers: int) -> None:
    first = loader(num_workers)
    batches = iter(first)
    assert taken(batches, 3) == epoch_of(1, 2)[:3]
    assert first.state_dict() == {"epoch": 2, "batch": 3, "global_batch": BATCH, "seed": 1}
    resumed = loader(num_workers, epoch=0)
    resumed.load_state_dict(first.state_dict())
    assert [sorted(images.tolist()) for images, _ in resumed] == epoch_of(1, 2)[3:]
    assert resumed.state_dict() == {"epoch": 3, "batch": 0, "global_batch": BATCH, "seed": 1}


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


def test_bytes_travel_and_what_totensor_gives_arrives(digits: MNISTDataModule) -> None:
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


def test_it_travels_without_the_data() -> None:
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
        (64, 7, "--batch-size 64 is the batch over all workers, and 7 workers cannot share it equally: use 63."),
        (1152, 2, "--batch-size 1152 is more than the 1151 training samples: use at most 1151."),
        (288, 288, "287 evaluation samples are fewer than the 288 workers: use at most 287 workers."),
    ],
)
def test_check_refuses_what_cannot_be_shared_out(batch_size: int, world_size: int, complaint: str) -> None:
    assert refusal(lambda: MNISTDataModule("digits", batch_size=batch_size).check(world_size)) == complaint
    MNISTDataModule("digits", batch_size=287).check(287)


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
