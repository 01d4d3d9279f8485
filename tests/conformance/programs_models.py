"""Programs for models that are compiled, frozen in part or collect metrics, and for samplers with weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler, WeightedRandomSampler
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score

from conformance.harness import Make, Net, Seen, data, loader, program, seen, val_loader, weights


class Compiled(Net):
    """Logs whether it is compiled."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("compiled", float(torch.compiler.is_compiling()))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.log("val_compiled", float(torch.compiler.is_compiling()))
        super().validation_step(batch, batch_idx)


@program("`torch.compile(model)`")
def compiled(make: Make, folder: Path) -> Seen:
    model = Compiled()
    trainer = make(max_epochs=2)
    trainer.fit(torch.compile(model, backend="eager"), loader(), val_loader())
    assert trainer.callback_metrics["compiled"] == trainer.callback_metrics["val_compiled"] == 1
    return seen(trainer, model, same_module=trainer.lightning_module is model)


class Part(nn.Module):
    """A layer; compiled, it computes something else, by which it can be seen."""

    def __init__(self, out: int) -> None:
        super().__init__()
        self.layer = nn.Linear(4, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * (2 if torch.compiler.is_compiling() else 1)


class CompilesParts(Net):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.body = torch.compile(Part(4), backend="eager")
            self.head = Part(3)

    def configure_model(self) -> None:
        self.head.compile(backend="eager")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@program("parts that are compiled in `__init__`, and in place in `configure_model`")
def compiled_parts(make: Make, folder: Path) -> Seen:
    model = CompilesParts()
    model.layer.requires_grad_(False)  # which is not used
    trainer = make(max_epochs=2)
    trainer.fit(model, loader(), val_loader())
    return seen(trainer, model)


class LoRALinear(nn.Module):
    """A frozen layer, and an addition of low rank that is trained."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features) * 0.1)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


class LoRA(Net):
    """Trains and saves the additions only."""

    strict_loading = False

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.layer = nn.Sequential(LoRALinear(nn.Linear(4, 8)), nn.Tanh(), LoRALinear(nn.Linear(8, 3)))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {name for name, weight in self.named_parameters() if weight.requires_grad}
        checkpoint["state_dict"] = {name: checkpoint["state_dict"][name] for name in trained}

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW((weight for weight in self.parameters() if weight.requires_grad), lr=0.01)


@program("LoRA: frozen layers with trained additions, which alone are in the checkpoints")
def lora(make: Make, folder: Path) -> Seen:
    model = LoRA()
    before = weights(model)
    trainer = make(max_epochs=2)
    trainer.fit(model, loader(), val_loader())
    changed = [name for name, weight in weights(model).items() if not torch.equal(weight, before[name])]
    path = folder / "additions.ckpt"
    trainer.save_checkpoint(path)
    loaded = LoRA()
    validated = make().validate(loaded, val_loader(), ckpt_path=path, verbose=False)
    saved = sorted(torch.load(path, weights_only=True)["state_dict"])
    return seen(trainer, model, changed=changed, saved=saved, loaded=weights(loaded), validated=validated)


class Collects(Net):
    def __init__(self) -> None:
        super().__init__()
        metrics = {"acc": MulticlassAccuracy(3), "f1": MulticlassF1Score(3)}
        self.train_metrics = MetricCollection(metrics, prefix="train_")
        self.val_metrics = MetricCollection(metrics | {"micro": MulticlassAccuracy(3, average="micro")}, prefix="val_")
        self.matrix = MetricCollection([MulticlassConfusionMatrix(3)])
        self.matrices: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch[0])
        self.log_dict(self.train_metrics(logits, batch[1]), on_step=True, on_epoch=False)
        self.matrix.update(logits, batch[1])
        return F.cross_entropy(logits, batch[1])

    def on_train_epoch_end(self) -> None:
        self.log_dict(self.train_metrics.compute())
        self.matrices.append(self.matrix.compute()["MulticlassConfusionMatrix"])
        self.train_metrics.reset()
        self.matrix.reset()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.val_metrics.update(self(batch[0]), batch[1])
        self.log_dict(self.val_metrics, on_step=False, on_epoch=True)


@program("torchmetrics' MetricCollection: by the step, by the epoch, and logged as objects by `log_dict`")
def metric_collections(make: Make, folder: Path) -> Seen:
    model = Collects()
    trainer = make(max_epochs=2)
    trainer.fit(model, loader(), val_loader())
    return seen(trainer, model, matrices=model.matrices, samples=[int(m.sum()) for m in model.matrices], of=len(data()))


class ByWeight(Sampler[int]):
    """A sampler of the program's own, with weights and a seed."""

    def __init__(self, chances: Any, size: int) -> None:
        self.chances, self.size, self.epoch = chances / chances.sum(), size, 0

    def __len__(self) -> int:
        return self.size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        drawn = np.random.default_rng((5, self.epoch)).choice(len(self.chances), self.size, p=self.chances)
        return iter(drawn.tolist())


class Drawn(Net):
    """Keeps how much of what it has seen."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log_dict({f"sum {n}": batch[0][:, n].sum() for n in range(4)}, on_step=False, on_epoch=True, reduce_fx=sum)
        return super().training_step(batch, batch_idx)


@program("samplers with weights: torch's with a generator, with replacement and without, and one of the program's own")
def weighted_samplers(make: Make, folder: Path) -> Seen:
    chances = data().tensors[1].numpy() + 0.5

    def trained(sampler: Sampler[int], epochs: int) -> Seen:
        model = Drawn()
        trainer = make(max_epochs=epochs)
        trainer.fit(model, DataLoader(data(), 8, sampler=sampler), val_loader())
        return seen(trainer, model)

    def torchs(size: int, replacement: bool) -> Sampler[int]:
        generator = torch.Generator().manual_seed(11)
        return WeightedRandomSampler(chances.tolist(), size, replacement, generator=generator)

    # A second epoch's draw depends on seed and epoch alone, as that of a loader that shuffles.
    found = {"with replacement": trained(torchs(45, True), 1), "without": trained(torchs(45, False), 1)}
    return found | {"own": trained(ByWeight(chances, 45), 3)}
