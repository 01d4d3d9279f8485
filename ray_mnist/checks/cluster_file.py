"""Checks a cluster file before anything is started from it: one for `ray up`, or KubeRay's documents."""

import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from ray_mnist.checks import Check, kuberay, ray_up
from ray_mnist.checks.contents import strings
from ray_mnist.errors import RequestError, one_line

# Addresses that are documentation's own (RFC 5737), and what is to be written over.
PLACEHOLDER = re.compile(r"\b192\.0\.2\.\d+\b|\bYOUR[-_][A-Z0-9_-]*[A-Z0-9]")


def checks(path: str) -> Iterator[Check]:
    """Checks the cluster file at `path`.

    Raises:
        RequestError: there is no such file, or no requirements.lock to compare it with.
    """
    try:
        documents = [document for document in yaml.safe_load_all(Path(path).read_text()) if document is not None]
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read: {one_line(error)}.") from error
    except yaml.YAMLError as error:
        yield "YAML", [f"it is not YAML, which Ray would say too: {one_line(error)}."]
        return
    yield "YAML", []
    if any(kuberay.is_rays(document) for document in documents):
        yield from kuberay.checks(documents)
    elif len(documents) == 1 and isinstance(documents[0], dict):
        yield from ray_up.checks(documents[0])
    else:
        yield (
            "contents",
            ["it is no cluster: write one mapping for `ray up`, or documents of ray.io for KubeRay."],
        )
    yield (
        "placeholders",
        [
            f"{place} still has the placeholder {found}: write your own."
            for document in documents
            for place, text in strings(document)
            for found in PLACEHOLDER.findall(text)
        ],
    )
