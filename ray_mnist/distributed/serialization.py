"""What can be sent to workers in other processes, and home from them.

Ray's inspect_serializability raises for a LightningModule with a lock in it, looks into no dict or list, lets an open
file pass, and prints what it finds.
"""

import io
from collections.abc import Iterator, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities import move_data_to_device
from ray import cloudpickle

from ray_mnist.errors import RequestError, one_line


class NullFile:
    """A file that forgets what is written, so that a trial run needs no memory."""

    def write(self, content: bytes) -> int:
        """Takes note of nothing but the length."""
        return len(content)


class ProbePickler(cloudpickle.Pickler):
    """What Ray sends objects with, except that it would send a tensor to a machine without the tensor's device, and
    an open file as a copy of the text in it."""

    def persistent_id(self, item: Any) -> None:
        """Called for every object on the way."""
        if isinstance(item, io.IOBase) and not isinstance(item, io.BytesIO | io.StringIO):
            raise TypeError("an open file belongs to its process")
        if isinstance(item, torch.Tensor) and item.device.type not in ("cpu", "meta"):
            raise TypeError(f"the tensor is on {item.device}, which other machines may not have: move it with .cpu()")


def check_serializable(**items: Any) -> None:
    """Raises RequestError, naming the object and where it is, unless every item can be sent."""
    for name, item in items.items():
        if (reason := serialization_error(item)) is not None:
            path, culprit, reason = find_culprit(name, item, reason)
            raise RequestError(
                f"{path}, a {type(culprit).__name__}, cannot be sent to the workers ({reason}): make it inside a hook "
                "that runs there, such as setup, or leave it out with __getstate__."
            )


class ReturnPickler(ProbePickler):
    """Keeps back what belongs to the worker, with all that hangs on it."""

    kept_back: tuple[type, ...] = (pl.Trainer, pl.LightningModule, pl.LightningDataModule, torch.optim.Optimizer)

    def persistent_id(self, item: Any) -> None:
        """Called for every object on the way."""
        super().persistent_id(item)
        if isinstance(item, self.kept_back):
            raise TypeError(f"a {type(item).__name__} stays with its worker")


class ModelReturnPickler(ReturnPickler):
    """Of a model also its parts, whose weights are brought home as weights."""

    kept_back = (*ReturnPickler.kept_back, torch.nn.Module, torch.nn.Parameter)


def sendable(attributes: dict[str, Any], pickler: type[ProbePickler] = ReturnPickler) -> dict[str, Any]:
    """Those that can be sent home from a worker, on the CPU."""
    here = {name: move_data_to_device(value, "cpu") for name, value in attributes.items()}
    return {name: value for name, value in here.items() if serialization_error(value, pickler) is None}


def public_state(model: pl.LightningModule) -> dict[str, Any]:
    """What a model's code keeps on it beside weights, such as a list of losses, as far as it can be sent home."""
    public = {name: value for name, value in vars(model).items() if not name.startswith("_")}
    return sendable(public, ModelReturnPickler)


def fingerprints(attributes: dict[str, Any]) -> dict[str, bytes]:
    """What changes where a value does."""
    return {name: cloudpickle.dumps(value) for name, value in attributes.items()}


def serialization_error(item: Any, pickler: type[ProbePickler] = ProbePickler) -> str | None:
    """What keeps an object from being sent; None if nothing does."""
    try:
        pickler(NullFile()).dump(item)
    except Exception as error:  # whatever an object's own code raises
        return one_line(error)
    return None


def find_culprit(path: str, item: Any, reason: str) -> tuple[str, Any, str]:
    """Goes down to the innermost object that cannot be sent."""
    seen = {id(item)}
    while True:
        for name, part in parts(item):
            if id(part) not in seen and (inner := serialization_error(part)) is not None:
                seen.add(id(part))
                path, item, reason = path + name, part, inner
                break
        else:
            return path, item, reason


def parts(item: Any) -> Iterator[tuple[str, Any]]:
    """What an object is made of, each with what to write after the object to name it."""
    if isinstance(item, Mapping):
        yield from ((f"[{key!r}]", value) for key, value in item.items())
    elif isinstance(item, list | tuple | set):
        yield from ((f"[{index}]", value) for index, value in enumerate(item))
    elif isinstance(item, torch.nn.Module):
        inside = ("_parameters", "_buffers", "_modules")
        yield from ((f".{name}", value) for kind in inside for name, value in vars(item)[kind].items())
        yield from ((f".{name}", value) for name, value in vars(item).items() if name not in inside)
    elif not isinstance(item, type):
        yield from ((f".{name}", value) for name, value in getattr(item, "__dict__", {}).items())
        if (closure := getattr(item, "__closure__", None)) is not None:
            names = item.__code__.co_freevars
            yield from ((f"'s {name}", cell.cell_contents) for name, cell in zip(names, closure, strict=True))
