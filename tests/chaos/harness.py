"""Strikes a run at a random moment, lets it recover or resumes it, and looks what became of it."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from conftest import wait_until
from program import BEGUN, DROPOUT, MOMENTS, OUTCOME, REACHED, STEPS, STRUCK, TEST
from ray.cluster_utils import Cluster
from ray_state import actors, placement_groups, process_of, processes_on

from ray_mnist.ray_controller_internals import KeepingController

WORKERS = 2
VICTIMS = ("worker", "node", "controller", "driver")
STALL_TIMEOUT_S = 10  # of the runs
PAUSE_S = 5  # for which a driver or a controller stalls, which nobody starts again while they live
RUN_S = 600  # that a run may take in all
END_S = 120  # in which all that a run has started is gone after it


@dataclass(frozen=True)
class Schedule:
    """What is struck, how (kill or stall) and when: a moment of `program.Moments`, of one rank, from a step on.

    `then` is how many workers go on, of two, where a driver was killed and its run is resumed.
    """

    victim: str
    how: str
    moment: str
    step: int = 0
    rank: int = 0
    then: int = WORKERS

    def __str__(self) -> str:
        after = "" if self.moment in ("start-up", "test") else f", step {self.step} on"
        others = "" if self.then == WORKERS else f"; {self.then} go on"
        return f"{self.how} the {self.victim} in {self.moment}{after}, rank {self.rank}{others}"

    @property
    def dropout(self) -> float:
        """Of the model: other workers would drop others."""
        return DROPOUT if self.then == WORKERS else 0


def draw(seed: int) -> Schedule:
    """A random schedule, the same for the same seed."""
    drawn = random.Random(seed)
    victim, how, moment = drawn.choice(VICTIMS), drawn.choice(("kill", "stall")), drawn.choice(MOMENTS)
    rank = 0 if moment.startswith("upload") else drawn.randrange(2)
    step = 0 if moment == "start-up" else drawn.randrange(STEPS)
    then = drawn.choice((1, 2, 3)) if (victim, how) == ("driver", "kill") else WORKERS
    return Schedule(victim, how, moment, step, rank, then)


@dataclass
class Outcome:
    """What came of a schedule: `wrong` says what should not be; times are in seconds."""

    schedule: Schedule
    recovered_s: float | None = None  # from the blow to the next step of a worker that was started after it
    restarts: int = 0
    resumed: bool = False
    identical: bool = False  # the weights, or with other workers the loss curve to rounding
    once: bool = False  # each sample of each epoch was trained on once, and each of the test set counted once
    wrong: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether all is as it should be."""
        return self.identical and self.once and not self.wrong


class Nodes:
    """A Ray cluster: a head for controller and driver, and three nodes with room for a worker each, one to spare."""

    def __init__(self) -> None:
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        ray.init(address=self.cluster.address, log_to_driver=False, logging_level="ERROR")
        self.fill()

    def fill(self) -> None:
        """Has three nodes, after some were lost."""
        while len(self.cluster.worker_nodes) < 3:
            self.cluster.add_node(num_cpus=1)
        self.cluster.wait_for_nodes()

    def processes(self, node_id: str) -> list[psutil.Process]:
        """Those of the node with this id, the workers too."""
        (node,) = (node for node in self.cluster.worker_nodes if node.node_id == node_id)
        roots = [psutil.Process(process.pid) for _, process in node.live_processes()]
        return [*roots, *(child for root in roots for child in root.children(recursive=True)), *processes_on(node_id)]

    def lose(self, node_id: str) -> None:
        """Ends what is left of a node, and forgets it."""
        (node,) = (node for node in self.cluster.worker_nodes if node.node_id == node_id)
        strike(self.processes(node_id), signal.SIGKILL)
        self.cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        """Ends all of it."""
        ray.shutdown()
        self.cluster.shutdown()


@contextmanager
def nodes() -> Iterator[Nodes]:
    """A cluster, for the time of the `with`."""
    cluster = Nodes()
    try:
        yield cluster
    finally:
        cluster.close()


def strike(processes: list[psutil.Process], how: signal.Signals) -> None:
    """Sends the signal to those that are there."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(how)


def start(folder: Path, cluster: Nodes, **options: Any) -> subprocess.Popen[str]:
    """The driver of a run in `folder`, with `program.train`'s options."""
    arguments = {"folder": str(folder), "address": cluster.cluster.address, "stall_timeout": STALL_TIMEOUT_S} | options
    with (folder / "driver.log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("program.py")), json.dumps(arguments)],
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )


def end(driver: subprocess.Popen[str], outcome: Outcome) -> None:
    """Waits for a driver, and for all that it has started to be gone."""
    try:
        status = driver.wait(RUN_S)
        if status:
            outcome.wrong.append(f"exit status {status}")
    except subprocess.TimeoutExpired:
        outcome.wrong.append(f"not done after {RUN_S} s")
        driver.kill()
        driver.wait()


