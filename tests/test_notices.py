"""The agent that watches a cloud's metadata for the notice that its machine will be taken away."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from metadata_server import SPOT, Metadata, in_s, metadata_server, spot

from ray_mnist import notices
from ray_mnist.notices import AWS, Notice, drain, gcp, watch

EVENTS = "/latest/meta-data/events/maintenance/scheduled"
GOOGLE = "/computeMetadata/v1/instance"


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[Metadata]:
    with metadata_server() as metadata:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://{metadata.host}/")
        monkeypatch.setenv("GCE_METADATA_HOST", metadata.host)
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # the machine's own server is behind none
        monkeypatch.delenv("no_proxy", raising=False)
        yield metadata


def event(seconds: float, state: str = "active") -> str:
    return json.dumps(
        [{"Code": "instance-stop", "State": state, "NotBefore": format_datetime(in_s(seconds), usegmt=True)}]
    )


def test_aws_is_asked_with_a_token_that_is_renewed_when_it_is_old(metadata: Metadata) -> None:
    ask = AWS()
    assert ask() is None
    assert ask() is None
    assert metadata.asked == [
        ("PUT", "/latest/api/token", 200),
        *[("GET", SPOT, 404), ("GET", EVENTS, 404)] * 2,
    ]
    metadata.token = "second"
    metadata.pages[SPOT] = spot(120)
    with pytest.raises(OSError, match="401"):
        ask()
    notice = ask()
    assert notice is not None
    assert notice.why == "spot terminate"
    assert 60 < notice.seconds <= 120


@pytest.mark.parametrize(
    ("seconds", "state", "noticed"), [(600, "active", True), (90000, "active", False), (600, "canceled", False)]
)
def test_maintenance_on_aws_counts_when_it_is_near(seconds: int, state: str, noticed: bool, metadata: Metadata) -> None:
    metadata.pages[EVENTS] = event(seconds, state)
    notice = AWS()()
    assert (notice is not None) == noticed
    assert notice is None or (notice.why == "instance-stop" and 500 < notice.seconds <= 600)


@pytest.mark.parametrize(
    ("pages", "expected"),
    [
        ({}, None),
        ({"preempted": "FALSE", "maintenance-event": "NONE"}, None),
        ({"preempted": "FALSE", "maintenance-event": "MIGRATE_ON_HOST_MAINTENANCE"}, None),
        ({"preempted": "TRUE", "maintenance-event": "NONE"}, Notice(30, "preempted")),
        ({"preempted": "FALSE", "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}, Notice(3600, "maintenance")),
    ],
)
def test_google(pages: dict[str, str], expected: Notice | None, metadata: Metadata) -> None:
    metadata.pages = {f"{GOOGLE}/{name}": page for name, page in pages.items()}
    assert gcp() == expected


def test_a_metadata_server_that_fails_for_a_while_is_asked_again(
    metadata: Metadata, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = ["not JSON", "not JSON", "{}", spot(60)]

    def next_answer(seconds: float) -> None:
        metadata.pages[SPOT] = answers.pop(0)

    monkeypatch.setattr(notices, "time", SimpleNamespace(sleep=next_answer, time=time.time))
    host = metadata.host
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:1")
    ask = AWS()
    with pytest.raises(OSError, match="refused"):
        ask()
    ask.url = f"http://{host}"
    assert watch(ask).why == "spot terminate"
    assert [line.split(":")[1] for line in capsys.readouterr().err.splitlines()] == [" JSONDecodeError", " KeyError"]


@pytest.mark.parametrize(("fails", "drained"), [(2, True), (100, False)])
def test_ray_is_told_again_as_long_as_there_is_time(fails: int, drained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[list[str]] = []
    clock = SimpleNamespace(now=0.0)

    def run(command: list[str]) -> Any:
        told.append(command)
        return SimpleNamespace(returncode=int(len(told) <= fails))

    def sleep(seconds: float) -> None:
        clock.now += seconds

    monkeypatch.setattr(notices, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: clock.now))
    monkeypatch.setattr(notices.subprocess, "run", run)
    assert drain(Notice(30, "preempted"), None) is drained
    assert len(told) == (3 if drained else 32)
    assert told[0][-4:] == ["--reason-message", "preempted", "--deadline-remaining-seconds", "30"]


def test_it_needs_neither_ray_nor_torch_in_memory() -> None:
    program = "import sys, ray_mnist.notices; print({'ray', 'torch', 'yaml'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=600)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(("name", "cloud"), [("gpu.yaml", "aws"), ("gpu-gcp.yaml", "gcp")])
def test_cluster_files_start_it_on_each_worker(name: str, cloud: str) -> None:
    import yaml

    config = yaml.safe_load((Path(__file__).parents[1] / "cluster" / name).read_text())
    assert f"python -m ray_mnist.notices {cloud} " in config["worker_start_ray_commands"][-1]
    assert not any("ray_mnist.notices" in command for command in config["head_start_ray_commands"])
