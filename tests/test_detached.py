"""A run that is handed to a Ray cluster, and goes on there whatever becomes of the process that did so."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from conftest import free_port, ray_head, wait_until
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from ray_mnist import train
from ray_mnist.checks import preflight
from ray_mnist.cli import console
from ray_mnist.config import RunConfig
from ray_mnist.errors import RequestError
from ray_mnist.launch import detached

pytestmark = pytest.mark.timeout(1800)  # for a machine with much else to do
DIGITS = ["--dataset", "digits", "--num-workers", "2"]
Start = Callable[..., "Command"]


@pytest.fixture
def refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one sentence with which `python -m ray_mnist.train <arguments>` is refused on a machine without a cluster."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preflight, "this_machines_cluster", lambda: None)
    monkeypatch.setenv(detached.API_SERVER, "")  # put back afterwards
    monkeypatch.setenv("no_proxy", "*")

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["train", *arguments])
        assert console.exit_status(train.train) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n"), err[:7]) == ("", 1, "error: ")
        assert not list(tmp_path.iterdir())
        return err

    return call


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--detach", "--dataset", "digits"], "--detach needs --num-workers"),
        (["--detach", *DIGITS], "no Ray cluster here that goes on without this process: start one with `ray start"),
        (["--detach", *DIGITS, "--address", "local"], "no Ray cluster here that goes on"),
        (["--detach", *DIGITS, "--address", "here"], "--address here is not an address"),
        (["--detach", *DIGITS, "--lr", "x"], "--model.lr"),
        (["--attach", "run"], "no Ray cluster here that goes on"),
        (["--attach", "run", *DIGITS], "unrecognized arguments: --dataset digits --num-workers 2"),
        (["--attach"], "--attach: expected one argument"),
    ],
)
def test_what_cannot_be_is_refused(arguments: list[str], said: str, refusal: Callable[..., str]) -> None:
    assert said in refusal(*arguments)


def test_a_dashboard_that_is_not_there_is_named(refusal: Callable[..., str]) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    assert f"The Ray cluster at {address} takes no jobs" in refusal("--attach", "run", "--address", address)


def test_a_folder_of_this_machine_is_none_of_the_clusters() -> None:
    config = RunConfig(num_workers=2, address="http://head:8265", storage_path="runs")
    with pytest.raises(RequestError, match=r"^--storage-path runs is a folder on this machine, and the run will be on"):
        detached.submit(MagicMock(), config, [], "id", has_files=False)


def job(entrypoint: str = "", status: JobStatus = JobStatus.FAILED, code: int | None = None) -> JobDetails:
    return JobDetails(
        type="SUBMISSION", submission_id="id", status=status, entrypoint=entrypoint, driver_exit_code=code
    )


@pytest.mark.parametrize(
    ("entrypoint", "name"),
    [
        ("python -m ray_mnist.train --name run --num-workers 2", "run"),
        ("cd '/a b' && exec python -m ray_mnist.train --name=a --name='a b'", "a b"),
        ("python script.py --name", "id"),
        ("python script.py 'half", "id"),
    ],
)
def test_a_run_has_the_name_that_its_command_gives_it(entrypoint: str, name: str) -> None:
    assert detached.name_of(job(entrypoint)) == name


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.FAILED, 1, 1),
        (JobStatus.FAILED, 2, 2),
        (JobStatus.FAILED, -9, 137),
        (JobStatus.FAILED, None, 1),
        (JobStatus.STOPPED, None, 143),
    ],
)
def test_the_status_is_the_runs(status: JobStatus, code: int | None, expected: int) -> None:
    assert detached.status_of(job(status=status, code=code)) == expected


def test_followed_is_what_goes_on_or_was_not_refused() -> None:
    done, refused = job(status=JobStatus.SUCCEEDED, code=0), job(code=2)
    done.start_time, refused.start_time = 1, 2
    assert detached.newest([done, refused]) is done
    goes_on = job(status=JobStatus.RUNNING)
    assert detached.newest([goes_on, done, refused]) is goes_on


class Command:
    """`python -m ray_mnist.train <arguments>`, running, and what it says meanwhile."""

    def __init__(self, folder: Path, number: int, arguments: tuple[str, ...]) -> None:
        self.file = folder / f"said-{number}"
        with self.file.open("w") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ray_mnist.train", *arguments],
                cwd=folder / "project",
                stdout=said,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's `&` has it ignored
            )

    def said(self) -> list[str]:
        return self.file.read_text().splitlines()

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in self.file.read_text(), 600, text)

    def end(self) -> int:
        return self.process.wait(600)


# It waits in the second epoch of very many until it is stopped: all that follow the run have the cores meanwhile.
NETS = """
import time

