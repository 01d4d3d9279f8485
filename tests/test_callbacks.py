"""What goes along with the training: mistakes are counted, however many classes there are."""

import multiprocessing
import resource
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

from ray_mnist.mistakes import Mistakes, first_layer
from ray_mnist.run import plots
from ray_mnist.run.folder import RunFolder
from ray_mnist.run.outcome import Outcome, TrainerState

FORK = multiprocessing.get_context("fork")
ALONE: Any = SimpleNamespace(world_size=1, test_dataloaders=None, strategy=None)


def after_batch(outputs: Any, labels: Tensor, keep: int = 25) -> Mistakes:
    mistakes = Mistakes(keep)
    module: Any = None
    mistakes.on_test_batch_end(ALONE, module, outputs, (torch.arange(len(labels))[:, None], labels), 0)
    return mistakes


def count_many_classes() -> None:
    """A batch of 256 samples and 1,000 classes, with room for 200 MB."""
    torch.use_deterministic_algorithms(True)
    room = psutil.Process().memory_info().vms + 200_000_000
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    labels = torch.arange(256) * 3
    assert after_batch({"logits": torch.eye(1000)[labels + 1]}, labels).confusion.total() == 256


def test_many_classes_take_little_memory() -> None:
    counting = FORK.Process(target=count_many_classes, daemon=True)
    counting.start()
    counting.join(240)
    assert counting.exitcode == 0


def test_pairs_are_counted_and_the_surest_mistakes_kept() -> None:
    logits = torch.tensor([[0.0, 1.0, 0.0], [0.0, 3.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 2.0]])
    # -100 is what torch's losses ignore.
    mistakes = after_batch({"logits": logits}, torch.tensor([2, 2, 0, -100]), keep=4)
    assert (mistakes.confusion, mistakes.classes) == (Counter({(2, 1): 2, (0, 0): 1}), 3)
    assert [(each["image"].item(), each["label"], each["predicted"]) for each in mistakes.worst] == [
        (1, 2, 1),
        (0, 2, 1),
    ]
    assert mistakes.worst[0]["chance"] == logits[1].softmax(0).max().item()


@pytest.mark.parametrize("logits", [torch.zeros(4), torch.zeros(4, 1), torch.zeros(4, 2, 3), None])
def test_what_is_not_one_of_several_classes_is_left_alone(logits: Any) -> None:
    assert not after_batch({"logits": logits}, torch.tensor([0, 1, 1, 0])).confusion


@pytest.mark.parametrize("channels", [1, 3])
def test_the_weights_of_each_unit_have_a_place_in_one_picture(channels: int) -> None:
    layer = np.random.default_rng(0).normal(size=(20, channels, 5, 7)) * np.arange(20).reshape(-1, 1, 1, 1)
    (axes,) = plots.weights(layer).axes
    drawn = np.asarray(axes.images[0].get_array())
    for unit in range(20):
        row, column = divmod(unit, 16)
        found = drawn[row * 7 + 1 : row * 7 + 6, column * 9 + 1 : column * 9 + 8]
        scaled = layer[unit].transpose(1, 2, 0) / (np.abs(layer[unit]).max() or 1)
        np.testing.assert_allclose(found, scaled[:, :, 0] if channels == 1 else 0.5 + scaled / 2)


@pytest.mark.plots
@pytest.mark.parametrize(("classes", "drawn"), [(3, True), (60, True), (1001, False)])
def test_a_confusion_matrix_is_drawn_up_to_what_can_be_seen(classes: int, drawn: bool, tmp_path: Path) -> None:
    state = TrainerState({}, {}, {}, 1, 1)
    outcome = Outcome(state, "cpu", [], 1, 1, 1, None, 0.0, 0.0)
    outcome.classes, outcome.confusion = classes, Counter({(2, 1): 5})
    plots.draw(RunFolder(str(tmp_path), "run"), outcome, None)
    expected = {"confusion.png", "mistakes.png"} if drawn else {"mistakes.png"}
    assert {path.name for path in (tmp_path / "run/plots").iterdir()} == expected


@pytest.mark.parametrize(
    ("layer", "image", "shape"),
    [
        (torch.nn.Linear(12, 5), (3, 2, 2), (5, 3, 2, 2)),
        (torch.nn.Conv2d(3, 7, 5), (3, 9, 9), (7, 3, 5, 5)),
        (torch.nn.Linear(12, 5), (1, 3, 3), None),
        (torch.nn.Linear(12, 5), (12,), None),
        (torch.nn.Identity(), (1, 3, 3), None),
    ],
)
def test_weights_are_pictures_where_they_fit_the_images(layer: Any, image: Any, shape: Any) -> None:
    found = first_layer(layer, torch.Size(image))
    assert (None if found is None else found.shape) == shape
