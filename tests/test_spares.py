"""Workers that wait for those of a run to die: on its nodes, ready, and no longer than they are of use.

That a run goes on with them is tested in test_ray.py, that they end with it in chaos/test_chaos.py.
"""

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
from conftest import wait_until

from ray_mnist.launch import ahead
from ray_mnist.launch.spares import Spares


def prepare(folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    if (folder / "fail").exists():
        raise MemoryError


@pytest.fixture
def clock() -> Any:
    return SimpleNamespace(now=0.0)


@pytest.fixture
def spares(clock: Any, tmp_path: Path) -> Iterator[Spares]:
    spares = Spares(partial(prepare, tmp_path), "3", 30, lambda: clock.now)
    yield spares
    spares.end()


def processes(folder: Path, number: int) -> list[int]:
    """Those that have been prepared, once they are so many."""

    def found() -> list[int]:
        return [int(file.name) for file in folder.iterdir() if file.name.isdigit()]

    wait_until(lambda: len(found()) == number, 600, f"{number} workers")
    return found()


def wait_for_answers(spares: Spares) -> None:
    prepared = [spare.prepared for spare in spares.waiting]
    assert ray.wait(prepared, num_returns=len(prepared), timeout=600)[0] == prepared


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_they_start_once_the_run_has_trained_for_a_while_and_replace_it_once(
    spares: Spares, clock: Any, tmp_path: Path
) -> None:
    node = ray.get_runtime_context().get_node_id()
    for clock.now in (100, 129):
        spares.look([node, node])
    assert spares.waiting == []
    assert spares.take(node) is None  # the clock begins anew
    for clock.now in (131, 160):
        spares.look([node, node])
    assert spares.waiting == []
    for clock.now in (161, 162):
        spares.look([node, node])
    assert [spare.node for spare in spares.waiting] == [node, node]
    first, second = processes(tmp_path, 2)
    wait_for_answers(spares)
    assert {psutil.Process(each).environ()["OMP_NUM_THREADS"] for each in (first, second)} == {"3"}
    assert spares.take("another") is None
    os.kill(first, signal.SIGKILL)
    taken = spares.take(node)
    assert taken is not None
    assert taken[1].pid == second
    assert spares.take(node) is None
    ray.kill(taken[0])

    (tmp_path / "fail").touch()
    for clock.now in (200, 230):
        spares.look([node])
    third = ({*processes(tmp_path, 3)} - {first, second}).pop()
    wait_for_answers(spares)
    assert spares.take(node) is None  # for want of memory

    for clock.now in (300, 330):
        spares.look([node])
    fourth = ({*processes(tmp_path, 4)} - {first, second, third}).pop()
    spares.look([])
    assert spares.waiting == []
    for process in (third, fourth):
        wait_until(lambda pid=process: not psutil.pid_exists(pid), 600, "the worker to end")


def test_none_imports_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < ahead.ray_internals.memory_used() < 1
    monkeypatch.setattr(ahead, "import_worker", lambda package: os.sched_getscheduler(0))
    monkeypatch.setattr(ahead.ray_internals, "memory_used", lambda: 0.6)
    with pytest.raises(MemoryError):
        ahead.import_worker_when_idle("pytorch_lightning")


def test_they_import_while_a_core_has_nothing_else_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    monkeypatch.setattr(ahead, "import_worker", lambda package: found.append(os.sched_getscheduler(0)))
    monkeypatch.setattr(ahead.ray_internals, "memory_used", lambda: 0.4)
    ahead.import_worker_when_idle("pytorch_lightning")
    assert [each & ~os.SCHED_RESET_ON_FORK for each in found] == [os.SCHED_IDLE]
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
