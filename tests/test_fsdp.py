"""Models in shards: Lightning's ModelParallelStrategy (FSDP2) over gloo, and checkpoints that all ranks write."""

import os
import pickle
import runpy
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed.checkpoint as dcp
from conftest import altered
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, TensorDataset

from ray_mnist import RequestError, Trainer, TrainingError
from ray_mnist.distributed.shard_rules import interleave, round_robin_in_step
from ray_mnist.export import export
from ray_mnist.run.folder import CHECKPOINT, CHECKSUM, Part, RunFolder, checkpoint_name
from ray_mnist.run.records import read_metrics
from ray_mnist.run.shards import check_shards, whole_file
from ray_mnist.run.uploads import Saved, Uploads

pytestmark = pytest.mark.timeout(400)

STEPS = 7  # of an epoch


class Net(pl.LightningModule):
    """Two layers, and it tells the sum of each sample's values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 33), nn.ReLU(), nn.Linear(33, 1))

    def shard(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.net[0], mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def configure_model(self) -> None:
        if not isinstance(self.net, FSDPModule) and self.device_mesh is not None:
            self.shard()

    def loss(self, batch: Any) -> Any:
        values, sums = batch
        return nn.functional.mse_loss(self.net(values), sums)

    def training_step(self, batch: Any, _: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Any, _: int) -> Any:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def loader(size: int = 50, batch_size: int = 8, shuffle: bool = False) -> DataLoader[Any]:
    """The last batch is too small for all workers."""
    values = torch.randn(size, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(values, values.sum(1, keepdim=True)), batch_size, shuffle)


def fit(storage: Path | str, name: str, model: Net | None = None, **options: Any) -> tuple[Trainer, Net]:
    """Trains with clipped gradients."""
    defaults: dict[str, Any] = {"num_workers": 2, "max_epochs": 2, "logger": False, "gradient_clip_val": 1.0}
    trainer, model = Trainer(storage_path=str(storage), name=name, **defaults | options), model or Net()
    trainer.fit(model, loader(shuffle=True), loader())
    return trainer, model


def losses(storage: Path | str, name: str) -> list[float]:
    rows = read_metrics(RunFolder(str(storage), name))
    return [row[kind] for row in rows for kind in ("train_loss", "val_loss")]


@pytest.fixture(params=["local", pytest.param("object store", marks=pytest.mark.slow)])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A storage path in a folder, or in an object store."""
    return str(tmp_path) if request.param == "local" else f"{request.getfixturevalue('bucket')}/{tmp_path.name}"


def same(mine: dict[str, Any], theirs: dict[str, Any], **tolerance: float) -> bool:
    assert list(mine) == list(theirs)
    return all(torch.allclose(mine[name], theirs[name], **tolerance) for name in mine)


