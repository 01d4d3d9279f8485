"""The command line of the sweep, `python -m ray_mnist.tune`."""

import copy
import sys
from dataclasses import fields
from typing import Any

import pytorch_lightning as pl

from ray_mnist.cli import console
from ray_mnist.cli.optimizers import OPTIMIZERS
from ray_mnist.cli.parser import (
    add_all_arguments,
    expand,
    instantiate,
    make_parser,
    options_of,
    parse,
    plain,
    trainer_arguments,
)
from ray_mnist.config import OPTIONS, SweepConfig, flag
from ray_mnist.errors import RequestError
from ray_mnist.search import space
from ray_mnist.search.options import BATCH_SIZE, LR, SHORT, make_sweep_options
from ray_mnist.search.sweep import Sweep

PARTS = ("model", "data", "trainer", *OPTIMIZERS)


def domains_of(config: Any) -> dict[str, Any]:
    """What is searched: the learning rate and the batch size where model and data have them, and `--space`.

    Raises:
        RequestError: a range or choice cannot mean anything, or the argument is unknown.
    """
    written = {}
    for name, option, default in (("model.lr", "lr", LR), ("data.batch_size", "batch_size", BATCH_SIZE)):
        part, argument = name.split(".")
        text = config[option]
        if text or argument in config[part].init_args:
            written[name] = (flag(option), text or default, option == "lr")
    for item in config.space:
        name, equals, text = item.partition("=")
        if not equals:
            raise RequestError(f"--space {item!r} is not KEY=VALUES, such as model.width=64,128.")
        written[name] = (f"--space {name}", text, False)
    parts = [part for part in ("model", "data", *OPTIMIZERS) if config.get(part)]
    known = [f"{part}.{key}" for part in parts for key in vars(config[part].init_args)]
    for name in written:
        if name not in known and not name.startswith("trainer."):
            raise RequestError(f"--space {name}: there is no such argument, only {', '.join(known)} and trainer.ARG.")
    return {name: space.parse(*arguments) for name, arguments in written.items()}


def search() -> None:
    """Parses the command line, sweeps, and names the winner and the sweep folder."""
    parser = add_all_arguments(make_sweep_options())
    config = parse(parser, expand(sys.argv[1:], SHORT), short=False)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    sweep_config = SweepConfig(**{option.name: config[option.name] for option in fields(SweepConfig)})
    domains = domains_of(config)
    whole = plain(parser, config)
    train_only = {name: value for name, value in whole.items() if name in (*OPTIONS, *PARTS)}

    def whole_config(parameters: dict[str, Any]) -> dict[str, Any]:
        of_trial = copy.deepcopy(train_only)
        for name, value in parameters.items():
            part, argument = name.split(".")
            arguments = of_trial.setdefault(part, {}) if part == "trainer" else of_trial[part]["init_args"]
            arguments[argument] = value
        return of_trial

    def build(parameters: dict[str, Any]) -> Any:
        parser = make_parser("train", "")
        return instantiate(parser, parser.parse_object(whole_config(parameters)))

    arguments = options_of(config) | trainer_arguments(parser, config)
    result = Sweep(build, domains, sweep_config, whole_config, whole, **arguments).run()
    values = result.values
    console.say("best: " + "  ".join(f"{name} {value}" for name, value in values["parameters"].items()))
    accuracy = "none" if values["test_accuracy"] is None else f"{values['test_accuracy']:.4f}"
    console.say(f"test accuracy {accuracy}; sweep folder {result.path}, which has best_config.yaml for ray_mnist.train")
