"""When workers make room for others: only once all of them have checkpointed, and for a reason that is told."""

import json
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from ray.train import ControllerError, ScalingConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.config import FailureConfig

from ray_mnist import MNISTDataModule, SimpleModel, Trainer
from ray_mnist import ray_scaling_internals as scaling
from ray_mnist.checks.preflight import WAIT_FOR_NODES_S
from ray_mnist.errors import RequestError, TrainingError
from ray_mnist.launch import pause
from ray_mnist.launch import ray as on_ray
from ray_mnist.launch.exchange import ASK_S, Exchange, Member
from ray_mnist.run.events import Event, WorkersChanged
from ray_mnist.run.folder import RunFolder
from ray_mnist.run.records import CHANGES


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Group:
    """Workers that answer when the test says so."""

    def __init__(self, *nodes: str) -> None:
        self.questions: list[Any] = []
        self.asked: list[Future[Any]] = []
        self.members = [Member(node, f"host-{node}", self.ask) for node in nodes]

    def ask(self, question: Any) -> Future[Any]:
        self.questions.append(question)
        self.asked.append(Future())
        return self.asked[-1]

    def answer(self, *answers: Any) -> None:
        for future, answer in zip(self.asked, answers, strict=True):
            future.set_exception(answer) if isinstance(answer, Exception) else future.set_result(answer)
        self.asked.clear()


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def exchange(tmp_path: Path, told: list[str]) -> Exchange:
    def send(events: list[Event]) -> None:
        told.extend(event.message for event in events if isinstance(event, WorkersChanged))

    return Exchange(RunFolder(str(tmp_path), "run"), 2, 3, send, True, Clock())


def started(exchange: Exchange, *nodes: str) -> Group:
    group = Group(*nodes)
    exchange.starting(len(nodes))
    exchange.began(group.members)
    return group


def changes(folder: Path) -> list[list[Any]]:
    file = folder / "run" / CHANGES
    return [list(json.loads(line).values()) for line in file.read_text().splitlines()] if file.exists() else []


def test_workers_make_room_once_all_know_and_have_checkpointed(
    exchange: Exchange, told: list[str], tmp_path: Path
) -> None:
    group = started(exchange, "a", "b")
    assert not exchange.is_ready(None, {})
    assert not exchange.is_ready(2, {})
    assert group.questions == []
    assert not exchange.is_ready(3, {})
    assert group.questions == [pause.announce] * 2
    group.answer(True, False)  # whose training has not begun
    assert not exchange.is_ready(None, {})
    assert group.asked == []
    exchange.clock.now += ASK_S  # type: ignore[attr-defined]
    assert not exchange.is_ready(None, {})
    assert group.questions == [pause.announce] * 4
    group.answer(True, True)
    assert not exchange.is_ready(None, {})
    assert group.questions[4:] == [pause.begin] * 2
    assert not exchange.is_ready(None, {})
    group.answer(True, True)
    assert exchange.is_ready(None, {})
    exchange.starting(3)
    assert told == [
        "2 start, of 2 to 3",
        "there is room for 3: all checkpoint, for 3 to go on instead of 2",
        "3 start instead of 2: there is room for 3",
    ]
    assert changes(tmp_path) == [[2, 3, "there is room for 3"]]
    assert not exchange.is_ready(None, {})


