"""The options of `python -m ray_mnist.tune`, for a help that does not wait for Ray and torch."""

from dataclasses import fields

from ray_mnist.cli.parser import Parser, make_options
from ray_mnist.config import SweepConfig, flag

SHORT = {"--dataset": "--data.dataset", "--space": "--space+"}  # each --space adds one
LR, BATCH_SIZE = "1e-4,1e-1", "32,64,128"


def make_sweep_options() -> Parser:
    """Train's options and those of the search."""
    parser = make_options("tune", "Search for the arguments that a model trains best with.", short=False)
    for option in fields(SweepConfig):
        parser.add_argument(flag(option.name), type=option.type, default=option.default, help=option.metadata["help"])
    parser.add_argument("--lr", type=str | None, help=f"range of --model.lr, drawn by its logarithm (default: {LR})")
    parser.add_argument("--batch-size", type=str | None, help=f"choices of --data.batch_size (default: {BATCH_SIZE})")
    parser.add_argument("--dataset", type=str | None, help="short for --data.dataset")
    parser.add_argument(
        "--space", type=list[str], default=[], help="KEY=VALUES of any other argument, such as model.width=64,128"
    )
    return parser
