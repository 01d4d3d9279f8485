"""`scripts/benchmark scale`: what each rank pays for there being many, and what limits many GPUs.

Rank 0 of up to 4,096 runs alone, with the `worker.run` of every worker. Its process group is torch's stand-in for
torch's own tests, which sends nothing; what the other ranks say is what this one says. CPU seconds are counted, and so
is all that this package, Lightning and torch do in between, but not the time on the wire: that is computed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from benchmark_train import machine, measure
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ray_mnist import SimpleModel
from ray_mnist.worker import Job, run

SHARD, STEPS, EPOCHS = 64, 50, 4  # samples of a rank in a batch; batches of an epoch; the first epoch warms up
# Gbit/s of a port. https://www.nvidia.com/en-us/networking/infiniband-adapters/ has those of InfiniBand.
LINKS = {"Ethernet": 25, "InfiniBand HDR": 200, "InfiniBand NDR": 400}
COLUMNS = {"samples_per_second": 0, "first_step": 1, "total": 1}  # of a run, with their digits
# Weights, from https://docs.pytorch.org/vision/stable/models.html and https://huggingface.co/openai-community/gpt2
MODELS = {"ResNet-50": 25_557_032, "GPT-2": 124_439_808}


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    """What is measured; `--quick` only shows that it can be."""
    parser = argparse.ArgumentParser(prog="scripts/benchmark scale")
    parser.add_argument(
        "--quick", action="store_true", help="few ranks, and real workers not at all: to see that it runs"
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 64, 512, 1024, 4096])
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4, 8], help="real ones, on this machine")
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--epochs", type=int, default=5, help="of the real workers")
    options = parser.parse_args(arguments)
    if options.quick:
        options.ranks, options.workers = [1, 64], []
    return options


class Images(Dataset[Any]):
    """`size` images (1, 28, 28) and their labels, of which 4,096 differ."""

    def __init__(self, size: int) -> None:
        self.size, generator = size, torch.Generator().manual_seed(0)
        self.images = torch.randn(4096, 1, 28, 28, generator=generator)
        self.labels = torch.randint(10, (4096,), generator=generator)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index % 4096], self.labels[index % 4096]


class Ranks(LightningEnvironment):
    """Has this process be rank 0."""

    creates_processes_externally = True


class SendsNothing(DDPStrategy):
    """DDP, but for its all-reduce, of which the stand-in hands nothing back."""

    def configure_ddp(self) -> None:
        """Keeps the gradients as they are."""
        super().configure_ddp()
        self.model.register_comm_hook(None, kept)


def kept(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """In place of an all-reduce."""
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


class Context:
    """The `WorkerContext` of rank 0, whom nobody follows."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self.stop = ranks, threading.Event()

    def trainer_arguments(self) -> dict[str, Any]:
        """DDP, over the process group that is there."""
        if self.ranks == 1:
            return {"accelerator": "cpu", "devices": 1}
        return {
            "accelerator": "cpu",
            "devices": 1,
            "num_nodes": self.ranks,
            "strategy": SendsNothing(),
            "plugins": [Ranks()],
        }

    def report(self, *_: Any) -> None:
        """The checkpoint was written, and is not kept."""

    def tell(self, event: Any) -> None:
        """Nobody listens."""


class Clock(pl.Callback):
    """Notes the CPU seconds of this process after each batch."""

    def __init__(self) -> None:
        self.ended: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Lightning's."""
        self.ended.append(time.process_time())


def rank_zero_of(ranks: int) -> dict[str, float]:
    """CPU milliseconds of a step, and of what is between the last step of an epoch and the next one's first."""
    if ranks > 1:
        dist.init_process_group("fake", rank=0, world_size=ranks, store=dist.HashStore())
        stand_in(ranks)
    loader = DataLoader(Images(SHARD * ranks * STEPS), SHARD * ranks, shuffle=True)
    clock = Clock()
    lightning = {"callbacks": [clock], "logger": False, "max_epochs": EPOCHS}
    with tempfile.TemporaryDirectory(prefix="ray_mnist-") as folder:
        run(
            Job("fit", SimpleModel(), {"train_dataloaders": loader}, folder, "run", 0, lightning=lightning),
            Context(ranks),
        )
    spent = [1e3 * (after - before) for before, after in zip(clock.ended, clock.ended[1:], strict=False)][STEPS:]
    between = spent[STEPS - 1 :: STEPS]
    step = statistics.median(spent)
    return {"step": step, "epoch": statistics.median(between) - step}


def stand_in(ranks: int) -> None:
    """Has each rank say what this one says, where they tell each other objects."""

    def gather(found: list[Any], mine: Any, **_: Any) -> None:
        found[:] = [mine] * ranks

    dist.all_gather_object = gather
    dist.gather_object = lambda mine, found, **_: gather(found, mine)
    dist.broadcast_object_list = lambda *_, **__: None


def in_process_of_its_own(ranks: int) -> dict[str, float]:
    """What `rank_zero_of` finds."""
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__, str(ranks)], env=one_thread, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"rank 0 of {ranks} failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def on_the_wire(weights: int, ranks: int, gbit: int) -> float:
    """Milliseconds of a ring's all-reduce of 32-bit gradients, twice all but a rank's own part: arXiv 1802.05799."""
    return 1e3 * 2 * (ranks - 1) / ranks * 4 * weights / (gbit * 1e9 / 8)


def print_table(title: str, *rows: Sequence[object]) -> None:
    """In Markdown; the first row is the head."""
    lines = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    lines.insert(1, "| --- " * len(rows[0]) + "|")
    print(f"{title}\n\n" + "\n".join(lines) + "\n")


def scale(arguments: Sequence[str]) -> None:
    """Measures, and prints the tables and the JSON."""
    options, where = options_of(arguments), machine()
    print(f"{where['date']}: {where['cpus']} CPUs ({where['cpu']}), {where['system']}.\n")
    alone = {ranks: in_process_of_its_own(ranks) for ranks in options.ranks}
    print_table(
        f"Rank 0, with {SHARD} samples of each batch of {SHARD} x ranks: CPU milliseconds, medians.",
        ["ranks", "a step", f"an epoch of {STEPS} steps, beyond them"],
        *[[f"{ranks:,}", f"{found['step']:.2f}", f"{found['epoch']:.0f}"] for ranks, found in alone.items()],
    )
    workers = {count: measure("ours", 256, options, count) for count in options.workers}
    print_table(
        f"Workers on Ray, global batch 256, {options.dataset}.",
        ["workers", "samples/s", "first step, s", "command to exit, s"],
        *[
            [count, *(f"{found[name]:,.{digits}f}" for name, digits in COLUMNS.items())]
            for count, found in workers.items()
        ],
    )
    cells = [(name, weights, ranks) for name, weights in MODELS.items() for ranks in (64, 1024)]
    print_table(
        "Gradients on the wire: milliseconds a step, computed; what the backward pass hides of it is not taken off.",
        ["Gbit/s a GPU", *(f"{name}, {ranks:,} GPUs" for name, _, ranks in cells)],
        *[
            [f"{gbit} ({link})", *(f"{on_the_wire(weights, ranks, gbit):.1f}" for _, weights, ranks in cells)]
            for link, gbit in LINKS.items()
        ],
    )
    print(json.dumps({"machine": where, "rank_zero": alone, "workers": workers}))


if __name__ == "__main__":
    print(json.dumps(rank_zero_of(int(sys.argv[1]))))
