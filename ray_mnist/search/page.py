"""report.html of a sweep: its trials and the best of them on one page that needs nothing but itself."""

from typing import Any

from ray_mnist.run.folder import RunFolder
from ray_mnist.run.page import encoded, results, write_page


def write(
    folder: RunFolder,
    values: dict[str, Any],
    table: list[dict[str, Any]],
    metric: str,
    plots: dict[str, bytes],
    started: float,
) -> None:
    """Writes it from `values`, which is result.json, the plots, and the best_config.yaml that is there.

    Args:
        folder: the sweep folder.
        values: result.json.
        table: a row a trial.
        metric: what the best was chosen by.
        plots: the PNG files, by their names.
        started: when, in seconds since the epoch.
    """
    write_page(
        folder,
        "search/report.html.jinja",
        values,
        started,
        metric=metric,
        parameters={name: in_short(value) for name, value in values["parameters"].items()},
        results=results(values),
        graphs=encoded(plots),
        trials=[{name: in_short(value) for name, value in row.items()} for row in table],
        config=folder.read("best_config.yaml").decode(),
    )


def in_short(value: Any) -> str:
    """Such as `0.001235`; nothing where there is no value."""
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
