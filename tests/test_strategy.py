"""What is added to Lightning's strategies: a remote checkpoint is downloaded once on each node."""

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pyarrow.fs
import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, SingleDeviceStrategy
from ranks import on_ranks

from ray_mnist import MNISTDataModule, SimpleModel, Trainer
from ray_mnist.distributed.strategy import LoadsOncePerNode, ShardsLoaders, StaysOnDevice, extend, on_each_node


@pytest.mark.parametrize("made_by", [SingleDeviceStrategy, DDPStrategy, FSDPStrategy, DeepSpeedStrategy])
def test_any_strategy_can_be_extended(made_by: type[Any]) -> None:
    strategy = made_by.__new__(made_by)
    extend(strategy, ShardsLoaders, seed=5)
    extend(strategy, LoadsOncePerNode)
    assert isinstance(strategy, made_by)
    assert type(strategy).process_dataloader is ShardsLoaders.process_dataloader
    assert type(strategy).load_checkpoint is LoadsOncePerNode.load_checkpoint
    assert (type(strategy).__name__, strategy.seed) == (made_by.__name__, 5)


def test_a_strategy_asks_for_its_device_once() -> None:
    """Ray's asks Ray, which takes part of a step, and Lightning asks dozens of times in each."""
    asked: list[str] = []

    class Asks(DDPStrategy):
        @property
        def root_device(self) -> torch.device:
            asked.append("device")
            return torch.device("cpu")

    strategy = Asks()
    extend(strategy, StaysOnDevice)
    assert [strategy.root_device, strategy.root_device] == [torch.device("cpu")] * 2
    assert len(asked) == 1


def copies() -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob("ray_mnist-*"))


def test_the_first_rank_of_each_node_downloads_for_all_of_them(bucket: str) -> None:
    boto3.client("s3").put_object(Bucket="bucket", Key="alone/checkpoint.ckpt", Body=b"weights")

    def load(rank: int) -> Any:
        downloads: list[str] = []
        copy_files = pyarrow.fs.copy_files

        def counted(source: str, target: str, **options: Any) -> None:
            downloads.append(source)
            copy_files(source, target, **options)

        pyarrow.fs.copy_files = counted

        def broadcast(value: Any) -> Any:
            found = [value]
            dist.broadcast_object_list(found)
            return found[0]

        # Ranks 0 and 1 are on a node, rank 2 on another.
        strategy = SimpleNamespace(local_rank=[0, 1, 0][rank], broadcast=broadcast, barrier=dist.barrier)
        with on_each_node(strategy, f"{bucket}/alone/checkpoint.ckpt") as path:
            content = Path(path).read_bytes()
        dist.barrier()
        return path, content, len(downloads), Path(path).parent.exists()

    ranks = on_ranks(load, world_size=3)
    assert len({path for path, *_ in ranks}) == 1
    assert [found for _, *found in ranks] == [[b"weights", 1, False], [b"weights", 0, False], [b"weights", 1, False]]


class LooksForCopies(pl.Callback):
    """Finds copies of checkpoints that are left while a resumed training is under way."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.began_at = -1

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.began_at = trainer.global_step if self.began_at < 0 else self.began_at
        self.found += [str(copy) for copy in copies()]


def test_a_run_in_an_object_store_keeps_no_copies_while_it_trains(bucket: str, gloo: None) -> None:
    looks = LooksForCopies()
    options: dict[str, Any] = {"num_workers": 2, "storage_path": f"{bucket}/runs", "name": "run"}
    for more in ({"max_epochs": 1}, {"max_epochs": 2, "resume": True, "callbacks": [looks]}):
        trainer = Trainer(**options, **more)
        trainer.fit(SimpleModel(), MNISTDataModule(dataset="digits"))
    assert trainer.global_step == 34
    assert looks.began_at == 17
    assert looks.found == []
    assert not copies()
