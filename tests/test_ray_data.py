"""A Ray Data set as a loader: the same batches at every world size, of which each rank fetches its own."""

import gc
import os
import re
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

import gloo_workers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import pytorch_lightning as pl
import ray
import ray.data
import torch
from conftest import wait_until
from ranks import on_ranks
from ray._raylet import JobID, PlacementGroupID
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ray_mnist import RayDataLoader, RequestError, Trainer
from ray_mnist.distributed.loaders import epoch_samples, samples_seen
from ray_mnist.distributed.ray_data import NAMESPACE, ShardedRayData, ShardsOfRank
from ray_mnist.distributed.ray_data_streams import Rows, Source, Stream, cut, neighbours
from ray_mnist.distributed.shard_rules import ShardBatches, shard_evaluation, shard_training
from ray_mnist.launch import ahead
from ray_mnist.run.folder import CHECKPOINT, RunFolder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("cluster"),
    # What Lightning says of small machines, and Ray Data of its own options.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

SIZE, BATCH = 500, 64
TESTED = {"rows": 100.0, "sum": float(sum(range(400, SIZE)))}  # the rows of `Digits` to test on


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
        names: list[str] = []

        def broadcast(name: str) -> str:
            names.append(name)
            return names[0]

        self.loader, self.training = loader, training
        self.shards = [ShardsOfRank(loader, shard_batches, rank, broadcast) for rank in range(world_size)]

    def batches(self, epoch: int = 0, batch: int = 0, seed: int = 0) -> Iterator[list[list[int]]]:
        """The rows of each global batch of a run that begins there, by rank."""
        options: dict[str, Any] = {"training": self.training, "weighing": self.training}
        self.loaders = [
            ShardedRayData(self.loader, seed, lambda: (epoch, batch), shards=each, **options) for each in self.shards
        ]
        for shares in zip(*self.loaders, strict=True):
            yield [share["row"].tolist() for share in shares]

    def end(self) -> None:
        for each in self.shards:
            each.end()


def joined(batches: Iterator[list[list[int]]]) -> list[list[int]]:
    return [[*chain(*shares)] for shares in batches]


@pytest.fixture(scope="module", params=[False, True], ids=["in order", "shuffled"])
def ranks(request: pytest.FixtureRequest, digits: str) -> Iterator[list[Ranks]]:
    """One rank, two and three."""
    before = coordinators()
    made = [Ranks(RayDataLoader(ray.data.read_parquet(digits), BATCH, request.param), size) for size in (1, 2, 3)]
    yield made
    for each in made:
        each.end()
    wait_until(lambda: coordinators() <= before, 60, "the coordinators to end")


def coordinators() -> set[str]:
    return {each["name"] for each in ray.util.list_named_actors(all_namespaces=True) if each["namespace"] == NAMESPACE}


def test_any_number_of_ranks_has_the_same_batches(ranks: list[Ranks]) -> None:
    alone, *several = ranks
    whole = joined(alone.batches(3))
    assert sorted(chain(*whole)) == [*range(SIZE)]
    assert [len(batch) for batch in whole] == [BATCH] * 7 + [SIZE - 7 * BATCH]
    for each in several:
        found = [*each.batches(3)]
        assert joined(iter(found)) == whole
        # Of each batch as much as of any other loader's, and weighed alike.
        sizes = [[len(batch[rank :: len(each.loaders)]) for rank in range(len(each.loaders))] for batch in whole]
        assert [[len(share) for share in batch] for batch in found] == sizes
        for rank, loader in enumerate(each.loaders):
            weights = [size[rank] * len(size) / sum(size) for size in sizes]
            assert [*loader.weights.values()] == weights


def test_a_resumed_epoch_goes_on_at_the_very_next_batch(ranks: list[Ranks]) -> None:
    whole = [*ranks[1].batches(3)]
    assert [*ranks[1].batches(3, 5)] == whole[5:]
    assert joined(ranks[2].batches(3, 5)) == joined(iter(whole))[5:]
    for each in ranks[1:]:
        assert [epoch_samples(each.loaders, batches) for batches in (7, 8)] == [7 * BATCH, SIZE]


def test_an_epoch_that_is_broken_off_leaves_nothing_behind(ranks: list[Ranks]) -> None:
    for each in ranks[:2]:
        whole = [*each.batches(3)]
        assert [*islice(each.batches(3), 2)] == whole[:2]
        assert [*each.batches(3)] == whole
    wait_until(lambda: not [each for each in threading.enumerate() if "Executor" in each.name], 60, "Ray Data to end")


def test_each_epoch_is_shuffled_anew(ranks: list[Ranks]) -> None:
    epochs = [joined(ranks[0].batches(epoch)) for epoch in (0, 1, 1)]
    shuffled = ranks[0].loader.shuffle
    assert (epochs[0] != [[*range(first, min(first + BATCH, SIZE))] for first in range(0, SIZE, BATCH)]) is shuffled
    assert (epochs[0] != epochs[1]) is shuffled
    assert epochs[1] == epochs[2]


