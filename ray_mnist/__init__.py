"""Take a PyTorch Lightning script from a laptop to a Ray cluster by changing one line."""

from ray_mnist.data import MNISTDataModule
from ray_mnist.errors import RequestError, TrainingError
from ray_mnist.models import ConvModel, SimpleModel
from ray_mnist.trainer import Trainer

__all__ = ["ConvModel", "MNISTDataModule", "RequestError", "SimpleModel", "Trainer", "TrainingError"]
