"""Whatever is killed or stalled, at whichever moment, nothing is lost, counted twice or left behind."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gloo_workers
import program
import pytest
import torch
from harness import STALL_TIMEOUT_S, Nodes, Schedule, carry_out, draw, nodes
from program import DROPOUT, EPOCHS, STEPS_PER_EPOCH

from ray_mnist.run.folder import RunFolder
from ray_mnist.run.records import read_failures, read_metrics

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    with nodes() as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[float, dict[str, Any]]:
    """What runs come to that are not struck, by their dropout."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gloo_workers.select, "on_ray", gloo_workers.on_gloo)
        for dropout in (DROPOUT, 0):
            folder = tmp_path_factory.mktemp("undisturbed")
            program.train(folder, dropout=dropout)
            found[dropout] = torch.load(folder / program.OUTCOME)
    return found


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule("worker", "stall", "validation", STEPS_PER_EPOCH, rank=1),
        Schedule("node", "kill", "step", STEPS_PER_EPOCH + 6, rank=1),
        Schedule("controller", "kill", "uploaded", 8),
        Schedule("driver", "kill", "step", STEPS_PER_EPOCH + 6, then=3),
    ],
    ids=str,
)
def test_a_run_comes_to_what_it_would_have_come_to(
    schedule: Schedule, cluster: Nodes, undisturbed: dict[float, dict[str, Any]], tmp_path: Path
) -> None:
    outcome = carry_out(schedule, tmp_path, cluster, undisturbed[schedule.dropout])
    assert outcome.wrong == []
    folder = RunFolder(str(tmp_path), "run")
    failures = read_failures(folder)
    if schedule.how == "stall":
        said = f"stalled in validation after step {STEPS_PER_EPOCH}: no answer for {STALL_TIMEOUT_S} s"
        assert said in "".join(failures)
    if schedule.victim == "controller":
        (failure,) = failures
        said = "the run's controller died: killed, out of memory, or its machine is gone; starting again"
        assert failure.partition(", once")[0] == said
        assert outcome.restarts == 1
        assert [row["epoch"] for row in read_metrics(folder)] == list(range(1, EPOCHS + 1))
    assert outcome.identical
    assert outcome.once


def test_a_seed_draws_the_same_schedule_each_time_and_many_draw_them_all() -> None:
    drawn = [draw(seed) for seed in range(500)]
    assert drawn == [draw(seed) for seed in range(500)]
    assert len({(each.victim, each.how, each.moment) for each in drawn}) == 4 * 2 * 6