def rows(blocks: int) -> Any:
    return ray.data.range(SIZE, override_num_blocks=blocks).rename_columns({"id": "row"})


def test_another_seed_shuffles_otherwise_and_other_blocks_do_not() -> None:
    """How many blocks Ray reads depends on the CPUs of the cluster."""
    found = []
    for blocks, seed in ((1, 0), (9, 0), (1, 1)):
        found.append(joined(Ranks(RayDataLoader(rows(blocks), 16, shuffle=True), 1).batches(seed=seed)))
    assert found[0] == found[1] != found[2]


def test_rows_keep_their_order_where_the_first_of_them_take_longest() -> None:
    def take(columns: Any) -> Any:
        time.sleep(3 if columns["row"][0] == 0 else 0)
        return columns

    assert [*chain(*joined(Ranks(RayDataLoader(rows(4).map_batches(take), BATCH), 1).batches()))] == [*range(SIZE)]


@pytest.mark.parametrize("batch_size", [2, BATCH])
def test_evaluation_has_each_row_once_and_equally_many_batches_on_all_ranks(digits: str, batch_size: int) -> None:
    ranks = Ranks(RayDataLoader(ray.data.read_parquet(digits).limit(50), batch_size), 3, training=False)
    for _ in range(2):
        batches = [*ranks.batches()]
        assert [*chain(*chain(*batches))] == [*range(50)]
        assert all(share for batch in batches for share in batch)
        assert samples_seen(ranks.loaders) == 50
    ranks.end()


def test_columns(digits: str) -> None:
    loader = RayDataLoader(ray.data.read_parquet(digits), 400, drop_last=True)
    (batch,) = loader
    (expected,) = loader.dataset.iter_torch_batches(batch_size=400, drop_last=True)
    assert {name: column.dtype for name, column in batch.items()} == {
        "row": torch.int64,
        "image": torch.float32,
        "label": torch.int64,
    }
    for name, column in batch.items():
        torch.testing.assert_close(column, expected[name].cpu())
        column += 1  # which those of the object store do not survive
    labels = RayDataLoader(loader.dataset, 400, collate_fn=lambda columns: columns["label"].tolist())
    assert [*chain(*labels)] == load_digits().target[:SIZE].tolist()


def test_a_row_is_fetched_by_the_rank_that_it_is_for() -> None:
    rows = Rows([("one", 0, 10), ("two", 5, 10), ("three", 0, 3)])
    assert [neighbours(rows, rank, 4).pieces for rank in range(4)] == [
        [("one", 0, 5)],
        [("one", 5, 10)],
        [("two", 5, 9)],
        [("two", 9, 10), ("three", 0, 3)],
    ]
    batches = [batch.pieces for batch in cut(iter([*rows.pieces, ("four", 0, 1)]), 8, drop_last=False)]
    assert batches == [
        [("one", 0, 8)],
        [("one", 8, 10), ("two", 5, 10), ("three", 0, 1)],
        [("three", 1, 3), ("four", 0, 1)],
    ]


class Block:
    """In place of a reference."""


class Blocks(Source):
    """A hundred of them with a row each, and then it fails."""

    ended = False

    def pieces(self, seed: int | None) -> Any:
        self.made = weakref.WeakSet[Block]()
        try:
            for _ in range(100):
                block = Block()
                self.made.add(block)
                yield block, 0, 1
                del block
        finally:
            self.ended = True
        raise OSError("a disk")


def blocks_for(world_size: int) -> tuple[Blocks, list[ShardBatches]]:
    """Something to make a stream of, and each rank's rule."""
    rules: list[ShardBatches] = [
        partial(shard_training, rank=rank, world_size=world_size, share=neighbours) for rank in range(world_size)
    ]
    return Blocks(cast("Any", None), 2, drop_last=False), rules


