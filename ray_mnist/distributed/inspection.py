"""Looks at what the ranks draw: whether it is the same on all of them, and whether a stream asked for its rank."""

import os
import pickle
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import torch

# What is called, or looked up in the environment, to learn the rank: torch's, Lightning's and Ray's names.
FUNCTIONS = {"get_rank", "get_world_size", "get_world_rank", "global_rank", "world_size"}
VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK"}
LOOK_UP = type(os.environ).__getitem__.__code__


@contextmanager
def watching_for_the_rank() -> Iterator[list[str]]:
    """Lists who asked for the rank of this process, or their number, in the `with`, once that has ended.

    Who copies all of the environment, as Ray Data does for its log, asks for nothing.
    """
    asked: list[str] = []
    looked_up: list[str] = []

    def watch(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if code.co_name in FUNCTIONS:
            asked.append(code.co_name)
        elif code is LOOK_UP:
            looked_up.append(frame.f_locals["key"])

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        yield asked
    finally:
        sys.settrace(before)
        asked += [name for name in without_copies(looked_up) if name in VARIABLES]


def without_copies(looked_up: list[str]) -> list[str]:
    """The variables that were looked up, but for where all of them were, one after the other."""
    whole, rest, at = [*os.environ], list[str](), 0
    while at < len(looked_up):
        copied = looked_up[at : at + len(whole)] == whole
        rest += [] if copied else [looked_up[at]]
        at += len(whole) if copied else 1
    return rest


def digest(drawn: Any) -> int:
    """A number that equal things have in common on all ranks; 0 for what cannot be pickled and so not be compared."""
    content = BytesIO()
    try:
        ByValue(content).dump(drawn)
    except Exception:  # of any kind, from the user's own samples
        return 0
    return zlib.crc32(content.getvalue())


class ByValue(pickle.Pickler):
    """Pickles equal tensors to equal bytes: pickle's own have addresses in them, and what they are only a part of."""

    def reducer_override(self, obj: Any) -> Any:
        """A tensor's type, shape and values, wherever in a sample it is."""
        if not isinstance(obj, torch.Tensor):
            return NotImplemented
        values = obj.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return tuple, ((str(obj.dtype), tuple(obj.shape), values),)
