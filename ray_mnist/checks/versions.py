"""The versions that a cluster file names, against those that scripts/setup installs on every node."""

import re
from collections.abc import Iterator
from functools import cache
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet

from ray_mnist.checks.contents import strings
from ray_mnist.errors import RequestError

LOCK = Path(__file__).parents[2] / "requirements.lock"
# pip install ray[default]==2.9.0, …/ray-3.0.0.dev0-cp310-cp310-….whl, rayproject/ray-ml:2.9.0-py310-gpu
PACKAGES = (
    re.compile(r"\b([A-Za-z][\w.-]*)(?:\[[\w,-]*\])?==(\d[\w.]*)"),
    re.compile(r"\b(\w+)-(\d[\w.]*)-cp\d+-"),
    re.compile(r"\brayproject/(ray)[\w-]*:([\w.]+)"),
)
# python3.10 -m venv, uv python install 3.10, conda's python=3.10, …-py310-gpu, …-cp310-cp310
PYTHON = re.compile(r"\bpython(?: install |=+)?(3\.\d+)|-(?:py|cp)(3\d+)\b")


@cache
def locked() -> dict[str, set[str]]:
    """The versions in requirements.lock by the package's name; several where machines differ.

    Raises:
        RequestError: it is not there, as in an installed package.
    """
    if not LOCK.is_file():
        raise RequestError(f"There is no {LOCK} to compare versions with: run this from a checkout of the project.")
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==([\w.+!]+)", LOCK.read_text(), re.MULTILINE):
        found.setdefault(name, set()).add(version)
    return found


def findings(*documents: Any) -> Iterator[str]:
    """What differs anywhere in the documents, each once."""
    packages: dict[tuple[str, str], str] = {}
    pythons = set()
    for place, text in (found for document in documents for found in strings(document)):
        for match in (match for pattern in PACKAGES for match in pattern.finditer(text)):
            packages.setdefault((match[1], match[2]), place)
        pythons |= {dotted or f"3.{short[1:]}" for dotted, short in PYTHON.findall(text)}
    for (name, version), place in packages.items():
        lock = locked().get(re.sub(r"[-_.]+", "-", name).lower(), {version})
        if version not in lock:
            names = f"{place} (Ray's own, if you wrote none) names {name} {version}"
            every = f"but every node gets the {' or '.join(sorted(lock))} of requirements.lock"
            yield f"{names}, {every}: write that version, or [] for commands of Ray's."
    supported = metadata("ray-mnist")["Requires-Python"]
    for python in sorted(pythons):
        if python not in SpecifierSet(supported):
            yield f"Python {python} is named, but this project needs {supported}: use one of those on every node."
    if len(pythons) > 1:
        yield f"Python {' and '.join(sorted(pythons))} are named, but all nodes need the same: use one of them."