def test_what_all_ranks_had_is_let_go_of_and_what_fails_does_so_for_all() -> None:
    source, rules = blocks_for(2)
    stream = Stream(source, rules, None)
    one, other = stream.shards
    for _ in islice(one, 40):
        pass
    assert len(source.made) >= 80  # the other rank is to have them yet
    for _ in islice(other, 40):
        pass
    assert len(source.made) <= 4
    for rank in (one, other):
        with pytest.raises(OSError, match="a disk"):
            for _ in rank:
                pass


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Garbage stays."""
    gc.disable()
    yield
    gc.enable()


# A stream that nobody takes from ends at once: what Ray Data still has, once Ray was shut down, would start another.


def test_a_stream_ends_where_it_is_closed(no_collection: None) -> None:
    source, rules = blocks_for(1)
    shards = Stream(source, rules, None).alone()
    next(shards)
    assert not source.ended
    shards.close()
    assert source.ended


def test_a_stream_ends_with_the_last_rank_that_leaves(no_collection: None) -> None:
    source, rules = blocks_for(2)
    stream = Stream(source, rules, None)
    for shards in stream.shards:
        next(shards)
    assert stream.leave(0)
    assert not source.ended
    assert not stream.leave(1)
    assert source.ended


def test_a_stream_ends_with_its_loader_whatever_holds_on_to_it(digits: str, no_collection: None) -> None:
    loader = RayDataLoader(ray.data.read_parquet(digits), 2)
    source, rules = blocks_for(1)
    loader.source = source
    shards = ShardsOfRank(loader, rules, 0, broadcast=str)
    held = shards.begin(0)
    assert shards.stream is not None
    next(shards.stream.shards[0])
    assert not source.ended
    shards.end()
    assert source.ended
    held.close()


def refusal(call: Any) -> str:
    """The one line that a call is refused with."""
    with pytest.raises(RequestError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_refused(digits: str, tmp_path: Path) -> None:
    dataset = ray.data.read_parquet(digits)
    assert refusal(lambda: RayDataLoader(digits, 8)) == "RayDataLoader takes a ray.data.Dataset, not a str."
    for batch_size in (0, 2.5, True):
        assert "is not possible: give " in refusal(lambda size=batch_size: RayDataLoader(dataset, size))
    few = Ranks(RayDataLoader(dataset.limit(2), 2), 3, training=False)
    assert refusal(lambda: [*few.batches()]) == "2 evaluation samples are fewer than the 3 workers: use at most 2."
    few.end()
    pq.write_table(pa.table({"name": ["a", "b"], "row": [0, 1]}), tmp_path / "names.parquet")
    named = RayDataLoader(ray.data.read_parquet(str(tmp_path)), 2)
    assert refusal(lambda: [*named]).startswith("Column name of the Ray Data set cannot be a tensor: leave it out, or ")


@pytest.mark.parametrize("unbatched", [lambda dataset: dataset, lambda dataset: dataset.iterator()])
def test_a_data_set_without_a_batch_size_is_refused(unbatched: Any, digits: str, tmp_path: Path) -> None:
    loader = unbatched(ray.data.read_parquet(digits))
    trainer = Trainer(max_epochs=1, storage_path=str(tmp_path / "runs"))
    assert refusal(lambda: trainer.fit(Linear(), loader)) == (
        "A data set of Ray Data has no batch size: give RayDataLoader(dataset, batch_size), of ray_mnist, in its place."
    )
    assert not [*tmp_path.rglob("*")]


def test_no_cpu_left_for_ray_data_is_said_at_once(digits: str) -> None:
    held = ray.util.placement_group([{"CPU": 3.5}] * 2)
    assert held.wait(60)
    loader = RayDataLoader(ray.data.read_parquet(digits), 8)
    assert "Ray Data needs 2 CPUs beside the workers, which have 7 of the 8 CPUs of the cluster at " in refusal(
        lambda: [*loader]
    )
    ray.util.remove_placement_group(held)


# In a training


def test_workers_without_ray_train_do_not_draw_each_others_ids() -> None:
    """Or they could not join the same cluster."""
    one, other = on_ranks(lambda _: PlacementGroupID.of(JobID.from_int(1)).hex())
    assert one != other


class Digits(pl.LightningDataModule):
    """Reads where it trains: 400 digits to train on, and 100 for all else."""

    def __init__(self, folder: str, wrap: Any = RayDataLoader) -> None:
        super().__init__()
        self.folder, self.wrap, self.address = folder, wrap, ray.get_runtime_context().gcs_address

    def setup(self, stage: str) -> None:
        """Joins the cluster, of which workers over gloo are no part."""
        if not ray.is_initialized():
            ahead.init(address=self.address)

    def train_dataloader(self) -> Any:
        files = [f"{self.folder}/{part}.parquet" for part in range(3)]
        return self.wrap(ray.data.read_parquet(files), BATCH, shuffle=True)

    def val_dataloader(self) -> Any:
        return RayDataLoader(ray.data.read_parquet(f"{self.folder}/3.parquet"), 30)

    test_dataloader = predict_dataloader = val_dataloader


class Linear(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(64, 10)

    def loss(self, batch: Any, name: str) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch["image"] / 16), batch["label"])
        self.log(name, loss, on_step=False, on_epoch=True, batch_size=len(batch["label"]))
        return loss

    def training_step(self, batch: Any) -> Tensor:
        return self.loss(batch, "train_loss")

    def validation_step(self, batch: Any) -> None:
        self.loss(batch, "val_loss")

    def test_step(self, batch: Any) -> None:
        self.log("rows", float(len(batch["row"])), reduce_fx="sum", on_epoch=True)
        self.log("sum", batch["row"].double().sum(), reduce_fx="sum", on_epoch=True)

    def predict_step(self, batch: Any) -> Tensor:
        rows: Tensor = batch["row"]
        return rows

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class DieOnce(pl.Callback):
    """Ends the process of the last rank at the tenth step, the first time."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 10 and trainer.global_rank == 1 and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def fit(folder: str, runs: Path, num_workers: int, name: str = "run", **options: Any) -> Trainer:
    pl.seed_everything(1, verbose=False)
    options |= {"storage_path": str(runs), "name": name, "checkpoint_every_n_steps": 5}
    trainer = Trainer(max_epochs=2, num_workers=num_workers, **options)
    trainer.fit(Linear(), Digits(folder))
    return trainer


