"""A Ray Data set as a loader: the same batches at every world size, of which each rank fetches its own."""

from collections.abc import Iterator
from functools import partial
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import ray.data
import torch
from sklearn.datasets import load_digits

from ray_mnist import RayDataLoader, RequestError
from ray_mnist.distributed.loaders import ShardedRayData, samples_seen
from ray_mnist.distributed.ray_data import ShardsOfRank
from ray_mnist.distributed.shares import round_robin, shard_evaluation, shard_training
from ray_mnist.distributed.streams import Rows, cut, neighbours

pytestmark = [
    pytest.mark.usefixtures("cluster"),
    # What Lightning says of small machines, and Ray Data of its own options.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

SIZE, BATCH = 500, 64


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of Parquet files of unequal sizes: real digits, and the number of each row."""
    folder = tmp_path_factory.mktemp("digits")
    images, labels = load_digits(return_X_y=True)
    for part, rows in enumerate(np.split(np.arange(SIZE), [150, 170, 400])):
        table = {"row": rows, "image": [*images[rows].astype(np.float32)], "label": labels[rows]}
        pq.write_table(pa.table(table), folder / f"{part}.parquet")
    return str(folder)


class Ranks:
    """All ranks of a loader, in this process."""

    def __init__(self, loader: RayDataLoader, world_size: int, training: bool = True) -> None:
        rule = shard_training if training else shard_evaluation
        sizes = {"world_size": world_size, "share": neighbours}
        shard_batches = [partial(rule, rank=rank, **sizes) for rank in range(world_size)]
        self.at, names = (0, 0), list[str]()

        def broadcast(name: str) -> str:
            names.append(name)
            return names[0]

        self.shards = [ShardsOfRank(loader, shard_batches, rank, broadcast) for rank in range(world_size)]
        options: dict[str, Any] = {"training": training, "weighing": training}
        self.loaders = [ShardedRayData(loader, 0, lambda: self.at, shards=each, **options) for each in self.shards]

    def batches(self, epoch: int = 0, batch: int = 0) -> Iterator[list[list[int]]]:
        """The rows of each global batch from there on, by rank."""
        self.at = epoch, batch
        for shares in zip(*self.loaders, strict=True):
            yield [share["row"].tolist() for share in shares]


def joined(batches: Iterator[list[list[int]]]) -> list[list[int]]:
    return [[*chain(*shares)] for shares in batches]


@pytest.fixture(scope="module", params=[False, True], ids=["in order", "shuffled"])
def ranks(request: pytest.FixtureRequest, digits: str) -> Iterator[list[Ranks]]:
    """One rank, two and three."""
    made = [Ranks(RayDataLoader(ray.data.read_parquet(digits), BATCH, request.param), size) for size in (1, 2, 3)]
    yield made
    for each in chain(*(one.shards for one in made)):
        each.end()


def test_batches(ranks: list[Ranks]) -> None:
    alone, *several = ranks
    whole = joined(alone.batches(3))
    assert sorted(chain(*whole)) == [*range(SIZE)]
    for each in several:
        assert joined(each.batches(3)) == whole
        assert joined(each.batches(3, 5)) == whole[5:]
        assert (joined(each.batches(4)) == whole) is not "shuffled"
