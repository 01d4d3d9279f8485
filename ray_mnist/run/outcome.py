"""What a worker brings home of its task."""

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor  # slow to import

Row = dict[str, float]


@dataclass
class TrainerState:
    """What Lightning's Trainer shows once it is done, as rank 0 brings it home from the workers."""

    callback_metrics: dict[str, "Tensor"]
    logged_metrics: dict[str, "Tensor"]
    progress_bar_metrics: dict[str, float]
    current_epoch: int
    global_step: int
    # The attributes of the callbacks and loggers, in their order, and those of the model that changed.
    callbacks_and_loggers: list[dict[str, Any]] = field(default_factory=list)
    model: dict[str, Any] = field(default_factory=dict)


@dataclass
class Evaluation:
    """What came of `validate` or `test` (`metrics`, one dictionary a loader) or of `predict`."""

    trainer_state: TrainerState
    metrics: list[dict[str, float]] = field(default_factory=list)
    predictions: list[Any] | None = None


@dataclass
class Outcome:
    """What came of `fit`, and of the test that ends it."""

    trainer_state: TrainerState
    device: str
    history: list[Row]
    steps: int
    train_samples: int
    val_samples: int
    best_checkpoint: str | None
    started: float
    fit_seconds: float
    num_workers: int = 1  # at the end
    newest_checkpoint: str | None = None  # that the fit wrote, or went on from
    test_seconds: float = 0.0
    test_samples: int = 0
    test_metrics: list[dict[str, float]] = field(default_factory=list)  # one dictionary a loader
    classes: int = 0  # that the model tells apart
    confusion: Counter[tuple[int, int]] = field(default_factory=Counter)  # of labels and predictions
    mistakes: list[dict[str, Any]] = field(default_factory=list)
    first_layer: "np.ndarray | None" = None  # float (N, C, height, width)
