"""Keeps the workers of a run that ended well, and Ray with them, for the next call of this process.

It imports neither torch nor Lightning, which takes seconds.
"""

import atexit
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError

from ray_mnist import ray_internals
from ray_mnist.config import RunConfig

LOOK_S = 1  # how often is looked whether somebody waits for what is kept
ANSWER_S = 10
SEEDS = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")  # Lightning's, which each run sets in its workers


class Keeper:
    """What this process has of Ray between two calls: one at a time has it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.called = threading.Event()  # ends the wait for a call
        self.session: Any = None  # Ray's, in which the rest is
        self.ray_for: Any = None  # what Ray was started or joined for; None where that was not done here
        self.cpus = math.inf  # of the Ray that was started here
        self.workers_for: Any = None  # what the workers of the last call are for
        self.controller: Any = None  # their controller
        self.end: Callable[[Any], None] = ray.kill  # ends both
        atexit.register(self.give_back)  # before Ray's own: nobody is to ask it any more

    def take_up(self, config: RunConfig, cpus: int) -> None:
        """Begins a call that needs `cpus`: gives back what it has no use for, or what died meanwhile."""
        with self.lock:
            self.called.set()
            if self.session != session():  # the user's code has ended it
                self.session = self.ray_for = self.controller = None
            if self.controller is not None and (self.workers_for != needs(config) or not self._answers()):
                self._end_workers()
            self.workers_for = needs(config)
            if self.ray_for not in (None, surroundings(config)) or cpus > self.cpus:
                self.give_back()

    def own_ray(self, config: RunConfig, cpus: float) -> None:
        """Has Ray, which was started with `cpus` or joined for this call, end when it is given back."""
        self.session, self.cpus = session(), cpus
        self.ray_for, self.workers_for = surroundings(config), needs(config)  # with what starting it has changed

    def keep_workers(self, controller: Any, end: Callable[[Any], None]) -> None:
        """Takes the controller that has the workers of this call's run, which ended well, and what ends them."""
        self.session, self.controller, self.end = session(), controller, end

    def take_controller(self) -> Any:
        """The controller of the kept workers, for the run that will end it if it fails; None if there are none."""
        controller, self.controller = self.controller, None
        return controller

    def wait(self, seconds: float) -> None:
        """Ends a call that went well: gives back after so many seconds, unless there is a call before."""
        if not seconds:
            self.give_back()
            return
        self.called = threading.Event()
        threading.Thread(target=self._watch, args=[self.called, seconds], daemon=True).start()

    def _watch(self, called: threading.Event, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not called.wait(max(0, min(LOOK_S, until - time.monotonic()))):
            with self.lock:
                if called.is_set():
                    return
                if time.monotonic() >= until or self._is_of_no_use():
                    self.give_back()

    def _is_of_no_use(self) -> bool:
        try:
            return self.session != session() or ray_internals.somebody_waits()
        except (AttributeError, RayError):  # the user's code ends Ray at this moment, or the cluster has died
            return True

    def _answers(self) -> bool:
        try:
            ray.get(self.controller.get_state.remote(), timeout=ANSWER_S)
        except RayError:
            return False
        return True

    def _end_workers(self) -> None:
        controller = self.take_controller()
        if controller is not None and self.session == session():
            with suppress(RayError, RuntimeError):  # such as the cluster's death
                self.end(controller)

    def give_back(self) -> None:
        """Ends the workers, and Ray where that was started or joined here."""
        with self.lock:
            self.called.set()
            self._end_workers()
            if self.ray_for is not None and self.session == session():
                ray.shutdown()
            self.ray_for, self.cpus = None, math.inf


KEEPER = Keeper()


def session() -> Any:
    """Which connection to which Ray this process has; None where there is none."""
    if not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    return context.gcs_address, context.get_node_id(), context.get_job_id()


def surroundings(config: RunConfig) -> Any:
    """What a new Ray, and a new worker in it, would take over from this process or its options."""
    environment = {name: value for name, value in os.environ.items() if name not in SEEDS}
    return config.address, config.dashboard, os.getcwd(), [*sys.path], environment


def needs(config: RunConfig) -> Any:
    """What a new worker would be like."""
    return surroundings(config), config.num_workers, config.use_gpu, config.cpus_per_worker
