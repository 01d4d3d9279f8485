"""Stands in for CUDA on machines without a GPU, where our code, Lightning and Ray end: at torch's calls of the driver.

Ray gives each worker its GPUs, which are only numbers to it; torch is told that they are there. A tensor that is to go
there stays on the CPU, and what would go over NCCL goes over gloo. What torch was asked for is in `ASKED`.

The name of the back end has it installed in whichever process it is sent to: it is the first of a run that is.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

ASKED: dict[str, Any] = {}
NAME = "Stand-in for a GPU"


class Backend(str):
    """The name of a back end for `torch.distributed`."""

    def __reduce__(self) -> Any:
        return arrived, (str(self),)


def arrived(name: str) -> Backend:
    install()
    return Backend(name)


class StaysOnCpu(TorchFunctionMode):
    """Takes each CUDA device in torch's calls for the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: on_cpu(value) for name, value in (kwargs or {}).items()}
        return func(*map(on_cpu, args), **kwargs)


def on_cpu(value: Any) -> Any:
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "cuda" else value


@contextmanager
def nothing(*_: Any) -> Iterator[None]:
    yield


def install() -> None:
    """Has the torch of this process believe in the GPUs of CUDA_VISIBLE_DEVICES."""
    if torch.cuda.device_count is visible:
        return
    for name, answer in {
        "is_available": lambda: visible() > 0,
        "device_count": visible,
        "get_device_name": lambda *_: NAME,
        "get_device_capability": lambda *_: (8, 0),
        "set_device": lambda device: ASKED.update(set_device=str(device)),
        "mem_get_info": lambda *_: (2**33, 2**33),
        "empty_cache": lambda: None,
        "Stream": lambda *_: None,
        "stream": nothing,
        "device": nothing,
    }.items():
        setattr(torch.cuda, name, answer)
    torch.accelerator.is_available = lambda: False  # of which an optimizer asks whether it records a graph
    del torch._C._cuda_clearCublasWorkspaces  # which Lightning calls where it is there
    dist.init_process_group = without_nccl(dist.init_process_group)
    DistributedDataParallel.__init__ = without_devices(DistributedDataParallel.__init__)
    from ray_mnist.launch import ray  # which Ray's workers import by name

    ray.train_function = staying_on_cpu(ray.train_function)


def visible() -> int:
    """How many GPUs the environment shows."""
    return len([number for number in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if number])


def without_nccl(init: Any) -> Any:
    @functools.wraps(init)
    def init_process_group(backend: str, **options: Any) -> None:
        ASKED["backend"] = backend
        init(backend=backend.replace("nccl", "gloo"), **options)

    return init_process_group


def without_devices(init: Any) -> Any:
    @functools.wraps(init)
    def __init__(self: Any, module: Any, device_ids: Any = None, **options: Any) -> None:
        ASKED["ddp"] = device_ids
        init(self, module, **options)

    return __init__


def staying_on_cpu(train: Any) -> Any:
    @functools.wraps(train)
    def train_function(config: dict[str, Any]) -> Any:
        with StaysOnCpu():
            return train(config)

    return train_function
