"""What a test finds beside its metrics: the confusion of classes, the worst mistakes, and the first layer's weights."""

from collections import Counter
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from ray_mnist.distributed.collectives import gather, total
from ray_mnist.distributed.loaders import samples_seen


class Mistakes(Callback):
    """Counts the test samples and, where `test_step` returns `logits`, finds confusion and the worst mistakes.

    After the test rank 0 has those of all ranks: `confusion`, how often each pair of label and prediction occurred
    among `classes` classes, and `worst`, the mistakes that the model was surest of. `first_layer` has the weights
    of the model's first layer, float (N, C, height, width), if they can be shown as pictures.
    """

    def __init__(self, keep: int = 25) -> None:
        self.keep = keep
        self.samples = self.classes = 0
        self.confusion = Counter[tuple[int, int]]()
        self.worst: list[dict[str, Any]] = []
        self.first_layer: np.ndarray | None = None

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Adds the batch."""
        if not (isinstance(outputs, dict) and is_labelled(batch) and is_multiclass(outputs.get("logits"))):
            return
        (images, labels), logits = batch, outputs["logits"]
        self.classes = logits.shape[1]
        if self.first_layer is None:
            self.first_layer = first_layer(pl_module, images.shape[1:])
        chance, predicted = logits.softmax(dim=1).max(dim=1)
        # Pairs, and not a matrix of all classes, which may be many. A label may be none of them, to be ignored.
        pairs = zip(labels.tolist(), predicted.tolist(), strict=True)
        self.confusion.update(pair for pair in pairs if 0 <= pair[0] < self.classes)
        # As many as are kept, right ones last: a number of its own for each batch would be compiled anew on a TPU.
        sureness, worst = chance.masked_fill(predicted == labels, -1).topk(min(self.keep, len(labels)))
        found = (images[worst].float(), labels[worst], predicted[worst], sureness)
        self.worst += [
            {"image": image.numpy(), "label": int(label), "predicted": int(guess), "chance": float(chance)}
            for image, label, guess, chance in zip(*(each.cpu() for each in found), strict=True)
            if chance >= 0 and 0 <= label < self.classes
        ]
        self._sort()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Brings the ranks' findings together on rank 0."""
        self.samples = int(total(trainer, samples_seen(trainer.test_dataloaders)))
        found = gather(trainer, (self.confusion, self.worst))
        self.confusion = sum((confusion for confusion, _ in found), Counter())
        self.worst = [mistake for _, worst in found for mistake in worst]
        self._sort()

    def _sort(self) -> None:
        self.worst = sorted(self.worst, key=lambda mistake: -mistake["chance"])[: self.keep]


def first_layer(model: LightningModule, shape: torch.Size) -> np.ndarray | None:
    """The weights (N, C, height, width) of a model's first layer, if it is linear or convolves, and fits the images.

    Args:
        model: the model.
        shape: of an image: C, height, width.
    """
    if len(shape) != 3:
        return None
    weight = next((weight for weight in model.parameters() if weight.ndim > 1), None)
    if type(weight) is not torch.nn.Parameter:  # one that is shared out over the ranks is of another class
        return None
    if weight.ndim == 2 and weight.shape[1] == shape.numel():
        return weight.detach().float().cpu().reshape(-1, *shape).numpy()
    return weight.detach().float().cpu().numpy() if weight.ndim == 4 and weight.shape[1] == shape[0] else None


def is_labelled(batch: Any) -> bool:
    """Whether a batch is a pair of inputs and class labels."""
    if not (isinstance(batch, list | tuple) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)):
        return False
    return batch[1].ndim == 1 and not batch[1].is_floating_point()


def is_multiclass(logits: Any) -> bool:
    """Whether these are the logits of samples that belong to one of several classes each."""
    return isinstance(logits, Tensor) and logits.ndim == 2 and logits.shape[1] > 1
