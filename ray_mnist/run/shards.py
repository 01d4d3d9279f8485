"""Checkpoints in shards: folders of torch.distributed.checkpoint, of which each rank writes a part."""

import io
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.serialization import get_unsafe_globals_in_checkpoint

from ray_mnist.lightning_internals import REST_OF_SHARDS
from ray_mnist.run.folder import CHECKPOINT
from ray_mnist.run.scratch import local_file, scratch_folder

INDEX = ".metadata"  # a pickle
IN_INDEX = {
    "pathlib": {"PosixPath"},
    "torch": {"Size"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}


@contextmanager
def whole_file(location: str | None, weights_only: bool = True) -> Iterator[str | None]:
    """The checkpoint at a path or URI as one local file, for the time of the `with`: put together if it is in shards.

    Raises:
        UnpicklingError: it is in shards that hold more than tensors and plain types, and `weights_only` is true.
    """
    with local_file(location) as path:
        if path is None or not os.path.isdir(path):
            yield path
        else:
            with put_together(path, weights_only) as file:
                yield file


@contextmanager
def put_together(shards: str, weights_only: bool, folder: str | None = None) -> Iterator[str]:
    """The checkpoint in the folder `shards` as a file like Lightning's own, in a scratch folder; see `whole_file`."""
    with scratch_folder(folder) as here:
        if weights_only:
            check_shards(shards)
        file, aside = os.path.join(here, CHECKPOINT), os.path.join(here, "tensors")
        dcp_to_torch_save(shards, aside)
        tensors = torch.load(aside, mmap=True, weights_only=weights_only)
        whole = torch.load(os.path.join(shards, REST_OF_SHARDS), weights_only=weights_only)
        whole["state_dict"] = tensors["state_dict"] if "state_dict" in tensors else tensors["model"]
        optimizers = takewhile(tensors.__contains__, (f"optimizer_{number}" for number in count()))
        whole["optimizer_states"] = [tensors[name] for name in optimizers]
        torch.save(whole, file)
        os.remove(aside)
        yield file


def check_shards(folder: str) -> None:
    """Raises UnpicklingError if shards hold more than tensors and plain types: torch loads whatever they hold."""
    index = IndexUnpickler(io.BytesIO(Path(folder, INDEX).read_bytes())).load()
    for item, place in index.storage_data.items():
        if place.transform_descriptors:
            raise pickle.UnpicklingError(f"{item.fqn} is encoded")
        if isinstance(index.state_dict_metadata[item.fqn], BytesStorageMetadata):
            with Path(folder, place.relative_path).open("rb") as file:
                file.seek(place.offset)
                check_plain(item.fqn, file.read(place.length))


def check_plain(name: str, content: bytes) -> None:
    """Raises UnpicklingError unless it is what torch saves of tensors and plain types."""
    try:
        objects = get_unsafe_globals_in_checkpoint(io.BytesIO(content))
    except (ValueError, RuntimeError) as error:  # not of torch's format of today
        raise pickle.UnpicklingError(f"{name} is not as torch saves it") from error
    if objects:
        raise pickle.UnpicklingError(f"{name} holds {', '.join(objects)}")


class IndexUnpickler(pickle.Unpickler):
    """Loads what torch writes into an index, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """One of the classes that an index is made of."""
        if name not in IN_INDEX.get(module, ()):
            raise pickle.UnpicklingError(f"the index holds {module}.{name}")
        return super().find_class(module, name)
