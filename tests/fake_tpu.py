"""Runs a module as on a TPU host: `python fake_tpu.py CHIPS MODULE ARGUMENT…`.

The chips' work is done by the real torch_xla on the CPU (PJRT_DEVICE=CPU): only their number is made up. On the CPU
torch_xla has no several devices that exchange gradients, so that for more than one chip their processes and these
exchanges are made up too.
"""

import runpy
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import ray.util.tpu
import torch
import torch.distributed as dist
import torch_xla.core.xla_model as xm
import torch_xla.distributed.xla_multiprocessing as xmp
from lightning_fabric.accelerators import XLAAccelerator
from torch_xla import runtime


def pretend(chips: int, change: Callable[[Any, str, Any], None] = setattr) -> None:
    """Gives this process, and those that it forks, a host with so many chips."""
    change(ray.util.tpu, "get_num_tpu_chips_on_node", lambda: chips)
    change(ray.util.tpu, "get_current_pod_worker_count", lambda: 1)
    change(XLAAccelerator, "auto_device_count", staticmethod(lambda: chips))
    change(XLAAccelerator, "is_available", staticmethod(lambda: chips > 0))
    if chips <= 1:
        return

    def spawn(function: Callable[..., None], args: tuple[Any, ...], start_method: str) -> None:
        with ProcessPoolExecutor(chips, get_context(start_method)) as processes:
            list(processes.map(on_chip, range(chips), [chips] * chips, [function] * chips, [args] * chips))

    change(xmp, "spawn", spawn)


def on_chip(rank: int, chips: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    runtime.global_ordinal, runtime.world_size = lambda: rank, lambda: chips
    xm.reduce_gradients, xm.broadcast_master_param = mean_gradients, rank_zero_weights
    function(rank, *args)


def mean_gradients(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for weight in group["params"]:
            gradient = weight.grad.cpu()
            dist.all_reduce(gradient)
            weight.grad.copy_(gradient / dist.get_world_size())


def rank_zero_weights(model: torch.nn.Module) -> None:
    for weight in model.parameters():
        value = weight.detach().cpu()
        dist.broadcast(value, 0)
        weight.data.copy_(value)


if __name__ == "__main__":
    import fake_tpu  # by its name, for runpy takes the other one

    _, chips, module, *sys.argv[1:] = sys.argv
    fake_tpu.pretend(int(chips))
    runpy.run_module(module, run_name="__main__", alter_sys=True)