def test_a_model_in_shards_trains_as_under_ddp_and_is_used_on_any_number_of_workers(
    storage: str, gloo: None, tmp_path: Path
) -> None:
    fit(tmp_path, "ddp", max_epochs=3)
    fit(storage, "run", strategy=ModelParallelStrategy())
    folder = RunFolder(storage, "run")
    newest = checkpoint_name(2 * STEPS)
    assert folder.checkpoints() == [newest]
    for file in ("__0_0.distcp", "__1_0.distcp", ".metadata", "meta.pt"):
        assert folder.has(f"{newest}/{CHECKPOINT}/{file}")
    trainer, model = fit(storage, "run", strategy=ModelParallelStrategy(), num_workers=4, max_epochs=3, resume=True)
    assert losses(storage, "run") == pytest.approx(losses(tmp_path, "ddp"), rel=1e-5)

    expected = model.loss(next(iter(loader(50, 50)))).item()
    three = Trainer(num_workers=3, storage_path=storage, strategy=ModelParallelStrategy())
    checkpoint = folder.location(checkpoint_name(3 * STEPS))
    assert three.test(Net(), loader(), ckpt_path=checkpoint)[0]["test_loss"] == pytest.approx(expected, rel=1e-5)
    predicted = three.predict(Net(), loader(), ckpt_path=checkpoint)  # of 7 batches, one rank has 3
    assert predicted is not None
    assert [len(batch) for batch in predicted] == [8] * 6 + [2]
    assert torch.allclose(torch.cat(predicted), model.net(next(iter(loader(50, 50)))[0]), atol=1e-6)

    trainer.save_checkpoint(tmp_path / "one.ckpt")
    one = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert same(one["state_dict"], model.state_dict())
    assert one["global_step"] == 3 * STEPS
    here = Trainer(storage_path=storage)
    assert here.test(Net(), loader(), ckpt_path=checkpoint)[0]["test_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_checkpoints_in_shards_and_in_one_file_are_resumed_from_each_other(gloo: None, tmp_path: Path) -> None:
    fit(tmp_path, "ddp", max_epochs=4)
    in_one_file = ModelParallelStrategy(save_distributed_checkpoint=False)
    for epochs, strategy in enumerate(("ddp", ModelParallelStrategy(), "ddp", in_one_file), 1):
        fit(tmp_path, "run", strategy=strategy, max_epochs=epochs, resume=epochs > 1)
    assert losses(tmp_path, "run") == pytest.approx(losses(tmp_path, "ddp"), rel=1e-5)


class Dies(pl.Callback):
    """Rank 1 is gone in the middle of writing its part of the checkpoint of step 8."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 8 and trainer.global_rank == 1:
            FileSystemWriter.write_data = lambda *_: os._exit(1)  # type: ignore[method-assign]


@pytest.mark.slow
def test_a_run_of_which_a_rank_dies_while_it_saves_goes_on_bit_identical(storage: str, gloo: None) -> None:
    options: dict[str, Any] = {"strategy": ModelParallelStrategy(), "checkpoint_every_n_steps": 4}
    _, undisturbed = fit(storage, "undisturbed", **options)
    with pytest.raises(TrainingError, match="worker 1 died"):
        fit(storage, "run", callbacks=[Dies()], **options)
    folder, passed_over = RunFolder(storage, "run"), list[str]()
    newest = folder.newest_sound_checkpoint(lambda *each: passed_over.append(each[1]))
    assert newest in map(checkpoint_name, (4, STEPS))  # an object store may not have been given the last yet
    assert {*passed_over} <= {"is not complete"}
    _, resumed = fit(storage, "run", resume=True, **options)
    assert all(map(torch.equal, resumed.state_dict().values(), undisturbed.state_dict().values()))
    assert losses(storage, "run") == losses(storage, "undisturbed")


def test_the_example_trains(gloo: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = "--width 32 --layers 1 --length 64 --batch-size 256 --max-steps 3"
    monkeypatch.setattr("sys.argv", ["transformer.py", *small.split(), "--storage-path", str(tmp_path)])
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "transformer.py"), run_name="__main__")
    (run,) = tmp_path.iterdir()
    folder = RunFolder(str(tmp_path), run.name)
    assert folder.has(f"{checkpoint_name(3)}/{CHECKPOINT}/__1_0.distcp")
    (row,) = read_metrics(folder)
    assert 4 < row["train_loss"] < 6  # of 256 bytes that are equally likely it is 5.5


# Folders and their parts, without training


def shards(folder: Path, rank: int, content: bytes = b"shard") -> Path:
    """A rank's part of a checkpoint."""
    (folder / CHECKPOINT).mkdir(parents=True)
    (folder / CHECKPOINT / f"__{rank}_0.distcp").write_bytes(content * (rank + 1))
    if rank == 0:
        (folder / CHECKPOINT / ".metadata").write_bytes(b"index")
    return folder


@pytest.mark.parametrize(
    ("damage", "why"),
    [(altered, "has changed since it was written: its checksum is another"), (None, "is not complete")],
)
def test_a_checkpoint_with_one_damaged_shard_is_passed_over(
    damage: Any, why: str, storage: str, tmp_path: Path
) -> None:
    folder = RunFolder(storage, "run")
    for step in (1, 2):
        folder.add_checkpoint(shards(tmp_path / f"part{step}", 1, b"shard" * 30), checkpoint_name(step))
    shard = f"{checkpoint_name(2)}/{CHECKPOINT}/__1_0.distcp"
    content = folder.read(shard)
    folder.fs.delete_file(folder.at(shard))
    if damage:
        folder.write(shard, damage(content))
    passed_over = list[Any]()
    assert folder.newest_sound_checkpoint(lambda *each: passed_over.append(each)) == checkpoint_name(1)
    assert passed_over == [(folder.location(checkpoint_name(2)), why)]


def test_a_checkpoint_is_whole_once_all_parts_of_it_are_there(bucket: str, tmp_path: Path) -> None:
    folder, name = RunFolder(f"{bucket}/{tmp_path.name}", "run"), checkpoint_name(1)
    for saved in ("before", "now"):  # what is left of an earlier run's does not count
        for rank in range(2):
            part = Part(saved, rank, 2)
            folder.add_checkpoint(shards(tmp_path / f"{saved}{rank}", rank), name, part=part)
            assert folder.join_parts(name, part) == (rank == 1)
            assert folder.checkpoints() == ([name] if saved == "now" or rank else [])
    lines = [line.split()[1] for line in folder.read(f"{name}/{CHECKSUM}").decode().splitlines()]
    assert lines == [f"{CHECKPOINT}/{file}" for file in (".metadata", "__0_0.distcp", "__1_0.distcp")]


def test_none_is_dropped_of_which_another_rank_uploads_its_part(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 is behind: what it has not begun, rank 1 may have."""
    folder = RunFolder(f"{bucket}/{tmp_path.name}", "run")
    first, last = checkpoint_name(1), checkpoint_name(3)
    with Uploads(folder, print) as uploads:
        asked = list[set[str]]()
        for step in (1, 2, 3):
            source = shards(tmp_path / str(step), 0)
            saved = Saved(checkpoint_name(step), source, ExitStack(), None, [], Part("s", 0, 2))
            uploads.add(saved, lambda waiting: (asked.append(waiting), set())[1])
        for step in (3, 2, 1):  # the newest of rank 1's are there before the oldest is whole
            part = Part("s", 1, 2)
            folder.add_checkpoint(shards(tmp_path / f"other{step}", 1), checkpoint_name(step), part=part)
        uploads.flush()
        assert asked[-1] <= {first, checkpoint_name(2)}
        assert uploads.newest == last
    assert folder.checkpoints() == [last]


# What shards may hold


class Planted:
    """Leaves a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


@pytest.mark.parametrize("where", ["value", "index", "rest"])
def test_no_code_runs_that_came_with_shards(where: str, tmp_path: Path) -> None:
    folder, planted = tmp_path / "shards", Planted(tmp_path / "ran")
    state = {"state_dict": {"weight": torch.ones(3)}, "optimizer_0": {"rate": planted if where == "value" else 0.1}}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    (tmp_path / "ran").unlink(missing_ok=True)
    torch.save({"epoch": planted if where == "rest" else 1}, folder / "meta.pt")
    if where == "index":
        (folder / ".metadata").write_bytes(pickle.dumps(planted))
    with pytest.raises(pickle.UnpicklingError), whole_file(str(folder)):
        pass
    assert not (tmp_path / "ran").exists()


def test_shards_of_tensors_and_plain_types_pass(tmp_path: Path) -> None:
    state = {"state_dict": {"weight": torch.ones(3, dtype=torch.bfloat16)}, "optimizer_0": {"betas": (0.9, 0.99)}}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    check_shards(str(tmp_path))


# What cannot be


class LeavesOneOut(Net):
    """Shards the first layer only."""

    def configure_model(self) -> None:
        fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])


