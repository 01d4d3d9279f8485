"""How far this worker is, for who asks in another of its threads.

It imports neither torch nor Lightning, which takes seconds.
"""

import sys
import threading
import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

START_UP, CHECKPOINT = "start-up", "checkpoint"
# Of each of Lightning's stages the word for it, and the trainer's loaders, which are there when its start-up is over.
STAGES = {
    "train": ("training", "train_dataloader"),
    "validate": ("validation", "val_dataloaders"),
    "test": ("test", "test_dataloaders"),
    "predict": ("prediction", "predict_dataloaders"),
}
# Whose code waits for other workers: collectives, buffers and gradients of DDP, and Ray's barriers.
WAITING = ("/torch/distributed/", "/torch/nn/parallel/", "/torch/autograd/", "/ray/")


@dataclass(frozen=True)
class Position:
    """`step` optimizer steps were taken, and `actions` begun; the latter tell a worker that goes on from one that not.

    `phase` is start-up, training, validation, test, prediction or checkpoint.
    """

    phase: str = START_UP
    step: int = 0
    actions: int = 0


@dataclass(frozen=True)
class Stacks:
    """`text` has that of each thread, `waits` tells whether the training's thread waits for another worker."""

    text: str
    waits: bool


@dataclass
class Followed:
    """What is known of the trainer that was made last in this process."""

    trainer: Callable[[], Any] = lambda: None
    thread: int | None = None
    actions: int = 0


HERE = Followed()


def follow(trainer: Any) -> None:
    """Has `position` and `stacks` be about this trainer, which runs in the thread that calls.

    Whatever Lightning does, it names to its profiler as it begins: a hook, a batch, a step of the strategy.
    """
    HERE.trainer, HERE.thread = weakref.ref(trainer), threading.get_ident()
    # On the object: the user may have given it, and give it to another trainer.
    vars(trainer.profiler).setdefault("profile", partial(count, trainer.profiler.profile))


def count(profile: Callable[[str], Any], action: str) -> Any:
    """Counts an action that begins; it is called dozens of times in each step."""
    HERE.actions += 1
    return profile(action)


def went_on() -> None:
    """Counts what an upload does: who waits for that does not stand still."""
    HERE.actions += 1


def position() -> Position:
    """Where this worker is."""
    trainer = HERE.trainer()
    if trainer is None:
        return Position(actions=HERE.actions)
    return Position(phase_of(trainer), trainer.global_step, HERE.actions)


def phase_of(trainer: Any) -> str:
    """What the trainer is doing."""
    if any(getattr(callback, "saving", False) for callback in trainer.checkpoint_callbacks):
        return CHECKPOINT
    phase, loaders = STAGES.get(trainer.state.stage or "", (START_UP, "train_dataloader"))
    return START_UP if getattr(trainer, loaders) is None else phase


def stacks() -> Stacks:
    """What each thread of this process is doing."""
    frames, names = sys._current_frames(), {thread.ident: thread.name for thread in threading.enumerate()}
    texts = [
        f"Thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sorted(frames.items(), key=lambda item: item[0] != HERE.thread)
    ]
    at = frames[HERE.thread].f_code.co_filename if HERE.thread in frames else ""
    return Stacks("\n".join(texts), any(part in at for part in WAITING))
