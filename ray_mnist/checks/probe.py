"""What a node is asked, in a process on it. The source goes along: the node may have another ray_mnist, or none."""

import hashlib
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def versions() -> dict[str, str]:
    """Of Python, Ray, torch and ray_mnist, the last with a digest of its source: files differ where versions do not."""
    found = {"Python": platform.python_version()}
    for name in ("ray", "torch", "ray-mnist"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    spec = find_spec("ray_mnist")
    digest = hashlib.sha256()
    for file in sorted(Path(spec.origin).parent.rglob("*.py")) if spec and spec.origin else []:
        digest.update(file.read_bytes())
    found["ray-mnist"] += f" ({digest.hexdigest()[:8]})"
    return found


def authentication() -> str:
    """`token` or `disabled`: what this process was started with."""
    return os.environ.get("RAY_AUTH_MODE", "disabled")


class Probe:
    """Runs on one node."""

    def versions(self) -> dict[str, str]:
        """The node's."""
        return versions()

    def authentication(self) -> str:
        """The node's."""
        return authentication()

    def clock(self) -> float:
        """The node's time, in seconds since 1970."""
        return time.time()

    def gpus(self) -> int:
        """How many torch can use."""
        import torch

        return torch.cuda.device_count()

    def block(self, size: int) -> Any:
        """So many bytes, which stay in the node's object store."""
        import numpy as np

        return np.zeros(size, np.uint8)

    def seconds_to_fetch(self, block: list[Any]) -> float:
        """The seconds it takes to have `block`, a reference in a list, in the node's own object store."""
        import ray

        start = time.perf_counter()
        ray.get(block)
        return time.perf_counter() - start
