"""What a run tells on its way to the terminal: all of it arrives, and whatever goes wrong with it harms no run."""

import asyncio
import os
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
import ray
from conftest import wait_until

from ray_mnist.launch import channel
from ray_mnist.launch.channel import Outbox, over_pipe, over_ray
from ray_mnist.run.events import EpochEnded, Event, Progress


def news(number: int) -> EpochEnded:
    return EpochEnded({"epoch": number})


@ray.remote(num_cpus=0)
def send_ten(send: channel.Send, first: int) -> None:
    outbox = Outbox(send)
    for number in range(first, first + 10):
        outbox.tell(news(number))
    outbox.close()


@pytest.mark.usefixtures("cluster")
def test_all_that_workers_told_has_arrived_in_its_order_when_the_run_returns() -> None:
    told: list[Event] = []
    stop = threading.Event()
    with over_ray(told.append, "run") as send:
        send.call_on_stop(stop.set)
        ray.get([send_ten.remote(send, first) for first in (0, 100)])
        assert not stop.is_set()
        ray.get(send.mailbox.stop.remote())
        assert stop.wait(240)
    assert [event for event in told if event.row["epoch"] < 100] == [news(number) for number in range(10)]
    assert [event for event in told if event.row["epoch"] >= 100] == [news(number) for number in range(100, 110)]


@pytest.mark.usefixtures("cluster")
def test_a_queue_that_died_or_is_full_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "QUEUED", 2)
    told: list[Event] = []
    begun, go_on = threading.Event(), threading.Event()

    def tell(event: Event) -> None:
        begun.set()
        assert go_on.wait(240)
        told.append(event)

    with over_ray(tell, "run") as send:
        send([news(0)])
        assert begun.wait(240)
        for number in range(1, 10):  # more than there is room for, as long as nobody takes them
            send([news(number)])
        go_on.set()
        wait_until(lambda: len(told) >= 3, 600, "those that had room to arrive")
        ray.kill(send.mailbox)
        ray.get(send_ten.remote(send, 100))
    assert told == [news(number) for number in range(3)]


def test_a_driver_that_is_late_is_told_everything_but_how_far_the_run_is() -> None:
    progress = Progress("training", 1, 1, None, None, None, None, 1, None, 0, None, None)

    async def told() -> list[list[Event]]:
        mailbox = channel.Mailbox(1000, "run")
        for _ in range(20):
            await mailbox.put([progress])
            await mailbox.put([progress, news(1)])
        return [await mailbox.get() or [] for _ in range(mailbox.events.qsize())]

    assert asyncio.run(told()) == 5 * [[progress], [progress, news(1)]] + 15 * [[news(1)]]


def test_who_tells_never_waits_for_a_queue_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "PATIENCE_S", 0.1)
    monkeypatch.setattr(channel, "PENDING", 5)
    stuck, free, sent = threading.Event(), threading.Event(), list[Event]()

    def send(events: list[Event]) -> None:
        sent.extend(events)
        stuck.set()
        assert free.wait(240)

    outbox = Outbox(send)
    outbox.tell(news(0))
    assert stuck.wait(240)
    for number in range(1, 100):
        outbox.tell(news(number))
    outbox.close()
    free.set()
    outbox.thread.join(240)
    assert sent == [news(0), *map(news, range(95, 100))]  # the newest, as many as are kept


def tell_from_a_fork(send: Any) -> None:
    outbox = Outbox(send)
    outbox.tell(news(1))
    outbox.close()
    outbox.tell(news(2))
    os._exit(0)


def test_what_a_forked_process_told_has_arrived_when_it_is_gone() -> None:
    told: list[Event] = []
    with over_pipe(told.append) as send, ProcessPoolExecutor(1, get_context("fork")) as processes:
        assert processes.submit(tell_from_a_fork, send).exception(240) is not None  # it is gone
    assert told == [news(1)]
