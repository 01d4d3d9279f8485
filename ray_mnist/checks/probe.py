"""What a node is asked, in a process on it. The source goes along: the node may have another ray_mnist, or none."""

import hashlib
import os
import platform
import re
import socket
import subprocess
import time
from contextlib import suppress
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

NVIDIA_SMI_S = 30  # it wakes GPUs that nobody uses


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

    def cuda(self) -> tuple[str | None, str | None]:
        """The CUDA that torch was built for, and the newest that the driver knows; None where there is none."""
        import torch

        with suppress(OSError, subprocess.SubprocessError):
            told = subprocess.run(["nvidia-smi", "-q", "-x"], capture_output=True, text=True, timeout=NVIDIA_SMI_S)
            if found := re.search(r"<cuda_version>([\d.]+)</cuda_version>", told.stdout):
                return torch.version.cuda, found[1]
        return torch.version.cuda, None

    def free_address(self) -> str:
        """An address of this node at which other nodes can meet it, as host:port."""
        import ray

        host = ray.util.get_node_ip_address()
        with socket.create_server((host, 0)) as server:
            return f"{host}:{server.getsockname()[1]}"

    def all_reduce(self, rank: int, address: str, backend: str, device: str, size: int, seconds: float) -> float:
        """The seconds that the sum of so many bytes takes with the other of two nodes, which meet at `address`."""
        import torch
        import torch.distributed as dist

        limit = timedelta(seconds=seconds)
        dist.init_process_group(backend, init_method=f"tcp://{address}", rank=rank, world_size=2, timeout=limit)
        try:
            ones = torch.ones(size // 4, device=device)
            for _ in range(2):  # the first begins with a connection
                start = time.perf_counter()
                dist.all_reduce(ones)
                total = ones[-1].item()
            if total != 4:
                raise RuntimeError(f"the sum of {rank} and its neighbour is wrong")
            return time.perf_counter() - start
        finally:
            dist.destroy_process_group()

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
