"""Reads a cluster file that may have anything anywhere: one check must not trip over what another one finds."""

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any


def section(config: Any, name: str) -> dict[str, Any]:
    """The mapping of that name, or an empty one where it is missing or something else."""
    value = config.get(name) if isinstance(config, dict) else None
    return value if isinstance(value, dict) else {}


def mappings(config: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The mappings in the list of that name, or none where it is missing or something else."""
    value = config.get(name)
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def number(config: dict[str, Any], name: str, default: int) -> int:
    """The whole number of that name, or the default where it is missing or something else."""
    value = config.get(name)
    return value if isinstance(value, int) else default


def strings(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Every text in `value`, after its place, such as `provider.worker_ips[0]`."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from strings(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from strings(inner, f"{place}[{index}]")
    elif isinstance(value, str):
        yield place, value


def nearest(key: str, known: Iterable[str]) -> str:
    """Such as `did you mean region?`."""
    close = get_close_matches(key, known, n=1)
    return f"did you mean {close[0]}?" if close else f"leave it out, or use one of {', '.join(sorted(known))}."
