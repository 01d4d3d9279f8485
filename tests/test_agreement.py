"""All ranks checkpoint at the same step when it is rank 0's clock that says when, and are seldom asked."""

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl

from ray_mnist import MNISTDataModule, SimpleModel, Trainer
from ray_mnist.callbacks import Recorder
from ray_mnist.distributed.agreement import RankZero
from ray_mnist.distributed.collectives import gather
from ray_mnist.run.folder import RunFolder, checkpoint_name


class OwnClocks(pl.Callback):
    """On rank 0 each step takes one second, and on the others none; keeps at which steps all ranks saved."""

    def __init__(self) -> None:
        self.saved_at: list[int] = []
        self.all_ranks: list[list[int]] = []

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        (recorder,) = (callback for callback in trainer.callbacks if isinstance(callback, Recorder))
        recorder.rank_zero.clock = lambda: trainer.global_step if trainer.is_global_zero else 0

    def on_save_checkpoint(self, trainer: pl.Trainer, *_: Any) -> None:
        self.saved_at.append(trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.all_ranks = gather(trainer, self.saved_at)


@pytest.mark.parametrize(
    ("num_workers", "options", "steps"),
    [
        (2, {}, [5, 10, 15, 17, 22, 27, 32, 34]),  # an epoch has 17 steps
        # Those at 7, 14, … put off what the clock asks for.
        (0, {"checkpoint_every_n_steps": 7}, [5, 7, 12, 14, 17, 21, 26, 28, 33, 34]),
        (2, {"accumulate_grad_batches": 2}, [5, 9, 14, 18]),  # an epoch has 9 steps
    ],
    ids=["seconds", "seconds and steps", "accumulated"],
)
def test_all_ranks_save_at_the_steps_that_rank_zero_says(
    num_workers: int, options: dict[str, Any], steps: list[int], gloo: None, tmp_path: Path
) -> None:
    clocks = OwnClocks()
    options = {"num_workers": num_workers, "max_epochs": 2, "callbacks": [clocks], **options}
    trainer = Trainer(checkpoint_every_s=5, storage_path=str(tmp_path), name="run", **options)
    trainer.fit(SimpleModel(), MNISTDataModule("digits"))
    assert clocks.all_ranks == [steps] * max(1, num_workers)
    assert RunFolder(str(tmp_path), "run").checkpoints()[0] == checkpoint_name(steps[-1])


def asked(seconds_of: Callable[[int], float], until: int) -> list[int]:
    """The steps at which a rank alone is asked, if step `n` takes `seconds_of(n)`."""
    found: list[int] = []
    trainer: Any = SimpleNamespace(global_step=0, strategy=None)
    trainer.strategy = SimpleNamespace(broadcast=lambda answer: found.append(trainer.global_step) or answer)
    now = 0.0
    rank_zero = RankZero(threading.Event(), clock=lambda: now)
    rank_zero.begin(trainer)
    for step in range(1, until + 1):
        trainer.global_step, now = step, now + seconds_of(step)
        assert rank_zero.says(trainer) == (False, False)
    return found


def test_short_steps_are_asked_about_once_a_second_and_long_ones_each_time() -> None:
    assert asked(lambda step: 1 / 64, 255) == [1, 3, 7, 15, 31, 63, 127, 191, 255]
    assert asked(lambda step: 10, 5) == [1, 2, 3, 4, 5]
    # From one step to the next they take longer: it is noticed the next time that somebody is asked.
    assert asked(lambda step: 1 / 64 if step <= 63 else 10, 129) == [1, 3, 7, 15, 31, 63, 127, 128, 129]
    assert asked(lambda step: 0, 15) == [1, 3, 7, 15]
