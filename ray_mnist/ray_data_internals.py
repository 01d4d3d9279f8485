"""All that this package uses of Ray Data beyond its public API, and why: to look at with a new Ray.

Its import takes a second, and is for those who use Ray Data. tests/test_internals.py names what a new release moved.
"""

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from ray.data import Dataset
from ray.data.block import BlockAccessor

if TYPE_CHECKING:
    from torch import Tensor

Piece = tuple[Any, int, int]  # the reference of a block, and the first row of it and the one after the last


def pieces(dataset: Dataset, cpus: float) -> Iterator[Piece]:
    """Executes a data set as a stream on so many CPUs at most: its blocks, in the order of their rows, when asked for.

    Ray's public iterators hand out data, not where it is; its `streaming_split` gives a block to whoever comes first.
    """
    context = dataset.context
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)  # it has a line for each time through
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # and one for what was just set
    context.execution_no_progress_timeout_s = -1  # a stream waits for as long as a validation takes
    options = context.execution_options
    options.preserve_order = True
    # Ray Data takes the CPUs of the training's workers for its own.
    options.resource_limits = options.resource_limits.copy(cpu=min(cpus, options.resource_limits.cpu))
    for bundle in dataset.iter_internal_ref_bundles():
        for entry, part in zip(bundle.blocks, bundle.slices or (), strict=True):
            first, stop = (part.start_offset, part.end_offset) if part else (0, entry.metadata.num_rows or 0)
            if stop > first:
                yield entry.ref, first, stop


def columns(blocks: list[tuple[Any, int, int]]) -> dict[str, np.ndarray[Any, Any]]:
    """The rows of fetched blocks, in memory of their own: the blocks' is the object store's, and read-only."""
    parts: list[Any] = [BlockAccessor.for_block(block).slice(first, stop) for block, first, stop in blocks]
    arrays: list[Any] = [BlockAccessor.for_block(part).to_numpy() for part in parts]
    return {name: np.concatenate([array[name] for array in arrays]) for name in arrays[0]}


def tensors(batch: dict[str, np.ndarray[Any, Any]]) -> "dict[str, Tensor]":
    """What `Dataset.iter_torch_batches` makes of them. Raises RuntimeError where a column has no numbers."""
    from ray.data.util.torch_utils import convert_ndarray_batch_to_torch_tensor_batch

    made: Any = convert_ndarray_batch_to_torch_tensor_batch(batch)
    return dict(made)
