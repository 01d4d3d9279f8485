"""Finds learning rate and batch size: `python -m ray_mnist.tune`, with `--help` for its options.

Imported, `ray_mnist.tune` is the function of that name, whichever way it is written.
"""

import sys

if __name__ == "__main__":
    from ray_mnist.cli import console, early

    early.answer_version("tune", sys.argv[1:])
    from ray_mnist.search.command import search

    sys.exit(console.exit_status(search))
else:
    from ray_mnist.search.sweep import tune

    # An import ends by binding what is here to the package's attribute: `from ray_mnist import tune` has to find the
    # function there, also after an `import ray_mnist.tune`.
    sys.modules[__name__] = tune  # type: ignore[assignment]
