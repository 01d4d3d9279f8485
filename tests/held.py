"""Holds a training where it is, until the test has done what it has to do meanwhile."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from conftest import wait_until


class Held(pl.Callback):
    """Waits in the second epoch until there is such a file."""

    def __init__(self, until: Path) -> None:
        self.until = until

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.current_epoch == 1:
            wait_until(self.until.exists, 600, f"{self.until} to be there")
