"""Trains a model: `python -m ray_mnist.train`, with `--help` for its options."""

import re
import sys
from collections.abc import Sequence
from threading import Thread
from typing import Any

from ray_mnist.cli import console, early
from ray_mnist.cli.parser import expand
from ray_mnist.config import RunConfig
from ray_mnist.lightning_package import import_heavy

DESCRIPTION = "Train and test a model, here, on a Ray cluster or on a TPU."


def train() -> None:
    """Parses the command line, trains, tests, and names the test accuracy and the run folder.

    With `--detach` a Ray cluster does that, with `--attach` it is shown what one that does so says.
    """
    if attached := early.attached(sys.argv[1:]):
        from ray_mnist.launch.detached import attach

        attach(attached.attach, attached.address)
        return
    given = [argument for argument in sys.argv[1:] if argument != early.DETACH]
    detached = early.DETACH in sys.argv
    options = early.answer(lambda: early.make_train_options(DESCRIPTION), expand(given))
    importing = Thread(target=import_heavy, args=["ray_mnist.trainer"], daemon=True)
    importing.start()  # which takes seconds, in which Ray starts
    if options and options.num_workers and not detached:
        from ray_mnist.launch.connection import start_if_local

        start_if_local(options)
    importing.join()
    import pytorch_lightning as pl

    from ray_mnist.cli.parser import instantiate, make_parser, options_of, parse, plain, trainer_arguments
    from ray_mnist.trainer import Trainer

    parser = make_parser("train", DESCRIPTION)
    config = parse(parser, given)
    if not config.num_workers and "--dashboard" not in {argument.partition("=")[0] for argument in given}:
        config.dashboard = False  # a file's, such as that of the run to go on with, for when there are workers
    pl.seed_everything(config.seed, workers=True, verbose=False)
    model, datamodule = instantiate(parser, config)
    arguments = options_of(config) | trainer_arguments(parser, config)
    if detached:
        hand_over(config, re.findall(r"class_path: ([\w.]+)\.\w+", parser.dump(config)), model, datamodule, given)
        return
    trainer = Trainer(config=plain(parser, config), keep_workers=0, **arguments)
    trainer.fit(model, datamodule)
    values = trainer.result.values
    accuracy = "none" if values["test_accuracy"] is None else f"{values['test_accuracy']:.4f}"
    console.say(f"test accuracy {accuracy} on {values['test_samples']:,} samples; run folder {trainer.result.path}")


def hand_over(config: Any, modules: Sequence[str], model: Any, datamodule: Any, given: Sequence[str]) -> None:
    """Has a Ray cluster train what the arguments `given` say, whose classes are in these modules."""
    from ray_mnist.cli.parser import options_of
    from ray_mnist.launch.detached import detach
    from ray_mnist.run.report import default_name

    name = config.name or default_name(model, {"datamodule": datamodule})
    detach(RunConfig(**options_of(config)), name, given, modules)


if __name__ == "__main__":
    console.run(train)
