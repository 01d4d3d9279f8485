"""`ray-mnist COMMAND …`, or `python -m ray_mnist COMMAND …`: what `python -m ray_mnist.COMMAND …` does."""

import runpy
import sys

from ray_mnist.cli import console
from ray_mnist.cli.parser import Parser, versions

COMMANDS = ("train", "evaluate", "predict", "export", "runs", "tune", "doctor")


def run() -> None:
    """Runs the command that the first argument names."""
    parser = Parser(
        prog="ray-mnist",
        version=versions(),
        description="Train a model and use it, search for the best one, or check a cluster; each has its own --help.",
    )
    parser.add_argument("command", choices=COMMANDS)
    command = parser.parse_args(sys.argv[1:2]).command
    del sys.argv[1]
    runpy.run_module(f"ray_mnist.{command}", run_name="__main__", alter_sys=True)


def main() -> None:
    """The console script."""
    sys.exit(console.exit_status(run))


if __name__ == "__main__":
    main()