import ray_mnist
from ray_mnist.launch import pause

class Net(ray_mnist.SimpleModel):
    def on_train_batch_start(self, batch, batch_idx):
        while self.trainer.max_epochs == 100_000 and self.current_epoch == 1 and not pause.HERE[0].stop.is_set():
            time.sleep(0.05)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts `Command`s, in a folder that has a module."""
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "nets.py").write_text(NETS)
    commands: list[Command] = []

    def call(*arguments: str) -> Command:
        commands.append(Command(tmp_path, len(commands), arguments))
        return commands[-1]

    yield call
    for command in commands:
        command.process.kill()


@pytest.fixture
def address() -> Iterator[str]:
    """A Ray cluster on this machine that takes jobs."""
    ports = [f"--dashboard-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}"]
    options = ["--num-cpus=4", "--num-gpus=0", "--include-dashboard=true", *ports]
    with ray_head(*options) as address, pytest.MonkeyPatch.context() as patch:
        patch.setenv(detached.API_SERVER, address)
        client = JobSubmissionClient()

        def takes_jobs() -> bool:
            with suppress(RuntimeError):  # what runs them on the head is still starting
                client.submit_job(entrypoint="true")
                return True
            return False

        wait_until(takes_jobs, 120, "the head to take jobs")
        yield address


@pytest.mark.slow
def test_a_run_outlives_what_started_it_and_what_follows_it(
    start: Start, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the folder that it was started from, and resumed in a copy of that, as on another machine."""
    runs = tmp_path / "runs"
    net = [*DIGITS, "--model", "nets.Net", "--storage-path", str(runs), "--name", "run"]
    at = ["--address", address]
    begun = start("--detach", *net, "--max-epochs", "100000", *at)
    assert begun.end() == 0, begun.said()
    how = f"follow it with `python -m ray_mnist.train --attach run --address {address}`, stop it with `ray job stop run"
    assert begun.said()[-1].startswith(f"detached: the run run goes on in the cluster; {how}")

    killed, interrupted = start("--attach", "run", *at), start("--attach", "run", *at)
    for follower, sent in ((killed, signal.SIGKILL), (interrupted, signal.SIGINT)):
        follower.wait_for("\nepoch      1/100000")
        os.kill(follower.process.pid, sent)
    assert killed.end() == -signal.SIGKILL
    assert interrupted.end() == 130
    assert interrupted.said()[-1].startswith("interrupted: the run goes on in the cluster; follow it with")

    again = start("--detach", *net, *at)
    unknown = start("--attach", "other", *at)
    assert again.end() == 2
    assert "is in use by process" in again.said()[-1]
    assert unknown.end() == 2
    assert "has no such run, but run" in unknown.said()[-1]

    follower = start("--attach", "run", *at)  # not the one that was refused
    follower.wait_for("\nepoch      1/100000")
    monkeypatch.setenv(detached.API_SERVER, address)
    client = JobSubmissionClient()
    client.stop_job("run")
    assert follower.end() == 143
    assert follower.said()[-1].startswith("terminated: go on with `python -m ray_mnist.train --resume --name run")

    (row, *_) = reversed((runs / "run" / "metrics.csv").read_text().splitlines())
    epochs = int(row.partition(",")[0]) + 2
    there = ["--address", client.get_address()]
    resume = ["--detach", *net, "--resume", "--max-epochs", str(epochs), *there]
    resumed = start(*resume)
    assert resumed.end() == 0, resumed.said()
    last, after = start("--attach", "run", *there), start("--attach", "run-3", *there)
    assert last.end() == after.end() == 0, last.said()
    assert last.said() == after.said()
    assert last.said()[-1].startswith("test accuracy ")
    result = json.loads((runs / "run" / "result.json").read_text())
    assert (result["epochs"], result["num_workers"], result["restarts"]) == (epochs, 2, 0)
    assert "_ray_pkg_" in client.get_job_info("run-3").runtime_env["working_dir"]
