"""Checks a cluster file, or a running cluster: `python -m ray_mnist.doctor`, with `--help` for its options."""

import sys

from ray_mnist.cli import console
from ray_mnist.cli.parser import Parser, make_command
from ray_mnist.config import RunConfig


def make_parser() -> Parser:
    """A file, or what names a running cluster."""
    parser = make_command("doctor", "Check a cluster file before `ray up`, or, without a file, a running cluster.")
    parser.add_argument("file", type=str | None, nargs="?", help="cluster file, such as cluster/gpu.yaml")
    parser.add_argument("--address", type=str | None, help="running cluster (default: the one this machine is part of)")
    parser.add_argument(
        "--storage-path", type=str, default=RunConfig().storage_path, help="folder or URI that its nodes are to share"
    )
    return parser


def examine() -> None:
    """Parses the command line, and says of each thing whether it is well; exits with 1 if something is not."""
    config = make_parser().parse_args()
    from ray_mnist.checks import cluster_file, cluster_health

    if config.file:
        what, checks = config.file, cluster_file.checks(config.file)
    else:
        what, checks = "the cluster", cluster_health.checks(config.address, config.storage_path)
    count = 0
    with console.quiet():
        for about, findings in checks:
            for line in [f"finding: {finding}" for finding in findings] or [f"ok: {about}"]:
                console.say(line)
            count += len(findings)
    console.say(f"{count} {'finding' if count == 1 else 'findings'} in {what}" if count else f"{what} is well")
    if count:
        sys.exit(1)


if __name__ == "__main__":
    console.run(examine)