def test_a_node_that_will_be_taken_away_is_left_in_time(
    exchange: Exchange, told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    group = started(exchange, "a", "b", "c")
    assert not exchange.is_ready(None, {"x": 0})
    assert not exchange.is_ready(2, {})  # one has died, which its worker's failure will tell
    assert group.questions == []
    assert not exchange.is_ready(None, {"b": 1_015_300})
    for _ in range(2):
        group.answer(True, True, True)
        ready = exchange.is_ready(None, {"b": 1})
    assert ready
    exchange.starting(3)
    assert told[1:] == [
        "host-b will be taken away in 15 s: all checkpoint, for others to go on",
        "3 start: host-b will be taken away",
    ]
    assert changes(tmp_path) == [[3, 3, "host-b will be taken away"]]


def test_a_worker_that_dies_meanwhile_is_a_failure_like_any_other(exchange: Exchange, told: list[str]) -> None:
    group = started(exchange, "a", "b", "c")
    assert not exchange.is_ready(None, {"a": 0})
    group.answer(True, True, RuntimeError("died"))
    assert not exchange.is_ready(None, {"a": 0})
    assert group.asked == []
    exchange.starting(2)
    assert told[-1] == "2 start instead of 3: host-a will be taken away"


def test_fewer_that_go_on_after_a_failure_are_told(exchange: Exchange, told: list[str], tmp_path: Path) -> None:
    started(exchange, "a", "b", "c")
    started(exchange, "a", "b")
    started(exchange, "a", "b")
    assert told == ["3 start, of 2 to 3", "2 start instead of 3: workers failed"]
    assert changes(tmp_path) == [[3, 2, "workers failed"]]


def test_what_has_no_checkpoints_goes_on_as_it_is(exchange: Exchange) -> None:
    exchange.can_pause = False
    group = started(exchange, "a", "b")
    assert not exchange.is_ready(3, {"a": 0})
    assert group.questions == []


def test_it_does_not_wait_for_room_for_ever(exchange: Exchange) -> None:
    exchange.keep_waiting()
    exchange.clock.now = WAIT_FOR_NODES_S  # type: ignore[attr-defined]
    exchange.keep_waiting()
    exchange.clock.now += 1  # type: ignore[attr-defined]
    with pytest.raises(TrainingError, match="no room for at least 2 workers in 600 s"):
        exchange.keep_waiting()
    started(exchange, "a", "b")
    exchange.keep_waiting()


# In a worker


def test_a_training_that_is_to_make_room_waits_and_one_that_is_to_end_does_not() -> None:
    pause.HERE.clear()
    assert not pause.announce()
    stop = threading.Event()
    pause.follow(stop)
    pause.wait_if_asked()  # SIGTERM
    assert pause.announce()
    assert not stop.is_set()
    assert not pause.begin()
    assert stop.is_set()
    threading.Thread(target=pause.wait_if_asked, daemon=True).start()
    assert pause.HERE[0].reached.wait(240)
    assert pause.begin()


def test_a_training_that_is_over_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(config: dict[str, Any]) -> None:
        pause.follow(threading.Event())
        assert pause.announce()

    monkeypatch.setattr(on_ray, "train", train)
    on_ray.train_function({})
    assert not pause.announce()


# What Ray's controller asks


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, float]]:
    """What each node has free; `x` will be taken away."""
    resources: dict[str, dict[str, float]] = {"x": {"CPU": 8}}
    monkeypatch.setattr(scaling, "available_resources_per_node", lambda: {n: dict(r) for n, r in resources.items()})
    monkeypatch.setattr(scaling.global_state, "get_draining_nodes", lambda: {"x": 0})
    monkeypatch.setattr(scaling.ElasticWorkers, "_maybe_send_resource_request", lambda self: None)
    return resources


def policy_of(exchange: Exchange, **options: Any) -> Any:
    config = ScalingConfig(num_workers=(2, 3), elastic_resize_monitor_interval_s=0, **options)
    return scaling.policies(config, FailureConfig(max_failures=0), exchange)["scaling_policy"]


@pytest.mark.parametrize("num_workers", [2, (2, 3)])
def test_on_a_ray_of_its_own_no_autoscaler_is_asked(exchange: Exchange, num_workers: Any) -> None:
    config = ScalingConfig(num_workers=num_workers)
    policy = scaling.policies(config, FailureConfig(max_failures=0), exchange, here=True)["scaling_policy"]
    policy.after_controller_start(None)  # Ray's own would look for a Ray, of which there is none
    policy._send_resource_request()
    policy._maybe_send_resource_request()
    policy._cancel_resource_request()


