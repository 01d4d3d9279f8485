"""Streams of other libraries, which share themselves out: WebDataset's shards, and the splits of Ray Data."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import pytorch_lightning as pl
import torch
import webdataset as wds
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from ray_mnist import Trainer

ROWS = 20  # each of them a bit of a sum, which is whole if each of them was there once
ALL = float(2**ROWS - 1)


class Adds(pl.LightningModule):
    """Logs how many steps there were, and the sum of the bits in all workers' batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any) -> Tensor:
        bits = (2.0 ** batch["row"].double()).sum()
        self.log("sum", bits, on_step=False, on_epoch=True, reduce_fx="sum")
        self.log("count", float(len(batch["row"])), on_step=False, on_epoch=True, reduce_fx="sum")
        return self.weight

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def whole(sample: dict[str, Any]) -> dict[str, Tensor]:
    return {"row": torch.tensor(int(sample["row.cls"]))}


def shards(folder: Path, number: int) -> list[str]:
    """Tar files with the rows, in turn."""
    for shard in range(number):
        with wds.TarWriter(str(folder / f"{shard}.tar")) as tar:
            for row in range(shard, ROWS, number):
                tar.write({"__key__": f"{row:04}", "row.cls": row})
    return sorted(map(str, folder.glob("*.tar")))


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_shards_of_a_webdataset_are_read_once_each(
    num_workers: int, processes: int, gloo: None, tmp_path: Path
) -> None:
    stream = wds.WebDataset(shards(tmp_path, 4), nodesplitter=wds.split_by_node, shardshuffle=False).map(whole)
    model, trainer = Adds(), Trainer(max_epochs=2, num_workers=num_workers, storage_path=str(tmp_path / "runs"))
    trainer.fit(model, DataLoader(stream, 2, num_workers=processes, persistent_workers=bool(processes)))
    assert [(row["sum"], row["count"]) for row in trainer.result.history] == [(ALL, ROWS)] * 2
    batches = {0: [10, 10], 2: [5, 6]}[num_workers]  # of two samples; each shard has five
    assert trainer.global_step == 2 * batches[bool(processes)]


class SplitRows(IterableDataset[Any]):
    """This worker's rows, which no other one reads: Ray splits them as they come."""

    def __init__(self, dataset: Any, trainer: pl.Trainer) -> None:
        self.trainer = trainer
        splits = dataset.streaming_split(trainer.world_size, equal=True) if trainer.is_global_zero else None
        self.splits = trainer.strategy.broadcast(splits)

    def __iter__(self) -> Any:
        return iter(self.splits[self.trainer.global_rank].iter_rows())


class Parquet(pl.LightningDataModule):
    def __init__(self, root: str) -> None:
        super().__init__()
        self.root = root

    def train_dataloader(self) -> Any:
        import ray.data

        assert self.trainer is not None
        return DataLoader(SplitRows(ray.data.read_parquet(f"{self.root}/train"), self.trainer), 4)


@pytest.mark.slow
def test_what_ray_has_split_among_the_workers_is_left_as_it_is(cluster: None, tmp_path: Path) -> None:
    """On Ray, whose data are read by its own tasks."""
    (tmp_path / "train").mkdir()
    for number, some in enumerate(np.array_split(np.arange(ROWS), 3)):
        pq.write_table(pa.table({"row": some}), tmp_path / "train" / f"{number}.parquet")
    trainer = Trainer(max_epochs=2, num_workers=2, storage_path=str(tmp_path / "runs"))
    trainer.fit(Adds(), datamodule=Parquet(str(tmp_path)))
    assert [(row["sum"], row["count"]) for row in trainer.result.history] == [(ALL, ROWS)] * 2
    assert trainer.global_step == 2 * 3  # of 10 rows for each worker, in batches of 4
