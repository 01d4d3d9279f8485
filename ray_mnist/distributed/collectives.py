"""What the ranks tell each other beside gradients: totals, and objects that go over the CPU."""

from typing import Any

import pytorch_lightning as pl
import torch


def total(trainer: pl.Trainer, count: float) -> float:
    """The sum of `count` over all ranks."""
    if trainer.world_size == 1:
        return float(count)
    mine = torch.tensor(count, dtype=torch.float64, device=trainer.strategy.root_device)
    return float(trainer.strategy.reduce(mine, reduce_op="sum"))


def common_to_all(mine: set[str]) -> set[str]:
    """What is in `mine` on all ranks."""
    found: list[set[str]] = [set() for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(found, mine)
    return set.intersection(*found)


def gather(trainer: pl.Trainer, mine: Any) -> list[Any]:
    """On rank 0 what each rank has, in their order; nothing on the others."""
    if trainer.world_size == 1:
        return [mine]
    found = [None] * trainer.world_size if trainer.is_global_zero else None
    torch.distributed.gather_object(mine, found)
    return found or []
