"""--profile: torch's profiler looks at some steps of each rank, and leaves nothing behind."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_mnist import MNISTDataModule, SimpleModel, Trainer
from ray_mnist.profiling import SKIPPED, STEPS, WARM_UP

pytestmark = pytest.mark.timeout(120)


def steps_in(trace: Path) -> list[str]:
    """The names of the steps in a trace, in their order."""
    with gzip.open(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    assert any(event["name"] == "aten::addmm" for event in events)  # of the linear layers
    steps = [event for event in events if event["name"].startswith("ProfilerStep#") and event["ph"] == "X"]
    return [event["name"] for event in sorted(steps, key=lambda event: event["ts"])]


def test_each_rank_traces_the_same_steps(tmp_path: Path, gloo: None) -> None:
    trainer = Trainer(max_epochs=2, num_workers=2, storage_path=str(tmp_path), name="run", profile=True)
    trainer.fit(SimpleModel(), MNISTDataModule("digits"))
    expected = [f"ProfilerStep#{step}" for step in range(SKIPPED + WARM_UP, SKIPPED + WARM_UP + STEPS)]
    for rank in (0, 1):
        assert steps_in(tmp_path / f"run/profile/rank-{rank}.json.gz") == expected
        assert "aten::addmm" in (tmp_path / f"run/profile/rank-{rank}.txt").read_text()
    assert len(list((tmp_path / "run/profile").iterdir())) == 4


class Ends(SimpleModel):
    """Raises an error in a step that is looked at."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.trainer.global_step == SKIPPED + WARM_UP + 3:
            raise ZeroDivisionError
        return super().training_step(batch, batch_idx)


def test_a_run_that_fails_leaves_no_profiler_at_work(tmp_path: Path) -> None:
    trainer = Trainer(storage_path=str(tmp_path), name="run", profile=True)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(Ends(), MNISTDataModule("digits"))
    assert not torch.autograd._profiler_enabled()
    assert len(steps_in(tmp_path / "run/profile/rank-0.json.gz")) == 4
