"""Prints docs/lightning.md, what differs from Lightning: `PYTHONPATH=tests python -m conformance.table`."""

from conformance import (  # noqa: F401  (they fill the table)
    programs_arguments,
    programs_callbacks,
    programs_calls,
    programs_models,
)
from conformance.harness import PROGRAMS, Program

# Lightning's arguments that are answered otherwise here, or refused.
ARGUMENTS = {
    "accelerator": "`use_gpu=True`, `tpu_cores=N`; one that says otherwise is refused",
    "devices": "`num_workers`: one device each; more than one is refused",
    "num_nodes": "`num_workers`: Ray places them; more than one is refused",
    "strategy": '`"ddp"` (the default), `"ddp_find_unused_parameters_true"`, `"fsdp"` with GPUs, an object of '
    "`ray.train.lightning`, or `ModelParallelStrategy()` for [models larger than a device](sharded.md)",
    "barebones": "refused: it leaves out the checkpoints that a run recovers from",
    "max_epochs": "10 if neither it nor `max_steps` nor `max_time` is given, and not 1000",
    "num_sanity_val_steps": "0 unless it is given, and not 2",
    "enable_progress_bar": "a run has its own line; True, or a bar among the callbacks, has Lightning's in its place",
    "enable_model_summary": "off unless it is given: a run's first line counts the parameters",
    "logger": "TensorBoard in the run folder unless one is given; `False` for none",
    "enable_checkpointing": "about checkpoints beside the run folder's own, which are always written",
    "callbacks": "LearningRateFinder and BatchSizeFinder are refused: `ray_mnist.tune` searches",
    "plugins": "a ClusterEnvironment is refused: Ray is the cluster",
}

HEAD = """\
# What differs from Lightning

A program is for Lightning's Trainer and for this one. `tests/conformance/` has {count} small programs, written from
Lightning's documentation: one for each argument, callback and method. Each is run by Lightning's own Trainer in one
process, by ours in this process, and by ours on two workers that share out the same global batch. Weights, metrics,
files, the order of the hooks, what comes back and what is raised are compared: to 1e-6 in this process, and on two
workers to 1e-5, since sums are taken in another order. {same} programs find the same everywhere; the others, and why
they differ, are in the second table. This page is printed by `PYTHONPATH=tests python -m conformance.table`, and a
test holds it to what the programs find.

What Lightning's Trainer has beside the methods and what they leave behind, such as `trainer.optimizers` or
`trainer.fit_loop`, is in the workers: `self.trainer` in the model, and what callbacks are called with, is Lightning's
own.

## Arguments

All arguments mean what they mean to Lightning, but for these:

| argument | here |
| --- | --- |
"""
PROGRAMS_HEAD = """
## Programs

| program | in this process | 2 workers | what differs, and why |
| --- | --- | --- | --- |
"""


def line(row: Program) -> str:
    reasons: dict[str, list[str]] = {}
    for what, why in {**row.differs, **row.differs_on_workers}.items():
        reasons.setdefault(why, []).append(what)
    why = "; ".join(f"{', '.join(what)}: {reason}" for reason, what in reasons.items())
    here, there = ("differs" if found else "same" for found in (row.differs, reasons))
    return f"| {row.about} | {here} | {there} | {why} |\n"


def page() -> str:
    same = sum(not (row.differs or row.differs_on_workers) for row in PROGRAMS.values())
    arguments = "".join(f"| `{name}` | {here} |\n" for name, here in ARGUMENTS.items())
    rows = sorted(PROGRAMS.values(), key=lambda row: not (row.differs or row.differs_on_workers))
    return HEAD.format(count=len(PROGRAMS), same=same) + arguments + PROGRAMS_HEAD + "".join(map(line, rows))


if __name__ == "__main__":
    print(page(), end="")
