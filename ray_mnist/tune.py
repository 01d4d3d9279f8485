"""Finds learning rate and batch size: `python -m ray_mnist.tune`, with `--help` for its options.

Imported, `ray_mnist.tune` is the function of that name, whichever way it is written.
"""

import sys

if __name__ == "__main__":
    from ray_mnist.cli import console, early
    from ray_mnist.cli.parser import expand
    from ray_mnist.config import SweepConfig
    from ray_mnist.lightning_package import import_heavy
    from ray_mnist.search.options import SHORT, make_sweep_options

    def search() -> None:
        """Searches, unless something else was asked for."""
        early.answer(make_sweep_options, expand(sys.argv[1:], SHORT), SweepConfig)
        import_heavy("ray_mnist.search.command")
        from ray_mnist.search import command

        command.search()

    console.run(search)
else:
    from ray_mnist.search.sweep import tune

    # An import ends by binding what is here to the package's attribute: `from ray_mnist import tune` has to find the
    # function there, also after an `import ray_mnist.tune`.
    sys.modules[__name__] = tune  # type: ignore[assignment]
