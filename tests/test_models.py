"""The models: their shapes, what they refuse, exact metrics, schedules, and checkpoints that load by themselves."""

from itertools import pairwise
from math import cos, pi
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning import Callback
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ray_mnist import ConvModel, RequestError, SimpleModel
from ray_mnist.models import Accuracy, Classifier

CIFAR10 = (3, 32, 32)
BOTH = pytest.mark.parametrize("model_class", [SimpleModel, ConvModel])


def trainer(**arguments: object) -> pl.Trainer:
    defaults = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(**(defaults | {"enable_model_summary": False} | arguments))


def batches(count: int, size: int) -> DataLoader[tuple[Tensor, ...]]:
    """Made-up images, of which some number of batches of `size` are full and the last one may not be."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(count, 1, 28, 28, generator=generator), torch.randint(10, (count,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=size)


@pytest.mark.parametrize(
    ("model_class", "sizes", "parameters"),
    [
        (SimpleModel, {}, 101_770),
        (SimpleModel, {"input_shape": CIFAR10}, 394_634),
        (SimpleModel, {"num_classes": 3}, 100_867),
        (ConvModel, {}, 98_666),
        (ConvModel, {"input_shape": CIFAR10, "num_classes": 4}, 155_524),
        (ConvModel, {"input_shape": (1, 8, 8)}, 33_130),
    ],
)
def test_the_size_follows_images_and_classes(
    model_class: type[Classifier], sizes: dict[str, object], parameters: int
) -> None:
    model = model_class(**sizes)
    assert sum(weight.numel() for weight in model.parameters()) == parameters
    shape, classes = sizes.get("input_shape", (1, 28, 28)), sizes.get("num_classes", 10)
    assert model(torch.rand(5, *shape)).shape == (5, classes)


def test_a_test_draws_what_it_would_draw_alone() -> None:
    """So does a fixture that makes a model; see `pytest_runtest_setup`."""
    assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(0))


@BOTH
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"lr": 0}, "--lr 0 is not possible: give a positive number"),
        ({"lr": -1e-3}, "--lr -0.001 is not possible"),
        ({"lr": float("nan")}, "--lr nan is not possible"),
        ({"lr": float("inf")}, "--lr inf is not possible"),
        ({"schedule": "linear"}, "--model.schedule linear is not known: use one of constant, cosine, one-cycle."),
        ({"num_classes": 1}, "A classifier of 1 classes"),
        ({"input_shape": (1, 0, 28)}, "images of (1, 0, 28) is not possible"),
        ({"input_shape": (28, 28)}, "images of (28, 28) is not possible"),
    ],
)
def test_an_argument_out_of_range_is_refused(
    model_class: type[Classifier], arguments: dict[str, object], complaint: str
) -> None:
    with pytest.raises(RequestError) as error:
        model_class(**arguments)
    assert complaint in str(error.value)


def test_images_too_small_to_halve_three_times_are_refused() -> None:
    with pytest.raises(RequestError, match="7x8 pixels are too few"):
        ConvModel(input_shape=(1, 7, 8))


@BOTH
@pytest.mark.parametrize("shape", [CIFAR10, (1, 28, 27), (28, 28)])
def test_images_of_another_shape_are_refused_with_the_way_out(
    model_class: type[Classifier], shape: tuple[int, ...]
) -> None:
    with pytest.raises(RequestError) as error:
        model_class()(torch.rand(2, *shape))
    assert str(error.value) == (
        f"{model_class.__name__} was made for images of shape (1, 28, 28) and got {shape}: "
        "pass it input_shape=datamodule.input_shape."
    )


# Metrics


@pytest.mark.parametrize(("right", "count"), [(9_753, 10_000), (9_999, 10_000), (1, 3), (0, 7), (359, 359)])
def test_accuracy_is_the_count_to_the_last_digit(right: int, count: int) -> None:
    accuracy = Accuracy(num_classes=10)
    labels = torch.arange(count) % 10
    predicted = torch.where(torch.arange(count) < right, labels, (labels + 1) % 10)
    for batch in range(0, count, 1024):
        part = slice(batch, batch + 1024)
        accuracy.update(F.one_hot(predicted[part], 10).float(), labels[part])
    assert accuracy.compute().dtype == torch.float64
    assert accuracy.compute().item() == right / count


@BOTH
@pytest.mark.parametrize("part", ["val", "test"])
def test_evaluation_is_a_total_over_samples_not_a_mean_over_batches(model_class: type[Classifier], part: str) -> None:
    model, data = model_class(), batches(1_003, 500)  # the last batch holds three samples
    run = trainer()
    [metrics] = (run.validate if part == "val" else run.test)(model, data, verbose=False)
    images, labels = data.dataset.tensors
    with torch.no_grad():
        logits = model.eval()(images)
    assert metrics[f"{part}_accuracy"] == (logits.argmax(1) == labels).sum().item() / 1_003
    assert metrics[f"{part}_loss"] == pytest.approx(F.cross_entropy(logits.double(), labels).item(), rel=1e-6)


@BOTH
def test_a_prediction_is_probabilities_of_images_with_or_without_labels(model_class: type[Classifier]) -> None:
    model, data = model_class(), batches(50, 50)
    images, labels = data.dataset.tensors
    chances = model.predict_step((images, labels), 0)
    assert chances.shape == (50, 10)
    assert chances.min() >= 0
    assert torch.allclose(chances.sum(1), torch.ones(50), rtol=0, atol=1e-6)
    assert torch.equal(chances, model.predict_step(images, 0))
    assert torch.equal(chances.argmax(1), model(images).argmax(1))


@BOTH
def test_a_sample_is_not_judged_by_its_batch(model_class: type[Classifier]) -> None:
    model = model_class().double().train()
    images = torch.rand(8, 1, 28, 28, dtype=torch.float64)
    images[0] *= 100  # batch statistics would be another's
    alone = torch.cat([model(images[i : i + 1]) for i in range(8)])
    assert torch.allclose(model(images), alone, rtol=1e-12, atol=1e-12)


# Schedules

STEPS, LR = 20, 0.01


class Rates(Callback):
    """Keeps the learning rate that each step was made with."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def rates(schedule: str) -> list[float]:
    """Of two epochs of ten steps, and what the optimizer is left with."""
    callback = Rates()
    run = trainer(max_epochs=2, callbacks=[callback])
    run.fit(SimpleModel(lr=LR, schedule=schedule), batches(40, 4))
    return [*callback.seen, run.optimizers[0].param_groups[0]["lr"]]