def weights(runs: Path, name: str = "run") -> Any:
    newest = RunFolder(str(runs), name).checkpoints()[0]
    return torch.load(runs / name / newest / CHECKPOINT, weights_only=True)["state_dict"]


def check_same(trainer: Trainer, other: Trainer) -> None:
    assert trainer.global_step == other.global_step == 2 * 7
    assert len(trainer.result.history) == 2
    for mine, theirs in zip(trainer.result.history, other.result.history, strict=True):
        assert [mine[loss] for loss in ("train_loss", "val_loss")] == pytest.approx(
            [theirs[loss] for loss in ("train_loss", "val_loss")], rel=1e-5
        )


@pytest.fixture(scope="module")
def alone(digits: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    """A run in this process, and its folder."""
    folder = tmp_path_factory.mktemp("alone")
    return fit(digits, folder, 0), folder


def test_a_run_is_resumed_inside_an_epoch(alone: tuple[Trainer, Path], digits: str, tmp_path: Path) -> None:
    with pytest.raises(InterruptedError):
        fit(digits, tmp_path, 0, callbacks=[Fails()])
    trainer = fit(digits, tmp_path, 0, resume=True)
    assert trainer.result.values["train_samples"] == 400
    torch.testing.assert_close(weights(tmp_path), weights(alone[1]), rtol=0, atol=0)


class Fails(pl.Callback):
    """At the twelfth step, two after the newest checkpoint, and five after the epoch began."""

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 12:
            raise InterruptedError


def test_what_the_docs_have_trains(digits: str, tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "ray-data.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    for stage in ("train", "val"):
        (tmp_path / stage).symlink_to(digits)
    trainer = Trainer(max_epochs=1, storage_path=str(tmp_path / "runs"))
    trainer.fit(Linear(), datamodule=names["Parquet"](str(tmp_path)))
    assert (trainer.global_step, trainer.result.values["val_samples"]) == (2, SIZE)


@pytest.fixture(scope="module")
def two_workers(digits: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    """A run on two workers, without Ray Train, and its folder."""
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gloo_workers.select, "on_ray", gloo_workers.on_gloo)
        return fit(digits, folder, 2), folder


def test_the_losses_do_not_depend_on_the_number_of_workers(
    alone: tuple[Trainer, Path], gloo: None, digits: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    before = coordinators()
    for trainer in (request.getfixturevalue("two_workers")[0], fit(digits, tmp_path, 3)):
        check_same(trainer, alone[0])
        assert trainer.result.values["train_samples"] == alone[0].result.values["train_samples"] == 400
    wait_until(lambda: coordinators() <= before, 60, "the coordinators to end")


def test_two_workers_test_and_predict_each_row_once(gloo: None, digits: str, tmp_path: Path) -> None:
    before = coordinators()
    trainer = Trainer(num_workers=2, storage_path=str(tmp_path))
    tested = trainer.test(Linear(), Digits(digits), verbose=False)
    assert tested == [TESTED]
    predicted = trainer.predict(Linear(), Digits(digits))
    assert predicted is not None
    assert [batch.tolist() for batch in predicted] == [
        [*range(first, min(first + 30, SIZE))] for first in range(400, SIZE, 30)
    ]
    wait_until(lambda: coordinators() <= before, 60, "the coordinators to end")


def test_on_ray_a_worker_that_dies_inside_an_epoch_changes_nothing(
    alone: tuple[Trainer, Path], two_workers: tuple[Trainer, Path], digits: str, tmp_path: Path
) -> None:
    before = coordinators()
    died = DieOnce(tmp_path / "died")
    trainer = fit(digits, tmp_path, 2, callbacks=[died], max_failures=1)
    check_same(trainer, alone[0])
    assert died.marker.exists()
    assert trainer.result.values["restarts"] == 1
    torch.testing.assert_close(weights(tmp_path), weights(two_workers[1]), rtol=0, atol=0)
    assert trainer.result.values["test_samples"] == 100
    assert trainer.result.test_metrics == [TESTED]
    wait_until(lambda: coordinators() <= before, 60, "the coordinators to end")
