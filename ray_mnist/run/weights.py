"""A checkpoint's weights, in the model object of whoever trained it."""

import pickle
import warnings
from contextlib import ExitStack

import pytorch_lightning as pl
import torch

from ray_mnist.run.shards import whole_file
from ray_mnist.run.trust import refused


def load_weights(model: pl.LightningModule, location: str, weights_only: bool = True) -> None:
    """Gives `model` a checkpoint's weights, in place, as Lightning would.

    Raises:
        RequestError: it holds more than tensors and plain types, and `weights_only` is true.
    """
    with ExitStack() as copy:
        try:
            path = copy.enter_context(whole_file(location, weights_only))
            assert path
            checkpoint = torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)
        except pickle.UnpicklingError as error:
            raise refused(location) from error
        model.on_load_checkpoint(checkpoint)
        trained = checkpoint["state_dict"]
        if not trained.keys() <= model.state_dict().keys():  # what else it does, such as sharding, is for the workers
            model.configure_model()
        try:
            for name, weight in model.state_dict(keep_vars=True).items():
                weight.data = weight.data.to(trained[name].dtype) if name in trained else weight.data
            model.load_state_dict(trained, strict=model.strict_loading)
        except RuntimeError as error:
            warnings.warn(
                f"The model object keeps its weights, since those trained do not fit it ({error}): layers made in "
                f"setup are only in the workers' copies. The trained ones are in {location}.",
                stacklevel=3,
            )
