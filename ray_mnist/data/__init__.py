"""The data sets: MNIST and its like."""

from ray_mnist.data.mnist import MNISTDataModule

__all__ = ["MNISTDataModule"]
