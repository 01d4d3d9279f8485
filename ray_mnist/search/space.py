"""What a sweep searches: ranges and choices, as a person writes them."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from ray import tune
from ray.tune.search.sample import Categorical, Domain, Float, Integer

from ray_mnist.errors import RequestError

GRID_POINTS = 5  # of a range, in a grid search


def of_trainer(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a trial's parameters that are arguments of Lightning's Trainer."""
    trainer = "trainer."
    return {name.removeprefix(trainer): value for name, value in parameters.items() if name.startswith(trainer)}


def parse(name: str, text: str, as_range: bool = False) -> Domain:
    """`64,128` is a choice, `0.1:0.5` a range, `1e-4:1e-1:log` one whose logarithm is drawn evenly.

    Args:
        name: the parameter's, for complaints.
        text: what was written.
        as_range: two numbers with a comma are a logarithmic range, as `--lr` takes them.

    Raises:
        RequestError: it is empty, reversed, or none of these.
    """
    pieces = [value_of(piece) for piece in text.replace(":", ",").split(",")]
    if "" in pieces:
        raise RequestError(f"{name} {text!r} leaves a value empty: write choices as 1,2,3 and ranges as 1:3.")
    if not as_range and ":" not in text:
        return tune.choice(list(dict.fromkeys(pieces)))
    low, high, *rest = pieces if len(pieces) > 1 else pieces * 2
    if not all(isinstance(end, int | float) and math.isfinite(end) for end in (low, high)) or rest not in ([], ["log"]):
        raise RequestError(f"{name} {text!r} is no range: write it as LOW:HIGH or LOW:HIGH:log.")
    logarithmic = as_range or bool(rest)
    if low == high:
        return tune.choice([low])
    if low > high:
        raise RequestError(f"{name} {text!r} is reversed: write the lower end first.")
    if logarithmic and low <= 0:
        raise RequestError(f"{name} {text!r} is logarithmic: both ends have to be positive.")
    if isinstance(low, int) and isinstance(high, int):
        return tune.lograndint(low, high + 1) if logarithmic else tune.randint(low, high + 1)
    return tune.loguniform(low, high) if logarithmic else tune.uniform(low, high)


def value_of(text: str) -> Any:
    """A number, a truth value or a word."""
    text = text.strip()
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"true": True, "false": False, "null": None}.get(text.lower(), text)


def points(domain: Any) -> list[Any]:
    """All choices; of a range its ends and what lies evenly between."""
    if isinstance(domain, Categorical):
        return list(domain.categories)
    if not isinstance(domain, Float | Integer):
        return [domain]
    last = domain.upper - 1 if isinstance(domain, Integer) else domain.upper
    even = np.geomspace if "Log" in type(domain.get_sampler()).__name__ else np.linspace
    found = even(domain.lower, last, GRID_POINTS).tolist()
    return sorted({round(point) for point in found}) if isinstance(domain, Integer) else found


def as_grid(space: Mapping[str, Any]) -> dict[str, Any]:
    """Each combination of each parameter's points once."""
    return {name: tune.grid_search(points(domain)) for name, domain in space.items()}


def extremes(space: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Parameters to try out before a sweep: each point of each parameter, beside the first of all others."""
    first = {name: points(domain)[0] for name, domain in space.items()}
    return [first | {name: point} for name, domain in space.items() for point in points(domain)] or [{}]
