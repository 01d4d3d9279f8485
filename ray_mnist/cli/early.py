"""Answers at once what needs neither torch nor Lightning, which take seconds to import.

That is `--version`, `--help`, run options that are refused, and `--print_config` of our own classes. All else is for
`parser.parse`.
"""

import os
import re
from argparse import SUPPRESS
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from importlib.util import find_spec
from typing import Any, Literal

from jsonargparse import Namespace

from ray_mnist.cli.optimizers import OPTIMIZERS, describe_optimizer
from ray_mnist.cli.parser import (
    DEFAULT_CLASSES,
    Parser,
    add_options,
    describe_class,
    make_command,
    make_options,
    name_classes,
)
from ray_mnist.config import RunConfig
from ray_mnist.errors import RequestError

DETACH, ATTACH = "--detach", "--attach"  # of a cluster that trains
Shape = tuple[int, int, int]
Schedule = Literal["constant", "cosine", "one-cycle"]
BEYOND = r"config|print_config|(trainer|optimizer|lr_scheduler)(\..*?)?"  # options that are not answered here


# What our classes take: a test compares.


def simple_model(
    lr: float = 1e-3, schedule: Schedule = "constant", input_shape: Shape = (1, 28, 28), num_classes: int = 10
) -> None:
    """SimpleModel's arguments."""


def conv_model(
    lr: float = 2e-3, schedule: Schedule = "one-cycle", input_shape: Shape = (1, 28, 28), num_classes: int = 10
) -> None:
    """ConvModel's arguments."""


def mnist_data_module(
    dataset: str = "mnist",
    data_dir: str = "data",
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int | None = None,
    mirror: str | None = None,
) -> None:
    """MNISTDataModule's arguments."""


OURS: dict[str, Callable[..., None]] = {
    "SimpleModel": simple_model,
    "ConvModel": conv_model,
    "MNISTDataModule": mnist_data_module,
}


def attached(arguments: Sequence[str]) -> Namespace | None:
    """The `attach` and the `address` that were given, if the former was, which goes with no other option.

    Raises:
        RequestError: something else was given, too.
    """
    if ATTACH not in {argument.partition("=")[0] for argument in arguments} or is_asked_for_all(arguments):
        return None
    parser = make_command("train", "")
    parser.add_argument(ATTACH)
    add_options(parser, ["address"])
    return parser.parse_args(arguments)


def make_train_options(description: str) -> Parser:
    """A parser of train's options, without those of classes; the two of a detached run are taken before."""
    parser = make_options("train", description)
    detached = "train in the Ray cluster at --address, whatever becomes of this process"
    parser.add_argument(DETACH, action="store_true", help=detached, default=SUPPRESS)
    follow = "show what the run NAME in the Ray cluster says, to its end; goes with --address alone"
    parser.add_argument(ATTACH, metavar="NAME", help=follow, default=SUPPRESS)
    return parser


def answer(make: Callable[[], Parser], arguments: Sequence[str], *more: Any) -> RunConfig | None:
    """Ends the program with the help or the configuration; comes back where more than that is asked for.

    Args:
        make: makes a parser of the command's options, without those of classes.
        arguments: the command's, with short ones written out.
        *more: data classes that are made of the options, too, and refuse what cannot be.

    Returns:
        The run options, unless a `--config` may say otherwise, or model or data are none that there can be.

    Raises:
        RequestError: a run option is unknown or has a value that it cannot have.
    """
    parser = make()
    if is_asked_for_all(arguments):
        of_lightning = "an argument of Lightning's Trainer"
        parser.add_argument("--trainer.ARG", metavar="VALUE", help=of_lightning, default=SUPPRESS)
        for part in OPTIMIZERS:
            parser.add_argument(f"--{part}", metavar="CLASS", help=describe_optimizer(part), default=SUPPRESS)
    options = answer_what_is_not_of_classes(parser, without(BEYOND, arguments))
    if "--config" in {argument.partition("=")[0] for argument in arguments}:
        return None
    config, *_ = (
        kind(**{field.name: options[field.name] for field in fields(kind) if field.name in options})
        for kind in (RunConfig, *more)
    )
    if "--print_config" in arguments and not options.resume:
        parse_ours(make(), arguments)  # which prints it
    return config if can_be_made(make(), without("print_config", arguments)) else None


def answer_what_is_not_of_classes(parser: Parser, arguments: Sequence[str]) -> Namespace:
    """Ends the program with the help or the versions; parses all that does not concern `--model` and `--data`.

    Raises:
        RequestError: an argument is unknown or has a value that it cannot have.
    """
    if is_asked_for_all(arguments):
        for part in DEFAULT_CLASSES:
            for option, value, text in (
                (part, "CLASS", describe_class(part)),
                (f"{part}.ARG", "VALUE", "an argument of that class"),
                (f"{part}.help", "CLASS", "show the arguments of a class and exit"),
            ):
                parser.add_argument(f"--{option}", metavar=value, help=text, default=SUPPRESS)
        parser.parse_args(["--help"])
    return parser.parse_args(without(r"(model|data)(\..*?)?", arguments))


def is_asked_for_all(arguments: Sequence[str]) -> bool:
    """Whether all options are to be shown: in the help, or by a shell that completes one."""
    return bool({"-h", "--help"} & set(arguments)) or "_ARGCOMPLETE" in os.environ


def without(options: str, arguments: Sequence[str]) -> list[str]:
    """The arguments but for those of these options, a regular expression, and the value of each."""
    found, value_follows = [], False
    for argument in arguments:
        is_option = argument.startswith("--")
        unwanted = re.match(rf"--({options})(=|$)", argument) if is_option else value_follows
        found += [] if unwanted else [argument]
        value_follows = is_option and bool(unwanted) and "=" not in argument
    return found


def classes(arguments: Sequence[str]) -> dict[str, str]:
    """The names of the model's and the data's class, as they were given."""
    named = [argument.partition("=") for argument in name_classes(arguments)[: len(DEFAULT_CLASSES)]]
    return {option.removeprefix("--"): name for option, _, name in named}


def can_be_made(parser: Parser, arguments: Sequence[str]) -> bool:
    """Whether nothing speaks against the classes, as far as can be seen without importing them."""
    theirs = [name for name in classes(arguments).values() if name.removeprefix("ray_mnist.") not in OURS]
    if not theirs:
        return parse_ours(parser, arguments) is not None
    return all("." in name and find_spec(name.partition(".")[0]) for name in theirs)


def parse_ours(parser: Parser, arguments: Sequence[str]) -> Namespace | None:
    """The whole configuration of our own classes; None where classes are not ours or an argument is wrong.

    The parser gets their arguments beside those that it has.
    """
    ours = {part: name.removeprefix("ray_mnist.") for part, name in classes(arguments).items()}
    if not set(ours.values()) <= set(OURS):
        return None
    for part, name in ours.items():
        parser.add_argument(f"--{part}.class_path", default=f"ray_mnist.{name}")
        parser.add_function_arguments(OURS[name], f"{part}.init_args")
    of_class = re.compile(r"--(model|data)\.(?!init_args\.)")
    with suppress(RequestError):
        return parser.parse_args([of_class.sub(r"--\1.init_args.", each) for each in without("model|data", arguments)])
    return None
