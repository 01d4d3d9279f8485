"""Lightning's own Trainer beside ours: how tests make it, and how they compare what the two give."""

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

QUIET: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}


def lightning(strategy: str = "", name: str = "", **arguments: Any) -> pl.Trainer:
    """Lightning's own Trainer, which knows no run's name, and needs no strategy for one process."""
    return pl.Trainer(accelerator="cpu", devices=1, **QUIET | arguments)


def same(here: Any, there: Any, rel: float, where: str) -> None:
    """Asserts that two findings are the same, numbers to a relative difference (of the numbers around 1 in them)."""
    if isinstance(here, dict):
        assert isinstance(there, dict), where
        assert set(here) == set(there), where
        for name in here:
            same(here[name], there[name], rel, f"{where}[{name!r}]")
    elif isinstance(here, list | tuple):
        assert type(here) is type(there), where
        assert len(here) == len(there), f"{where}: {here} {there}"
        for index, (mine, theirs) in enumerate(zip(here, there, strict=True)):
            same(mine, theirs, rel, f"{where}[{index}]")
    elif isinstance(here, Tensor):
        torch.testing.assert_close(there, here, rtol=rel, atol=rel / 10, msg=lambda text: f"{where}: {text}")
    elif isinstance(here, float):
        assert there == pytest.approx(here, rel=rel, abs=rel / 10, nan_ok=True), where
    else:
        assert here == there, f"{where}: {here} {there}"
