"""The command line's parser, jsonargparse's, with LightningCLI's conventions for model and data."""

import re
import sys
from argparse import SUPPRESS
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace
from jsonargparse._loaders_dumpers import get_yaml_default_loader  # what it reads every number with

from ray_mnist.cli.optimizers import OPTIMIZERS, add_optimizers, use_optimizers
from ray_mnist.config import OPTIONS, RunConfig, flag
from ray_mnist.errors import RequestError, one_line
from ray_mnist.run.folder import RunFolder

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule, LightningModule

UNKNOWN_CLASS = "neither one of ours (SimpleModel, ConvModel, MNISTDataModule) nor a pkg.module.Class"
DEFAULT_CLASSES = {"model": "SimpleModel", "data": "MNISTDataModule"}
BASES = {"model": "LightningModule", "data": "LightningDataModule"}
WHOSE = {"trainer": "Lightning's"} | dict.fromkeys(OPTIMIZERS, "torch's")  # the classes that have short names
SHORT = {"--lr": "--model.lr", "--batch-size": "--data.batch_size", "--dataset": "--data.dataset"}


def decimal_or_text(loader: Any, node: Any) -> int | float | str:
    """A number as people write it: YAML 1.1, which PyYAML follows, takes 2:4 for 124 and 010 for 8."""
    text = node.value
    if ":" in text:
        return str(text)
    if text.lstrip("+-").isdigit():
        return int(text)
    number: int | float = yaml.SafeLoader.yaml_constructors[node.tag](loader, node)
    return number


for tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
    get_yaml_default_loader().add_constructor(tag, decimal_or_text)


class Parser(ArgumentParser):
    """Says what is wrong in one sentence: raises RequestError where ArgumentParser would print its usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Takes every complaint of the parser's."""
        raise RequestError(f"{sentence(message)} (see {self.prog} --help)") from ex

    def parse_path(self, cfg_path: Any, *arguments: Any, **options: Any) -> Namespace:
        """Says which file a complaint is about."""
        try:
            return super().parse_path(cfg_path, *arguments, **options)
        except RequestError as error:
            raise RequestError(f"--config {cfg_path}: {error}") from error


def sentence(message: str) -> str:
    """The one fact in a message of jsonargparse's, which tells of everything that it tried."""
    line = " ".join(re.sub(r"\(see [^)]*--help\)", "", message).split())
    # The class's own parser may have been here before, and may have tried several types.
    of_class = rf'Parser key "({"|".join(OPTIMIZERS)})".*?Errors: - --([\w-]+): (?:.*Errors: - )?(Expected a \w+)'
    if inner := re.search(of_class + r".*? value: (\S+)", re.sub(r"<class '([\w.]+)'>", r"\1", line)):
        return f"--{inner[1]}.{inner[2].replace('-', '_')} {inner[4]}: {inner[3]}"
    # A class may also be given as a path or left out (None): why neither fits is of no interest.
    tried = re.search(
        r'Parser key "([\w.]+)": .*Errors: - (.*?) - Expected a <class \'NoneType\'>.*Given value: (.*)', line
    )
    if tried and (whose := WHOSE.get(tried[1].partition(".")[0])):
        return f"--{tried[1]}{'' if '(' in tried[3] else f' {tried[3]}'}: {reason_of_all(tried[2], whose)}"
    if tried:
        option, reason, value = tried.groups()
        inner = re.match(r"--([\w-]+): (.*)", reason)  # the class's own parser was here before
        given = "" if "(" in value else f" {value}"
        line = f"--{option}.{inner[1].replace('-', '_')}: {inner[2]}" if inner else f"{flag(option)}{given}: {reason}"
    line = re.sub(r"Expected a dot import path string: \S+", UNKNOWN_CLASS, line)
    line = re.sub(r'Parser key "([^"]+)"', lambda key: flag(key[1]), line)
    return re.sub(r"<class '(\w+)'>", r"\1", line)


def reason_of_all(tried: str, whose: str) -> str:
    """Why an argument was refused, of all types that were `tried` for it, where classes are `whose`."""
    tried = re.sub(r"Expected a dot import path string: \S+", f"neither one of {whose} nor a pkg.module.Class", tried)
    reasons = dict.fromkeys(re.sub(r"<class '([\w.]+)'>", r"\1", tried).split(" - "))
    said = [reason for reason in reasons if not reason.startswith("Expected a ")]
    return said[0] if said else "Expected " + " or ".join(reason.removeprefix("Expected a ") for reason in reasons)


