"""Models that torch.compile is to compile: they are sent to the workers as they are, and compiled there."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DeepSpeedStrategy, ModelParallelStrategy
from pytorch_lightning.utilities.compile import from_compiled, to_uncompiled
from torch._dynamo import OptimizedModule  # which Lightning's functions take

from ray_mnist.errors import RequestError
from ray_mnist.lightning_internals import compiled_in_place

NO_COMPILER = ("InvalidCxxCompiler", "Failed to find C compiler")  # what inductor says for a CPU, and Triton for a GPU


def taken_apart(model: Any, strategy: Any, tpu: bool) -> tuple[Any, OptimizedModule | None]:
    """A model, without what torch.compile made of it, and that.

    Raises:
        RequestError: it cannot be trained so, on a TPU or with this strategy.
    """
    if not isinstance(model, OptimizedModule):
        return model, None
    refuse_compiling("torch.compile(model)", strategy, tpu)
    try:
        return to_uncompiled(model), model
    except TypeError:  # none of Lightning's, of which check_kind tells
        return model, None


def refuse_compiling(what: str, strategy: Any, tpu: bool) -> None:
    """Raises RequestError where a whole model cannot be compiled."""
    if tpu:
        raise RequestError(f"{what}: on a TPU XLA compiles the model, whatever it is: leave it out.")
    if isinstance(strategy, ModelParallelStrategy | DeepSpeedStrategy):
        raise RequestError(
            f"{what} compiles the model as a whole, which {type(strategy).__name__} has in shards: have "
            "configure_model compile its parts, before it shards them."
        )


def refuse_compiled_in_place(model: pl.LightningModule) -> None:
    """Raises RequestError for what torch leaves behind, without a word, where it sends a module elsewhere."""
    for name, part in model.named_modules(prefix="model"):
        if compiled_in_place(part):
            raise RequestError(
                f"{name}.compile() was called in this process, and what it made cannot be sent to the workers: call it "
                "in configure_model, which runs there, or use torch.compile."
            )


@contextmanager
def compiled(model: pl.LightningModule, how: OptimizedModule | bool) -> Iterator[None]:
    """Has the steps of a model compiled for the time of the `with`, as Lightning's Trainer does.

    Args:
        model: compiled in place; the names of its weights stay.
        how: what torch.compile made of it, or whether that is to be done with torch's defaults.

    Raises:
        RequestError: this machine has no compiler, for this or whatever else the model compiles.
    """
    whole = torch.compile(model) if how is True else how
    if isinstance(whole, OptimizedModule):
        from_compiled(whole)
    try:
        yield
    except Exception as error:
        if any(message in f"{error!r}" for message in NO_COMPILER):
            raise RequestError(
                "torch.compile needs a C++ compiler, and this machine has none: install one, such as g++, on each "
                "machine, or do without compiling."
            ) from error
        raise
    finally:
        if isinstance(whole, OptimizedModule):
            to_uncompiled(whole)