def test_a_weight_that_nothing_shards_is_named(gloo: None, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"^Nothing shards net\.2\.weight, net\.2\.bias, which each worker would"):
        fit(tmp_path, "run", LeavesOneOut(), strategy=ModelParallelStrategy())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("sizes", [{"tensor_parallel_size": 2}, {"data_parallel_size": 3}])
def test_workers_that_share_something_else_than_the_data(sizes: dict[str, int]) -> None:
    with pytest.raises(RequestError, match=r"^ModelParallelStrategy\(data_.*: here all workers share the data"):
        Trainer(num_workers=2, strategy=ModelParallelStrategy(**sizes))
    Trainer(num_workers=2, strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1))


class Unguarded(Net):
    """Takes it that there are workers, as programs do that are made for several only."""

    def configure_model(self) -> None:
        if not isinstance(self.net, FSDPModule):
            self.shard()


def test_a_model_that_can_only_be_configured_on_workers_gets_its_weights_here(gloo: None, tmp_path: Path) -> None:
    _, model = fit(tmp_path, "run", Unguarded(), max_epochs=1, strategy=ModelParallelStrategy())
    first = Net().state_dict()
    assert not same(model.state_dict(), first)


@pytest.mark.parametrize("batches", range(8))
@pytest.mark.parametrize("stop", [None, 4])
def test_prediction_in_step_gives_all_ranks_equally_many_batches(batches: int, stop: int | None) -> None:
    found = [list(round_robin_in_step([[each] for each in range(batches)], (rank, stop, 3))) for rank in range(3)]
    assert len({len(rank) for rank in found}) == 1
    counted = [[shard.items for shard in rank if shard.samples] for rank in found]
    assert interleave(counted) == [[each] for each in range(batches)][:stop]


def test_the_shell_puts_a_checkpoint_together(
    gloo: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, model = fit(tmp_path, "run", max_epochs=1, strategy=ModelParallelStrategy())
    out = tmp_path / "out.ckpt"
    arguments = ["export", str(tmp_path / "run"), str(out), "--format", "checkpoint"]
    monkeypatch.setattr("sys.argv", arguments)
    export()
    assert same(torch.load(out, weights_only=True)["state_dict"], model.state_dict())
    assert f"checkpoint_{STEPS:09d}" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.ckpt", "run"]


def test_a_prediction_that_cannot_be_in_step(gloo: None, tmp_path: Path) -> None:
    class Batches:
        def __iter__(self) -> Iterator[Any]:
            return iter(loader())

    trainer = Trainer(num_workers=2, storage_path=str(tmp_path), strategy=ModelParallelStrategy())
    with pytest.raises(RequestError, match=r"^A Batches cannot be shared out batch by batch for a model in"):
        trainer.predict(Net(), Batches())