def test_a_constant_rate_is_constant() -> None:
    assert rates("constant") == [LR] * (STEPS + 1)


def test_a_cosine_falls_over_the_whole_run_to_zero() -> None:
    expected = [LR * (1 + cos(pi * step / STEPS)) / 2 for step in range(STEPS + 1)]
    assert rates("cosine") == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_one_cycle_climbs_to_the_rate_and_falls_to_nearly_nothing_over_the_whole_run() -> None:
    seen = rates("one-cycle")[:-1]
    peak = seen.index(max(seen))
    assert len(seen) == STEPS
    assert peak == 0.3 * STEPS - 1  # Smith's policy as torch has it: up in the first 30 % of the steps
    assert (seen[0], seen[peak], seen[-1]) == pytest.approx((LR / 25, LR, LR / 25 / 1e4), rel=1e-9)
    assert all(before < after for before, after in pairwise(seen[: peak + 1]))
    assert all(before > after for before, after in pairwise(seen[peak:]))


@pytest.mark.parametrize("schedule", ["cosine", "one-cycle"])
@pytest.mark.parametrize("batches_per_epoch", [5, 10])
def test_a_schedule_resumed_over_another_number_of_steps_is_refused(
    tmp_path: Path, schedule: str, batches_per_epoch: int
) -> None:
    file = tmp_path / "twenty-steps.ckpt"
    first = trainer(max_epochs=2)
    first.fit(SimpleModel(schedule=schedule), batches(40, 4))
    first.save_checkpoint(file)
    resumed = trainer(max_epochs=3, limit_train_batches=batches_per_epoch)
    with pytest.raises(RequestError) as error:
        resumed.fit(SimpleModel(schedule=schedule), batches(40, 4), ckpt_path=file, weights_only=False)
    steps = 3 * batches_per_epoch
    assert f"{schedule} schedule was laid out for 20 steps, and not for {steps}" in str(error.value)


# Checkpoints


@pytest.mark.parametrize(
    ("model_class", "arguments"),
    [
        (SimpleModel, {}),
        (SimpleModel, {"lr": 0.5, "schedule": "cosine", "input_shape": CIFAR10, "num_classes": 7}),
        (ConvModel, {"lr": 0.25, "schedule": "constant", "input_shape": (1, 16, 24), "num_classes": 3}),
    ],
)
def test_a_checkpoint_alone_brings_the_model_back(
    tmp_path: Path, model_class: type[Classifier], arguments: dict[str, object]
) -> None:
    model = model_class(**arguments)
    run = trainer()
    run.strategy.connect(model)
    run.save_checkpoint(tmp_path / "model.ckpt")
    loaded = model_class.load_from_checkpoint(tmp_path / "model.ckpt")
    assert dict(loaded.hparams) == dict(model.hparams)
    assert {name: loaded.hparams[name] for name in arguments} == arguments
    images = torch.rand(3, *model.hparams["input_shape"])
    assert torch.equal(loaded(images), model(images))
