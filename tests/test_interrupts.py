"""Ctrl-C and SIGTERM end what was started in a cluster that goes on, and leave the folder to whoever resumes."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
import ray._private.state
from conftest import wait_until
from held import Held
from ray_state import actors, placement_groups

from ray_mnist import MNISTDataModule, SimpleModel, Trainer, tune
from ray_mnist.ray_controller_internals import KeepingController
from ray_mnist.run.folder import RunFolder
from ray_mnist.run.lock import CLAIM

STARTING = KeepingController.__name__
pytestmark = pytest.mark.usefixtures("cluster")


@contextmanager
def ended_by(number: signal.Signals, condition: Callable[[], bool]) -> Iterator[None]:
    """Gets the signal once the condition holds; nothing is left of what runs in the `with`."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` would have it be ignored
    sent = threading.Event()

    def send() -> None:
        wait_until(condition, 600, f"the time for {number.name}")
        sent.set()
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    raised, says = (SystemExit, "143") if number == signal.SIGTERM else (KeyboardInterrupt, "go on with")
    try:
        with pytest.raises(raised, match=says):
            yield
    finally:
        signal.signal(signal.SIGINT, before)
    assert sent.is_set()
    wait_until(lambda: not actors() and not placement_groups(), 600, "the processes to end")


@pytest.mark.slow
@pytest.mark.parametrize("when", ["starting", "training"])
def test_a_run_ends_in_a_cluster_that_goes_on(when: str, tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "run")
    trainer = Trainer(num_workers=2, max_epochs=1000, storage_path=str(tmp_path), name="run")
    moments = {"starting": lambda: STARTING in actors(), "training": lambda: bool(folder.checkpoints())}
    with ended_by(signal.SIGINT, moments[when]):
        trainer.fit(SimpleModel(), MNISTDataModule("digits"))
    assert ray.is_initialized()
    assert not list(tmp_path.glob(f"run/{CLAIM}*"))


@pytest.mark.slow
def test_a_sweep_ends_in_a_cluster_that_goes_on_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resumed = tmp_path / "resumed"

    def sweep(**options: Any) -> Any:
        names = {"storage_path": str(tmp_path), "name": "sweep", "search": "grid", "scheduler": "fifo", "max_epochs": 2}
        callbacks = [Held(resumed)]
        space, data = {"model.lr": [0.01, 0.02]}, {"dataset": "digits"}
        return tune(SimpleModel, MNISTDataModule, space, data=data, callbacks=callbacks, **names, **options)

    with ended_by(signal.SIGINT, lambda: len(list(tmp_path.glob("sweep/trials/*/metrics.csv"))) == 2):
        sweep()
    assert not list(tmp_path.glob(f"sweep/{CLAIM}*"))
    with ended_by(signal.SIGTERM, lambda: len(actors()) == 2):  # that of the news, and the trials
        sweep(resume=True)
    assert "terminated: go on with --resume --name sweep\n" in capsys.readouterr().err
    resumed.touch()
    result = sweep(resume=True)
    assert [row.status for row in result.trials] == ["done", "done"]
    assert [[row["epoch"] for row in trial.history] for trial in result.trials] == [[1, 2], [1, 2]]