def versions() -> str:
    """This package's version, and of those that decide what can run and be loaded."""
    others = {"Ray": "ray", "Lightning": "pytorch-lightning", "torch": "torch"}
    return f"{version('ray-mnist')} ({', '.join(f'{name} {version(package)}' for name, package in others.items())})"


def make_command(module: str, description: str, short: bool = False) -> Parser:
    """A parser without arguments yet; with `short` its help ends in what the short options are short for."""
    return Parser(
        prog=f"python -m ray_mnist.{module}",
        version=versions(),
        description=description,
        epilog="; ".join(f"{brief} V is short for {long} V" for brief, long in SHORT.items()) if short else None,
    )


def make_options(module: str, description: str, short: bool = True) -> Parser:
    """The options of a run and `--config`, and of `short` ones what they are short for."""
    parser = make_command(module, description, short)
    parser.add_argument("--config", action="config", help="YAML file with any of these options, such as config.yaml")
    add_options(parser, OPTIONS)
    return parser


def add_options(parser: Parser, names: Sequence[str]) -> None:
    """Adds the options of a run that have these names."""
    for option in fields(RunConfig):
        help_text = option.metadata["help"]
        if option.name in names and option.type is bool:
            parser.add_argument(flag(option.name), action="store_true", help=help_text)
        elif option.name in names:
            parser.add_argument(flag(option.name), type=option.type, default=option.default, help=help_text)


def make_parser(module: str, description: str) -> Parser:
    """The options of a run, and all the arguments that depend on classes."""
    return add_all_arguments(make_options(module, description))


def add_all_arguments(parser: Parser) -> Parser:
    """Adds Lightning's `--trainer`, and the classes, from `--model` to `--optimizer`; returns the parser."""
    import pytorch_lightning as pl

    add_classes(parser)
    names = parser.add_class_arguments(pl.Trainer, "trainer", instantiate=False, fail_untyped=False, sub_configs=True)
    parser.set_defaults(dict.fromkeys(names, SUPPRESS))  # what is not given is for `Trainer` to choose
    add_optimizers(parser)
    return parser


def add_classes(parser: Parser) -> None:
    """Adds `--model` and `--data`, with the arguments of the classes that they name."""
    import pytorch_lightning as pl

    import ray_mnist.data
    import ray_mnist.models  # noqa: F401  (whose classes may then be named without their modules)

    for part, base in BASES.items():
        parser.add_subclass_arguments(getattr(pl, base), part, required=True, help=describe_class(part))


def describe_class(part: str) -> str:
    """The help of `--model` or `--data`."""
    return f"{BASES[part]}: ours or pkg.module.Class (default: {DEFAULT_CLASSES[part]})"


def expand(arguments: Sequence[str], short: Mapping[str, str] = SHORT) -> list[str]:
    """Writes the short options out."""
    expanded = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        expanded.append(short.get(name, name) + equals + value)
    return expanded


def name_classes(arguments: Sequence[str]) -> list[str]:
    """Puts the classes that will hold in front, so that their arguments may come in any order.

    They are not the parser's defaults: jsonargparse would hand the default class's arguments on to the class that is
    named instead, wherever that takes arguments of the same name.
    """
    classes = dict(DEFAULT_CLASSES)
    options = [(*option.partition("="), following) for option, following in pairwise([*arguments, ""])]
    given = [(option, inline if equals else following) for option, equals, inline, following in options]
    for _, file in filter(lambda pair: pair[0] == "--config", given):
        with suppress(OSError, yaml.YAMLError, TypeError, AttributeError):  # the parser will say what is wrong with it
            config = yaml.safe_load(Path(file).read_text())
            named = [name for name in (*classes, *OPTIMIZERS) if "class_path" in config.get(name, {})]
            classes |= {name: config[name]["class_path"] for name in named}
    parts = {f"--{part}": part for part in (*classes, *OPTIMIZERS)}
    classes |= {parts[option]: value for option, value in given if option in parts}
    return [f"--{name}={class_name}" for name, class_name in classes.items()] + [*arguments]


