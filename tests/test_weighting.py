"""Losses that are means over something else than samples: any number of workers trains as one process does."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from test_programs import Seen, same, seen
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ray_mnist import Trainer
from ray_mnist.distributed.weighting import LossWeighting
from ray_mnist.errors import RequestError, TrainingError

WORDS, LENGTH, IGNORED = 30, 12, -100
SAMPLES, BATCH = 26, 4  # three workers have shards of one sample, and in the last batch of 2 one of them has none


def sentences() -> TensorDataset:
    """Made-up sentences of very different numbers of words to guess: none in every fourth, many in others."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(WORDS, (SAMPLES, 1), generator=generator)
    words = (starts + torch.arange(LENGTH) * (1 + starts % 3)) % (WORDS - 1)
    guessed = torch.rand(SAMPLES, LENGTH, generator=generator) < torch.arange(SAMPLES)[:, None] % 4 * 0.3
    return TensorDataset(words.masked_fill(guessed, WORDS - 1), words.masked_fill(~guessed, IGNORED))


class LitMaskedLanguageModel(pl.LightningModule):
    """Guesses masked words; where there are none its loss is 0 / 0, and so are its gradients."""

    least = 0  # words to guess that the loss is a mean over

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 16)
        self.mix = nn.Conv1d(16, 16, kernel_size=3, padding=1)
        self.guess = nn.Linear(16, WORDS)

    def loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        words, labels = batch
        logits = self.guess(self.mix(self.words(words).mT).mT.tanh())
        masked = labels != IGNORED
        losses = F.cross_entropy(logits.mT, labels.clamp(min=0), reduction="none")
        return (losses * masked).sum() / masked.sum().clamp(min=self.least), masked.sum()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss, masked = self.loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True, batch_size=masked)
        self.log("synced", loss, batch_size=masked, sync_dist=True)
        return self.answer(loss, masked)

    def answer(self, loss: Tensor, masked: Tensor) -> Any:
        return {"loss": loss, "loss_weight": masked}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert outputs["loss"].isfinite()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss, masked = self.loss(batch)
        self.log("val_loss", loss, batch_size=masked)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def fit(folder: Path, num_workers: int, kind: Any = LitMaskedLanguageModel, **options: Any) -> Seen:
    """What is seen of two epochs."""
    pl.seed_everything(3, verbose=False)
    model = kind()
    where: Any = {"num_workers": num_workers, "storage_path": str(folder), "name": str(num_workers)}
    trainer = Trainer(max_epochs=2, log_every_n_steps=1, seed=1, **where, **options)
    trainer.fit(model, DataLoader(sentences(), BATCH, shuffle=True), DataLoader(sentences(), 6))
    return seen(trainer, model)


# bfloat16 keeps 8 bits.
@pytest.mark.parametrize(
    ("options", "rel"),
    [({}, 1e-5), ({"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}, 1e-5), ({"precision": "bf16-mixed"}, 2e-2)],
    ids=["plain", "accumulated and clipped", "in bfloat16"],
)
def test_any_number_of_workers_trains_a_masked_language_model_as_one_process_does(
    options: dict[str, Any], rel: float, gloo: None, tmp_path: Path
) -> None:
    here = fit(tmp_path, 0, **options)
    assert here["callback_metrics"]["train_loss"] < here["history"][0]["train_loss"] < 4
    for num_workers in (1, 2, 3):
        same(here, fit(tmp_path, num_workers, **options), rel, f"{num_workers} workers")


class LitUnweighted(LitMaskedLanguageModel):
    """Says nothing of what its loss is a mean over."""

    least = 1

    def answer(self, loss: Tensor, masked: Tensor) -> Any:
        return loss


def test_without_its_weight_such_a_loss_depends_on_the_number_of_workers(gloo: None, tmp_path: Path) -> None:
    here, there = (fit(tmp_path, num_workers, LitUnweighted)["weights"] for num_workers in (0, 3))
    assert max((here[name] - there[name]).abs().max() for name in here) > 0.01


@pytest.mark.parametrize(
    ("criterion", "over"),
    [
        (nn.CrossEntropyLoss(), None),
        (nn.CrossEntropyLoss(torch.ones(3)), "class weights"),
        (nn.NLLLoss(ignore_index=0), "some labels"),
        (nn.NLLLoss(ignore_index=0, reduction="none"), None),
    ],
)
def test_a_criterion_that_needs_a_weight_is_named_once(criterion: nn.Module, over: str | None) -> None:
    model = LitUnweighted()
    model.criterion = criterion
    trainer: Any = SimpleNamespace(world_size=2, lightning_module=model, strategy=TwoRanks())
    weighting = LossWeighting()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            weighting.weigh(trainer, torch.tensor(1.0))
    found = [str(each.message) for each in caught]
    assert len(found) == (over is not None)
    assert all(text.startswith(f"criterion is a mean over {over}, of which") for text in found)


class TwoRanks:
    """As much of a strategy as sums: both ranks have the same."""

    root_device = torch.device("cpu")

    def reduce(self, value: Tensor, reduce_op: str) -> Tensor:
        return 2 * value


class LitByHand(LitMaskedLanguageModel):
    """Has made its gradients when it returns the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def answering(weigh: Any) -> Any:
    """A model that says what `weigh` makes of itself and its words to guess."""
    answers = {"answer": lambda model, loss, masked: {"loss": loss, "loss_weight": weigh(model, masked)}}
    return type("Lit", (LitMaskedLanguageModel,), answers)


A_NUMBER = r": return a number, or a tensor of one, that is 0 or more\.$"
UNUSABLE = {
    "negative": (0, answering(lambda model, masked: -1), 1, f"it is -1{A_NUMBER}"),
    "not a number": (0, answering(lambda model, masked: masked / 0 - masked / 0), 1, rf"it is tensor\(nan\){A_NUMBER}"),
    "endless": (0, answering(lambda model, masked: float("inf")), 1, f"it is inf{A_NUMBER}"),
    "several": (0, answering(lambda model, masked: masked.repeat(2)), 1, rf"it is tensor\(\[\d+, \d+\]\){A_NUMBER}"),
    "no number": (0, answering(lambda model, masked: "all"), 1, f"it is 'all'{A_NUMBER}"),
    "too late": (0, LitByHand, 1, "with automatic_optimization=False the gradients are made before"),
    "now and then": (0, answering(lambda model, masked: masked if model.global_step < 2 else None), 3,
                     "training_step returns it in some steps only: return it in each step"),
    "nothing anywhere": (2, answering(lambda model, masked: 0), 1,
                         "it is 0 on all workers: leave out batches in which nothing counts"),
    "negative on one": (2, answering(lambda model, masked: -masked if model.global_rank else masked),
                        1, "it is tensor"),
    "on one only": (2, answering(lambda model, masked: masked if model.global_rank else None), 1,
                    "training_step returned it on some workers only: return it on all of them"),
}  # fmt: skip


@pytest.mark.parametrize(("num_workers", "kind", "step", "why"), UNUSABLE.values(), ids=UNUSABLE)
def test_a_weight_that_is_none_ends_the_run_in_a_sentence(
    num_workers: int, kind: Any, step: int, why: str, gloo: None, tmp_path: Path
) -> None:
    error = RequestError if step == 1 else TrainingError
    with pytest.raises(error, match=f"^loss_weight cannot be used in step {step}: {why}"):
        fit(tmp_path, num_workers, kind)
