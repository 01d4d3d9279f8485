"""`--optimizer` and `--lr_scheduler`, as LightningCLI has them: they take the place of the model's own."""

from argparse import SUPPRESS
from functools import partial
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from ray_mnist.errors import RequestError, one_line

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule

OPTIMIZERS = {"optimizer": "torch's", "lr_scheduler": "the schedule of the optimizer's learning rate: torch's"}


def describe_optimizer(part: str) -> str:
    """The help of `--optimizer` or `--lr_scheduler`."""
    return f"{OPTIMIZERS[part]} or pkg.module.Class (default: the model's own)"


def add_optimizers(parser: ArgumentParser) -> None:
    """Adds both, with the arguments of the classes that they name."""
    from pytorch_lightning.cli import LRSchedulerTypeTuple
    from torch.optim import Optimizer

    for part, bases, given in (
        ("optimizer", (Optimizer,), "params"),
        ("lr_scheduler", LRSchedulerTypeTuple, "optimizer"),
    ):
        parser.add_subclass_arguments(
            bases, part, skip={given}, instantiate=False, fail_untyped=False, help=describe_optimizer(part)
        )
    parser.set_defaults(dict.fromkeys(OPTIMIZERS, SUPPRESS))


def use_optimizers(model: "LightningModule", config: Namespace) -> None:
    """Has `model` make the optimizer and the schedule that `config` names, if it names any.

    Raises:
        RequestError: they do not take their arguments, or there is a schedule of no optimizer.
    """
    optimizer, lr_scheduler = (config[part].as_dict() if config.get(part) else None for part in OPTIMIZERS)
    if optimizer is None:
        if lr_scheduler:
            raise RequestError(
                "--lr_scheduler needs --optimizer: the model's own optimizer has the model's own schedule."
            )
        return
    # Made anew wherever it is asked for: a schedule cannot be sent to workers.
    model.configure_optimizers = partial(made, model, optimizer, lr_scheduler)  # type: ignore[method-assign]
    if any(True for _ in model.parameters()):
        try:
            model.configure_optimizers()
        except (TypeError, ValueError) as error:
            raise RequestError(f"--optimizer {optimizer['class_path']} cannot be made: {one_line(error)}") from error


def made(model: "LightningModule", optimizer: dict[str, Any], lr_scheduler: dict[str, Any] | None) -> Any:
    """What `configure_optimizers` returns."""
    from pytorch_lightning.cli import LightningCLI, instantiate_class

    over = instantiate_class(model.parameters(), optimizer)
    return LightningCLI.configure_optimizers(
        model, over, instantiate_class(over, lr_scheduler) if lr_scheduler else None
    )