def parse(parser: Parser, arguments: Sequence[str] | None = None, short: bool = True) -> Namespace:
    """The configuration, complete; what a resumed run was started with holds where nothing else is said.

    Raises:
        RequestError: an option is unknown or has a value that it cannot have.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    arguments = expand(arguments) if short else list(arguments)
    config = parser.parse_args(name_classes(arguments))
    if config.resume and config.name:
        saved = RunFolder(config.storage_path, config.name)
        if saved.is_local and saved.has("config.yaml"):
            arguments = ["--config", saved.at("config.yaml"), *arguments]
            config = parser.parse_args(name_classes(arguments))
    if "trainer" in config:
        make_one(config, given=parser.parse_args(name_classes(arguments), defaults=False))
    RunConfig(**options_of(config))  # finds out what cannot mean anything
    return config


def make_one(config: Namespace, given: Namespace) -> None:
    """Takes what the Trainer's arguments say of an option for that option's value, as if it had been given itself.

    Raises:
        RequestError: the option was `given` another value.
    """
    from ray_mnist.cli.lightning_arguments import ends_otherwise

    trainer = {name: value for name, value in vars(config.trainer).items() if value is not None}  # which is: not given
    for name in [name for name in trainer if name in OPTIONS]:
        value = trainer.pop(name)
        value = str(value) if name == "precision" else value  # Lightning has 16 for "16", too
        if given.get(name, value) != value:
            raise RequestError(
                f"{flag(name)} {given[name]} and --trainer.{name} {value} are one option: give it one value."
            )
        config[name] = given[name] = value
    if ends_otherwise(trainer) and given.get("max_epochs") in (None, -1):
        del config["max_epochs"]
    config.trainer = Namespace(**trainer)
    if not trainer:
        del config["trainer"]


def options_of(config: Namespace) -> dict[str, Any]:
    """The run's options; without `max_epochs` where something else ends the run."""
    return {name: config[name] for name in OPTIONS if name in config}


def trainer_arguments(parser: Parser, config: Namespace) -> dict[str, Any]:
    """The arguments of Lightning's Trainer that were given, with the objects that they name.

    Raises:
        RequestError: one of those cannot be made.
    """
    return vars(make(parser, config, "trainer")) if "trainer" in config else {}


def instantiate(parser: Parser, config: Namespace) -> "tuple[LightningModule, LightningDataModule]":
    """The model and the data module; a model left at the shape of MNIST is sized to the data, in `config` too.

    Raises:
        RequestError: a class or an optimizer does not take its arguments, or the model has fewer classes than the data.
    """
    data = make(parser, config, "data")
    sizes = config.model.init_args
    for name, mnist in (("input_shape", (1, 28, 28)), ("num_classes", 10)):
        if hasattr(data, name) and sizes.get(name) == mnist:
            sizes[name] = getattr(data, name)
    classes, least = sizes.get("num_classes"), getattr(data, "num_classes", 0)
    if isinstance(classes, int) and classes < least:
        raise RequestError(f"--model.num_classes {classes} is fewer than the {least} of the data: leave it out.")
    model = make(parser, config, "model")
    use_optimizers(model, config)
    return model, data


def make(parser: Parser, config: Namespace, name: str) -> Any:
    """What `config` says of the `model`, the `data` or the `trainer`, with the objects that it names.

    Raises:
        RequestError: the class does not take its arguments.
    """
    try:
        return parser.instantiate(Namespace({name: config[name]}))[name]
    except ValueError as error:
        # jsonargparse hides what the class itself said behind an account of all that it tried.
        said = error.__cause__ or error
        if isinstance(said, RequestError):
            raise said from None
        if tracker := re.search(r"loggers\.(\w+)': Requirement '(mlflow|wandb)", one_line(said)):
            raise RequestError(
                f"--trainer.logger {tracker[1]} needs the package {tracker[2]}: pip install 'ray-mnist[trackers]'."
            ) from error
        made = f"{name} {config[name].class_path}" if "class_path" in config[name] else name
        raise RequestError(f"--{made} cannot be made: {type(said).__name__}: {one_line(said)}") from error


def plain(parser: Parser, config: Namespace) -> dict[str, Any]:
    """`config` as `config.yaml` has it: nothing but YAML's own types."""
    whole: dict[str, Any] = yaml.safe_load(parser.dump(config, skip_unset=False))
    return whole
