"""What a checkpoint may hold, so that to load it never runs code that came with the file: tensors and plain types."""

import io
import zipfile
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

from ray_mnist.errors import RequestError
from ray_mnist.lightning_internals import REST_OF_SHARDS


def keep_plain_hyperparameters(checkpoint: dict[str, Any]) -> list[str]:
    """Takes those hyperparameters out of a checkpoint that is to be saved which are objects; returns their names."""
    left_out: list[str] = []
    for kind in (pl.LightningModule, pl.LightningDataModule):
        given = checkpoint.get(kind.CHECKPOINT_HYPER_PARAMS_KEY, {})
        plain = {name: value for name, value in given.items() if is_plain(value)}
        if len(plain) < len(given):
            checkpoint[kind.CHECKPOINT_HYPER_PARAMS_KEY] = plain
            left_out += (str(name) for name in given if name not in plain)
    return left_out


def is_plain(value: Any) -> bool:
    """Whether torch saves `value` as something that it loads with `weights_only=True`."""
    file = io.BytesIO()
    try:
        torch.save(value, file)
    except Exception:  # whatever an object raises that cannot be pickled
        return False
    file.seek(0)
    return not get_unsafe_globals_in_checkpoint(file)


def check_saved(path: Path) -> None:
    """Raises RequestError if the checkpoint at `path` holds objects, which a run could not go on from."""
    path = path / REST_OF_SHARDS if path.is_dir() else path
    # Strategies of the user's may write something else than torch's file.
    if zipfile.is_zipfile(path) and (objects := get_unsafe_globals_in_checkpoint(path)):
        raise RequestError(
            f"A checkpoint may hold tensors and plain types only, and {', '.join(sorted(objects))} is none: have the "
            "model, callback or optimizer that saves it turn it into plain types, or call "
            "torch.serialization.add_safe_globals for it where it is defined."
        )


def refused(location: str) -> RequestError:
    """What to say of a checkpoint that torch does not load with `weights_only=True`."""
    return RequestError(
        f"The checkpoint {location} holds more than tensors and plain types, and to load it could run code that came "
        "with it: delete it, or, if you trust whoever made it, start from it with ckpt_path and weights_only=False."
    )
