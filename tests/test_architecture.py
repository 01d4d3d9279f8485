"""ARCHITECTURE.md is true: what it names exists, and imports point the way that it says."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ray_mnist"
PAGE = (ROOT / "ARCHITECTURE.md").read_text()
# From what imports to what is imported, in groups that are folders or files of the package.
COMMANDS = ["train", "evaluate", "predict", "export", "runs", "tune", "doctor"]
DOWNWARDS = [[*COMMANDS, "search"], ["trainer"], ["launch"], ["worker"], ["data", "models"]]


def test_every_file_and_folder_that_it_names_is_there() -> None:
    words = {word.rstrip(".") for word in re.findall(r"[\w./-]+", PAGE)}
    named = {word for word in words if "/" in word or word.endswith(".py")}
    assert len(named) > 40
    assert {name for name in named if not (ROOT / name).exists() and not (PACKAGE / name).exists()} == set()


def test_every_class_and_function_that_it_names_is_there() -> None:
    words = set(re.findall(r"\w+", "".join(file.read_text() for file in PACKAGE.rglob("*.py"))))
    named = {name for code in re.findall(r"`([A-Za-z_.]+)`", PAGE) for name in code.split(".") if "/" not in code}
    assert named - words - {"py"} == set()


def imports(file: Path) -> Iterator[str]:
    """What a file imports, wherever in it, and not only for the checker of types: modules, or names in modules."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


IMPORTS = {module_of(file): set(imports(file)) for file in PACKAGE.rglob("*.py")}
OURS = {
    module: {name if name in IMPORTS else name.rpartition(".")[0] for name in names} & IMPORTS.keys()
    for module, names in IMPORTS.items()
}


def group_of(module: str) -> str:
    """The file or folder of the package that it is or is in."""
    return f"{module}.".split(".")[1]


def reachable(groups: list[str]) -> set[str]:
    """The modules in these folders and files, and all that they import, directly or not."""
    found: set[str] = set()
    new = {module for module in OURS if group_of(module) in groups}
    while new:
        found |= new
        new = set().union(*(OURS[module] for module in new)) - found
    return found


def test_there_are_no_circles() -> None:
    TopologicalSorter(OURS).prepare()


@pytest.mark.parametrize("level", range(1, len(DOWNWARDS)))
def test_nothing_imports_what_is_above_it(level: int) -> None:
    assert {*DOWNWARDS[level]} <= {group_of(module) for module in OURS}
    above = {group for groups in DOWNWARDS[:level] for group in groups}
    assert {module for module in reachable(DOWNWARDS[level]) if group_of(module) in above} == set()


def test_data_and_models_know_nothing_of_ray() -> None:
    foreign = {name for module in reachable(["data", "models"]) for name in IMPORTS[module]}
    assert {name for name in foreign if name.split(".")[0] == "ray"} == set()
