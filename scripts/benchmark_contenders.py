"""What `scripts/benchmark train` trains against each other: the same model, samples and batch, each in its own process.

`python benchmark_contenders.py NAME '{"dataset": …, "batch_size": …}'` writes what `Clock` saw into the file of its
options.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from ray_mnist import MNISTDataModule, SimpleModel
from ray_mnist.data import sources
from ray_mnist.data.mnist import together

WORKERS = 2
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


class Clock(pl.Callback):
    """Notes when the first step was done, and the samples a second of each epoch's training."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.seen: dict[str, Any] = {"rates": []}

    def start(self) -> None:
        """An epoch begins."""
        self.started = time.perf_counter()

    def step(self, number: int, last: bool) -> None:
        """The step of that number in the epoch, counted from 0, is done."""
        self.seen.setdefault("first_step", time.time())
        if last:
            samples = (number + 1) * self.options["batch_size"]
            self.seen["rates"].append(samples / (time.perf_counter() - self.started))
            Path(self.options["file"]).write_text(json.dumps(self.seen))

    def on_train_epoch_start(self, *_: Any) -> None:
        """Lightning's."""
        self.start()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Lightning's."""
        if trainer.is_global_zero:
            self.step(batch_idx, trainer.is_last_batch)


def in_memory(options: dict[str, Any], batch_size: int) -> MNISTDataModule:
    """The data module, with the samples in memory."""
    return MNISTDataModule(options["dataset"], options["data_dir"], batch_size)


def ours(options: dict[str, Any], num_workers: int | None = None) -> None:
    """This package."""
    from ray_mnist import Trainer

    trainer = Trainer(
        max_epochs=options["epochs"],
        num_workers=options["workers"] if num_workers is None else num_workers,
        storage_path=options["folder"],
        callbacks=[Clock(options)],
    )
    trainer.fit(SimpleModel(), in_memory(options, options["batch_size"]))


def ours_alone(options: dict[str, Any]) -> None:
    """This package, in one process."""
    ours(options, num_workers=0)


def lightning_alone(options: dict[str, Any]) -> None:
    """Lightning's Trainer in one process, with the same loaders."""
    trainer = pl.Trainer(
        max_epochs=options["epochs"], default_root_dir=options["folder"], callbacks=[Clock(options)], **QUIET
    )
    trainer.fit(SimpleModel(), in_memory(options, options["batch_size"]))


def lightning_ddp(options: dict[str, Any]) -> None:
    """Lightning's Trainer with its own DDPStrategy and the same loaders; torchrun starts it in each worker."""
    strategy = pl.strategies.DDPStrategy(process_group_backend="gloo", gradient_as_bucket_view=True)
    trainer = pl.Trainer(
        max_epochs=options["epochs"],
        default_root_dir=options["folder"],
        strategy=strategy,
        devices=WORKERS,
        callbacks=[Clock(options)],
        **QUIET,
    )
    trainer.fit(SimpleModel(), in_memory(options, options["batch_size"] // WORKERS))


def bare_ddp(options: dict[str, Any]) -> None:
    """DistributedDataParallel and a loop, on the samples in memory; torchrun starts it in each worker."""
    torch.distributed.init_process_group("gloo")
    rank, batch_size = torch.distributed.get_rank(), options["batch_size"] // WORKERS
    datamodule, clock = in_memory(options, batch_size), Clock(options)
    datamodule.setup("fit")
    sampler: Any = DistributedSampler(datamodule.parts["train"])
    loader = DataLoader(datamodule.parts["train"], batch_size, sampler=sampler, collate_fn=together, drop_last=True)
    model = nn.parallel.DistributedDataParallel(SimpleModel().net)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for epoch in range(options["epochs"]):
        sampler.set_epoch(epoch)
        clock.start()
        for number, (images, labels) in enumerate(loader):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images.float().div(255)), labels).backward()
            optimizer.step()
            if rank == 0:
                clock.step(number, number + 1 == len(loader))
    torch.distributed.destroy_process_group()


class OneByOne(Dataset[Any]):
    """Samples as torchvision's MNIST has them: each an image that ToTensor makes a tensor of."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        from torchvision.transforms import ToTensor

        self.images, self.labels, self.transform = images, labels, ToTensor()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        return self.transform(Image.fromarray(self.images[index][0].numpy())), int(self.labels[index])


def ray_pattern(options: dict[str, Any]) -> None:
    """Ray Train with Lightning as Ray's documentation has it."""
    import ray.train
    from ray.train.torch import TorchTrainer

    def train() -> None:
        from ray.train import lightning as integration

        data = sources.load(options["dataset"], Path(options["data_dir"]))
        size, batch_size = 4 * len(data.train_labels) // 5, options["batch_size"] // WORKERS
        parts = [
            OneByOne(data.train_images[part], data.train_labels[part]) for part in (slice(size), slice(size, None))
        ]
        trainer = pl.Trainer(
            max_epochs=options["epochs"],
            devices="auto",
            strategy=integration.RayDDPStrategy(),
            plugins=[integration.RayLightningEnvironment()],
            callbacks=[integration.RayTrainReportCallback(), Clock(options)],
            enable_checkpointing=False,
            logger=False,
            **QUIET,
        )
        loaders = [DataLoader(part, batch_size, shuffle=part is parts[0]) for part in parts]
        integration.prepare_trainer(trainer).fit(SimpleModel(), *loaders)

    ray.init(address="local")  # else it waits 12 minutes for a cluster of this machine that has died
    TorchTrainer(
        train,
        scaling_config=ray.train.ScalingConfig(num_workers=WORKERS),
        run_config=ray.train.RunConfig(storage_path=options["folder"]),
    ).fit()


CONTENDERS = {each.__name__: each for each in (ours, bare_ddp, lightning_ddp, ray_pattern, ours_alone, lightning_alone)}

if __name__ == "__main__":
    CONTENDERS[sys.argv[1]](json.loads(sys.argv[2]))
