"""Lists runs, or shows two beside each other: `python -m ray_mnist.runs`, with `--help` for its options."""

import posixpath
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow.fs

from ray_mnist.cli import console
from ray_mnist.cli.parser import make_command
from ray_mnist.cli.saved_run import RUN_FOLDER, SavedRun, folder_at
from ray_mnist.config import RunConfig
from ray_mnist.errors import RequestError, one_line
from ray_mnist.run import lock
from ray_mnist.run.folder import RunFolder

Lines = Iterator[list[str]]  # the cells of each

COLUMNS = ("dataset", "model", "num_workers", "epochs", "restarts", "test_accuracy", "seconds.total")


def runs() -> None:
    """Parses the command line, and prints a line a run, or how two runs differ.

    Raises:
        RequestError: there is no such folder or run.
    """
    if sys.argv[1:2] == ["compare"]:
        parser = make_command(
            "runs compare", "Show two runs beside each other: what was asked for, and what came of it."
        )
        for name in ("a", "b"):
            parser.add_argument(name, help=RUN_FOLDER)
        options = parser.parse_args(sys.argv[2:])
        lines = comparison(SavedRun(folder_at(options.a)), SavedRun(folder_at(options.b)))
    else:
        parser = make_command("runs", "List the runs and sweeps in a folder; `runs compare A B` shows two in detail.")
        place = RunConfig().storage_path
        parser.add_argument("folder", nargs="?", default=place, help="folder or URI that they are in")
        lines = listing(parser.parse_args().folder)
    cells = list(lines)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        console.say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def listing(place: str) -> Lines:
    """A line for each run folder in `place`, by name, under a line of headings."""
    here = RunFolder(place, "")
    try:
        entries = here.fs.get_file_info(pyarrow.fs.FileSelector(here.path.rstrip("/") or "/"))
    except OSError as error:
        raise RequestError(f"{place} cannot be read: {one_line(error)}") from error
    folders = [RunFolder(place, posixpath.basename(entry.path)) for entry in entries if not entry.is_file]
    found = [folder for folder in sorted(folders, key=lambda folder: folder.name) if folder.has("config.yaml")]
    if not found:
        raise RequestError(f"There are no runs in {place}: name the folder that the run folders are in.")
    yield ["run", "outcome", *(name.removesuffix(".total").replace("_", " ") for name in COLUMNS)]
    for folder in found:
        values = flat(SavedRun(folder).result)
        yield [folder.name, outcome(folder), *(shown(values.get(name)) for name in COLUMNS)]


def outcome(folder: RunFolder) -> str:
    """Whether the run has ended, and how."""
    if lock.in_use(folder):
        return "running"
    return "done" if folder.has("result.json") else "unfinished"


def comparison(a: SavedRun, b: SavedRun) -> Lines:
    """What was asked for otherwise, and all that came of it, of both."""
    yield ["", str(a.folder), str(b.folder)]
    asked, came = (flat(a.config), flat(b.config)), (flat(a.result), flat(b.result))
    for of_a, of_b in (asked, came):
        for name in dict.fromkeys([*of_a, *of_b]):
            differs = of_a.get(name) != of_b.get(name)
            if name != "name" and (differs or (of_a is came[0] and not name.startswith("versions."))):
                yield [name, shown(of_a.get(name)), shown(of_b.get(name))]


def flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """The values by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{above}{name}.") if isinstance(value, dict) else {f"{above}{name}": value}
    return found


def shown(value: Any) -> str:
    """A value, for a person."""
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    console.run(runs)
