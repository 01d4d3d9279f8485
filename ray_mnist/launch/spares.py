"""Workers that wait for those of a run to die, in Ray Train's controller: starting and importing takes them seconds.

It imports neither torch nor Lightning, which takes seconds.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_mnist.ray_internals import start_worker

AFTER_S = 30  # that a run has trained, so that a short one has no more processes than it needs
ANSWER_S = 10  # in which a worker that is well answers


@dataclass(frozen=True)
class Spare:
    """A worker on a node; `prepared` is there once it has imported what it runs."""

    node: str
    actor: Any
    prepared: Any


class Spares:
    """As many workers as the run has on each of its nodes, for the next that it starts there.

    They end with Ray Train's controller, whose they are, or when they are told to.

    Args:
        prepare: what each calls first.
        threads: on how many NumPy computes in each.
        after_s: starts them so many seconds after those that train.
        clock: in seconds.
    """

    def __init__(
        self, prepare: Callable[[], None], threads: str, after_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.prepare, self.threads, self.after_s, self.clock = prepare, threads, after_s, clock
        self.waiting: list[Spare] = []
        self.well_since: float | None = None

    def look(self, nodes: Sequence[str]) -> None:
        """Starts what is missing, where it is time; `nodes` are those of the workers, all of which are well."""
        self._end([spare for spare in self.waiting if spare.node not in nodes])  # a drained node is to become idle
        if self.well_since is None:
            self.well_since = self.clock()
        if self.clock() - self.well_since < self.after_s:
            return
        for node in (Counter(nodes) - Counter(spare.node for spare in self.waiting)).elements():
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            self.waiting.append(Spare(node, *start_worker(self.prepare, self.threads, scheduling_strategy=there)))

    def take(self, node: str) -> tuple[Any, Any] | None:
        """A worker on that node that has imported all, and what it tells of itself; None if there is none."""
        self.well_since = None
        for spare in [spare for spare in self.waiting if spare.node == node]:
            if ray.wait([spare.prepared], timeout=0)[0]:
                self.waiting.remove(spare)
                try:
                    about = spare.actor.get_metadata.remote()
                    return spare.actor, ray.get([spare.prepared, about], timeout=ANSWER_S)[1]
                except RayError:
                    ray.kill(spare.actor)
        return None

    def end(self) -> None:
        """Ends those that wait."""
        self._end(self.waiting)

    def _end(self, spares: Sequence[Spare]) -> None:
        for spare in [*spares]:
            ray.kill(spare.actor)
            self.waiting.remove(spare)
