"""What the ranks tell each other beside gradients."""

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from ranks import on_ranks
from ray.train.torch.config import _is_backend_nccl
from torch.distributed.distributed_c10d import Backend, BackendConfig
from torch.testing._internal.distributed import fake_pg  # noqa: F401 (adds the backend)

from ray_mnist.distributed.collectives import gather
from ray_mnist.distributed.metrics import reduce_across_ranks
from ray_mnist.launch.ray import process_group_backend


def trainer_of(rank: int, world_size: int) -> Any:
    """As much of a trainer as tells who is who."""
    return SimpleNamespace(global_rank=rank, world_size=world_size, is_global_zero=rank == 0)


def test_only_rank_zero_gathers() -> None:
    found = on_ranks(lambda rank: gather(trainer_of(rank, 3), {"of": rank, "heavy": "x" * 1000 * rank}), world_size=3)
    assert found == [[{"of": rank, "heavy": "x" * 1000 * rank} for rank in range(3)], [], []]
    assert gather(trainer_of(0, 1), "alone") == ["alone"]


def test_on_gpus_objects_go_over_the_cpu() -> None:
    backend = process_group_backend(use_gpu=True)
    assert BackendConfig(Backend(backend)).get_device_backend_map() == {"cpu": "gloo", "cuda": "nccl"}
    assert _is_backend_nccl(backend)  # Ray has NCCL give up when a peer is gone

    def work(rank: int) -> Any:
        found = gather(trainer_of(rank, 2), f"rank {rank}")
        parts = reduce_across_ranks({"loss": ("sum", torch.tensor(1.0 + rank), 1.0)}, 2)
        return dist.get_backend_config(), found, parts["loss"].item()

    # There is no GPU here: torch's stand-in for a backend takes the place of NCCL, whose collectives do nothing.
    stand_in = backend.replace("nccl", "fake")
    assert on_ranks(work, 2, stand_in) == [
        ("cpu:gloo,cuda:fake", ["rank 0", "rank 1"], 3.0),
        ("cpu:gloo,cuda:fake", [], 3.0),
    ]
