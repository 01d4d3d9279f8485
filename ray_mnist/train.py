"""Trains a model: `python -m ray_mnist.train`, with `--help` for its options."""

import sys

import pytorch_lightning as pl

from ray_mnist import commandline, terminal
from ray_mnist.config import OPTIONS
from ray_mnist.trainer import Trainer


def train() -> None:
    """Parses the command line, trains, tests, and names the test accuracy and the run folder."""
    parser = commandline.make_parser("train", "Train and test a model, here, on a Ray cluster or on a TPU.")
    config = commandline.parse(parser)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    model, datamodule = commandline.instantiate(parser, config)
    trainer = Trainer(config=commandline.plain(parser, config), **{name: config[name] for name in OPTIONS})
    trainer.fit(model, datamodule)
    values = trainer.result.values
    accuracy = "none" if values["test_accuracy"] is None else f"{values['test_accuracy']:.4f}"
    terminal.say(f"test accuracy {accuracy} on {values['test_samples']:,} samples; run folder {trainer.result.path}")


if __name__ == "__main__":
    sys.exit(terminal.exit_status(train))
