"""`num_workers=4, use_gpu=True` on two Ray nodes of two GPUs each, which are only numbers: Ray believes what it hears.

All of it is real but for CUDA itself, see `cuda_stand_in`: what it computes is computed on the CPU. That Ray, Lightning
and torch agree on which worker has which GPU is what this is about; no other test has a run with GPUs.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cuda_stand_in
import pytest
import pytorch_lightning as pl
import ray
import torch
from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray.cluster_utils import Cluster
from ray.experimental.internal_kv import _internal_kv_get

from ray_mnist import MNISTDataModule, RequestError, SimpleModel, Trainer
from ray_mnist.launch import ray as launch
from ray_mnist.launch.keeping import KEEPER

CPUS = 5  # of a node: two for each GPU, and one that is left to others


@pytest.fixture
def two_nodes() -> Iterator[None]:
    """This process is connected to a cluster of two nodes, each with two GPUs."""
    backend = launch.process_group_backend
    with tempfile.TemporaryDirectory(prefix="ray-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        patch.setattr(launch, "process_group_backend", lambda use_gpu: cuda_stand_in.Backend(backend(use_gpu)))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": CPUS, "num_gpus": 2})
        try:
            cluster.add_node(num_cpus=CPUS, num_gpus=2)
            ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
            yield
            KEEPER.give_back()
        finally:
            ray.shutdown()
            cluster.shutdown()


class Notes(pl.Callback):
    """Each rank writes down what it has."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        context = ray.get_runtime_context()
        notes = {
            "node": context.get_node_id(),
            "resources": context.get_assigned_resources(),
            "gpu": [str(number) for number in ray.get_gpu_ids()],
            "visible": os.environ["CUDA_VISIBLE_DEVICES"],
            "threads": torch.get_num_threads(),
            "accelerator": type(trainer.accelerator).__name__,
            "device": str(trainer.strategy.root_device),
            "autoscaler": json.loads(_internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL) or "null"),
            **cuda_stand_in.ASKED,
        }
        (self.folder / f"rank-{trainer.global_rank}.json").write_text(json.dumps(notes))


@pytest.mark.slow
def test_four_workers_on_two_nodes_have_a_gpu_each(
    two_nodes: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"max_epochs": 1, "storage_path": str(tmp_path), "max_failures": 0}
    on_gpus: dict[str, Any] = options | {"use_gpu": True}
    with pytest.raises(RequestError, match="has room for 4 of the 5 workers: use --num-workers 4"):
        Trainer(num_workers=5, **on_gpus).fit(SimpleModel(), MNISTDataModule("digits"))

    pl.seed_everything(3)
    trainer = Trainer(num_workers=4, callbacks=[Notes(tmp_path)], **on_gpus)
    trainer.fit(SimpleModel(), MNISTDataModule("digits"))
    where = rf"4 workers on GPU, Ray \S+ \(2 nodes, {2 * CPUS} CPUs, 4 GPUs\)"
    assert re.search(where, capsys.readouterr().out)
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(4)]
    for local_rank, rank in zip([0, 1, 0, 1], ranks, strict=True):
        device = f"cuda:{local_rank}"
        # Each sees its neighbour's too, with which NCCL exchanges gradients.
        assert (rank["gpu"], rank["visible"]) == ([str(local_rank)], "0,1")
        assert (rank["accelerator"], rank["device"], rank["set_device"]) == ("CUDAAccelerator", device, device)
        assert (rank["ddp"], rank["backend"]) == ([local_rank], "cpu:gloo,cuda:nccl")
        assert (rank["resources"], rank["threads"]) == ({"CPU": 2, "GPU": 1}, 2)
    assert ranks[0]["node"] == ranks[1]["node"] != ranks[2]["node"] == ranks[3]["node"]
    assert [[bundle[name] for name in ("CPU", "GPU")] for bundle in ranks[0]["autoscaler"]] == [[2, 1]] * 4

    pl.seed_everything(3)
    alone = Trainer(name="alone", **options)
    alone.fit(SimpleModel(), MNISTDataModule("digits"))
    mine, theirs = trainer.result.values, alone.result.values
    assert (mine["device"], mine["num_workers"]) == (cuda_stand_in.NAME, 4)
    assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
    assert (mine["val_samples"], mine["test_accuracy"]) == (theirs["val_samples"], theirs["test_accuracy"])