def gone(what: Callable[[], Any], name: str) -> list[str]:
    """Waits until there is no more of it; says what is left."""
    try:
        wait_until(lambda: not what(), END_S, name)
    except AssertionError:
        return [f"{name} left: {what()}"]
    return []


def temporary() -> set[Path]:
    """What runs have in the temporary folder, of the cluster's processes too."""
    return set(Path(os.environ["TMPDIR"]).glob("ray_mnist-*"))


def left_behind(folder: Path, pids: set[int], before: set[Path]) -> list[str]:
    """What should have gone with the run: processes, actors, reservations, temporary files."""
    own = {".validate_storage_marker"}  # Ray's
    hidden = [path.name for path in folder.glob("run/.*") if path.name not in own]
    return [
        *gone(actors, "actors"),
        *gone(placement_groups, "placement groups"),
        *gone(lambda: [pid for pid in pids if psutil.pid_exists(pid)], "worker processes"),
        *([f"in the run folder: {hidden}"] if hidden else []),
        *(f"{path} left" for path in temporary() - before),
    ]


def victims(victim: str, reached: dict[str, Any], driver: subprocess.Popen[str], cluster: Nodes) -> list[Any]:
    """The processes to strike."""
    match victim:
        case "worker":
            return [psutil.Process(reached["pid"])]
        case "node":
            return cluster.processes(reached["node"])
        case "controller":
            return [psutil.Process(process_of(KeepingController.__name__))]
        case _:
            return [psutil.Process(driver.pid)]


def blow(schedule: Schedule, struck: list[Any], folder: Path) -> float:
    """Kills or stalls these, which a controller or a driver outlives; returns when."""
    strike(struck, signal.SIGKILL if schedule.how == "kill" else signal.SIGSTOP)
    at = time.time()
    if schedule.victim in ("controller", "driver"):
        (folder / STRUCK).touch()  # the worker that waits for the blow goes on
        if schedule.how == "stall":
            time.sleep(PAUSE_S)
            strike(struck, signal.SIGCONT)
    return at


def carry_out(schedule: Schedule, folder: Path, cluster: Nodes, expected: dict[str, Any]) -> Outcome:
    """A run in `folder`, which is struck; `expected` is what it should come to."""
    outcome = Outcome(schedule)
    aim = {name: getattr(schedule, name) for name in ("moment", "step", "rank", "dropout")}
    before, reached, struck_at = temporary(), dict[str, Any](), 0.0
    driver = start(folder, cluster, **aim)
    try:
        wait_until(lambda: (folder / REACHED).exists() or driver.poll() is not None, RUN_S, str(schedule))
        if (folder / REACHED).exists():
            reached = json.loads((folder / REACHED).read_text())
            struck_at = blow(schedule, victims(schedule.victim, reached, driver, cluster), folder)
            if (schedule.victim, schedule.how) == ("driver", "kill"):
                driver.wait()
                outcome.wrong += gone(actors, "actors of the driver that was killed")
                outcome.resumed = True
                then = {"num_workers": schedule.then, "dropout": schedule.dropout}
                driver = start(folder, cluster, resume=True, **then)
        end(driver, outcome)
    finally:
        driver.kill()
        if schedule.victim == "node" and reached:
            cluster.lose(reached["node"])
            cluster.fill()
    begun = (
        [json.loads(line) for line in (folder / BEGUN).read_text().splitlines()] if (folder / BEGUN).exists() else []
    )
    outcome.wrong += [] if reached else ["it ended before"]
    outcome.wrong += left_behind(folder, {each["pid"] for each in (*begun, reached) if each}, before)
    if (folder / OUTCOME).exists():
        compare(outcome, torch.load(folder / OUTCOME), expected)
    if begun and (outcome.restarts or outcome.resumed):
        # Those before may have gone on for a moment, and have been more.
        newest = {each["rank"]: each["time"] for each in begun if each["rank"] < schedule.then}
        outcome.recovered_s = min(newest.values()) - struck_at
    return outcome


def compare(outcome: Outcome, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Notes how what a run came to differs from what it should come to."""
    weights, wanted, result, came_to = found["weights"], expected["weights"], found["result"], expected["result"]
    outcome.restarts = result["restarts"]
    if outcome.schedule.then != WORKERS:  # who add up in another order
        came_to = {name: value and pytest.approx(value, rel=1e-4) for name, value in came_to.items()}
    differs = [name for name in ("steps", "train_loss", "val_loss") if result[name] != came_to[name]]
    outcome.wrong += [f"{name} is {result[name]}, not {came_to[name]}" for name in differs]
    same_weights = all(torch.equal(weights[name], wanted[name]) for name in wanted)
    outcome.identical = same_weights if outcome.schedule.then == WORKERS else not differs
    outcome.once = (
        bool((weights["seen"] == 1).all() and (found["tested"] == 1).all()) and result["test_samples"] == TEST
    )
