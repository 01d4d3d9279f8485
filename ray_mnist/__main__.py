"""`ray-mnist COMMAND …`, or `python -m ray_mnist COMMAND …`: what `python -m ray_mnist.COMMAND …` does.

A shell completes it after `eval "$(register-python-argcomplete ray-mnist)"`.
"""

import os
import runpy
import sys
from typing import NoReturn

from ray_mnist.cli import console
from ray_mnist.cli.parser import Parser, versions

COMMANDS = ("train", "evaluate", "predict", "export", "serve", "runs", "tune", "doctor")


def run() -> None:
    """Runs the command that the first argument names."""
    parser = Parser(
        prog="ray-mnist",
        version=versions(),
        description="Train a model and use it, search for the best one, or check a cluster; each has its own --help.",
    )
    parser.add_argument("command", choices=COMMANDS)
    line = os.environ.get("COMP_LINE", "").split(" ") if "_ARGCOMPLETE" in os.environ else []
    if len(line) > 2 and line[1] in COMMANDS:  # a shell completes what comes after the command
        os.environ["_ARGCOMPLETE"] = "2"  # of so many words the command's parser knows nothing
        command = line[1]
    else:
        command = parser.parse_args(sys.argv[1:2]).command
        del sys.argv[1]
    runpy.run_module(f"ray_mnist.{command}", run_name="__main__", alter_sys=True)


def main() -> NoReturn:
    """The console script."""
    console.run(run)


if __name__ == "__main__":
    main()
