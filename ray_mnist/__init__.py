"""Take a PyTorch Lightning script from a laptop to a Ray cluster by changing one line."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ray_mnist import lightning_package  # noqa: F401  (from here on `lightning` and `pytorch_lightning` are one)

if TYPE_CHECKING:
    from ray_mnist.data import MNISTDataModule
    from ray_mnist.distributed.ray_data import RayDataLoader
    from ray_mnist.errors import RequestError, TrainingError
    from ray_mnist.models import ConvModel, SimpleModel
    from ray_mnist.search.sweep import tune
    from ray_mnist.trainer import Trainer

__all__ = [
    "ConvModel",
    "MNISTDataModule",
    "RayDataLoader",
    "RequestError",
    "SimpleModel",
    "Trainer",
    "TrainingError",
    "tune",
]

# Imported where they are used: Ray Train's controller needs neither torch nor Lightning, which take seconds.
_MODULES = {
    "ConvModel": "models",
    "MNISTDataModule": "data",
    "RayDataLoader": "distributed.ray_data",
    "RequestError": "errors",
    "SimpleModel": "models",
    "Trainer": "trainer",
    "TrainingError": "errors",
    "tune": "search.sweep",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"ray_mnist.{_MODULES[name]}"), name)