def test_as_many_start_as_there_is_room_for_now(exchange: Exchange, free: dict[str, dict[str, float]]) -> None:
    policy = policy_of(exchange)
    free |= {"a": {"CPU": 1}, "b": {"CPU": 1}}
    assert policy.make_decision_for_non_running_worker_group().num_workers == 2
    free["c"] = {"CPU": 8}
    assert policy.make_decision_for_non_running_worker_group().num_workers == 3
    free["a"] = free["b"] = {"memory": 1}  # the run's own have the CPUs
    del free["c"]
    started(exchange, "a", "b", "dead")
    assert policy.make_decision_for_non_running_worker_group().num_workers == 2


def test_a_gpu_with_too_few_cpus_is_no_room(exchange: Exchange, free: dict[str, dict[str, float]]) -> None:
    policy = policy_of(exchange, use_gpu=True, resources_per_worker={"CPU": 4, "GPU": 1})
    free |= {"a": {"CPU": 8, "GPU": 4}, "b": {"CPU": 3, "GPU": 1}}
    assert policy.make_decision_for_non_running_worker_group().num_workers == 2


def test_it_waits_for_room_and_gives_up_in_time(
    exchange: Exchange, free: dict[str, dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, slept = policy_of(exchange), []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        exchange.clock.now += seconds  # type: ignore[attr-defined]
        if len(slept) == 3:
            free.update({"a": {"CPU": 2}})

    monkeypatch.setattr(scaling.time, "sleep", sleep)
    monkeypatch.setattr(policy, "GET_RESERVED_RESOURCES_INTERVAL_S", 100)
    assert policy.make_decision_for_non_running_worker_group().num_workers == 2
    assert len(slept) == 3
    free.clear()
    with pytest.raises(TrainingError, match="no room"):
        policy.make_decision_for_non_running_worker_group()


def test_a_healthy_group_is_exchanged_for_a_larger_one_only(
    exchange: Exchange, free: dict[str, dict[str, float]]
) -> None:
    policy = policy_of(exchange)
    group = started(exchange, "a", "b")

    def decide() -> Any:
        state: Any = type("State", (), {"start_time": 0.0, "num_workers": 2})
        return policy.make_decision_for_running_worker_group(state, None)

    free |= {"a": {}, "b": {}}
    assert isinstance(decide(), scaling.NoopDecision)
    del free["b"]  # it died, which its worker's failure will tell
    assert isinstance(decide(), scaling.NoopDecision)
    assert group.questions == []
    free |= {"b": {}, "c": {"CPU": 1}}
    assert isinstance(decide(), scaling.NoopDecision)
    for _ in range(2):
        group.answer(True, True)
        decision = decide()
    assert decision.num_workers == 3


def test_what_was_no_room_after_all_is_no_failure(exchange: Exchange) -> None:
    config = ScalingConfig(num_workers=(2, 3))
    policy = scaling.policies(config, FailureConfig(max_failures=0, controller_failure_limit=0), exchange)
    decide = policy["failure_policy"].make_decision
    assert decide(ControllerError(WorkerGroupStartupTimeoutError(3))) is FailureDecision.RETRY
    assert decide(ControllerError(WorkerGroupStartupFailedError("died"))) is FailureDecision.RAISE


def test_loaders_that_share_themselves_out_keep_their_workers(tmp_path: Path) -> None:
    trainer = Trainer(num_workers=(2, 3), use_distributed_sampler=False, storage_path=str(tmp_path / "runs"))
    with pytest.raises(RequestError, match="num_workers as a range and use_distributed_sampler=False were both given"):
        trainer.fit(SimpleModel(), MNISTDataModule("digits"))
    assert not (tmp_path / "runs").exists()


def test_the_batch_has_to_be_enough_for_the_most_workers(tmp_path: Path) -> None:
    trainer = Trainer(num_workers=(2, 4), storage_path=str(tmp_path / "runs"))
    with pytest.raises(RequestError, match=r"--batch-size 3 is the batch over all workers, .*: use at least 4"):
        trainer.fit(SimpleModel(), MNISTDataModule("digits", batch_size=3))
    assert not (tmp_path / "runs").exists()
