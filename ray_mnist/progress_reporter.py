"""Tells whoever follows the run how far it is inside an epoch, at a cost that the training does not notice."""

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from ray_mnist.arrival import Arrival
from ray_mnist.distributed.loaders import samples_seen, seconds_waited
from ray_mnist.distributed.weighting import LossWeighting
from ray_mnist.divergence import loss_of
from ray_mnist.run.events import Progress, Tell
from ray_mnist.run.folder import step_of
from ray_mnist.run.progress import STAGES
from ray_mnist.run.uploads import Uploads

EVERY_S = 0.5
RECENT = 20  # reports, over which the rates are means: ten seconds, or as many batches where each takes longer


class ProgressReporter(Callback):
    """Tells, on rank 0, of a batch that ends half a second or more after the last that it told of.

    Other batches cost a look at the clock. The loss is this rank's; that of a GPU is told with the first batch after
    which it has arrived, so that nothing waits for it. The rates are those since the end of a phase's first batch, told
    of or not: an epoch may be shorter than half a second. There is no collective in it.

    Args:
        tell: takes the news.
        weighting: knows which part of the training batch was rank 0's.
        uploads: knows the newest checkpoint, if the task makes any.
        clock: in seconds.
    """

    def __init__(
        self,
        tell: Tell,
        weighting: LossWeighting,
        uploads: Uploads | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tell, self.weighting, self.uploads, self.clock = tell, weighting, uploads, clock
        self.due = -math.inf
        self.loss: Arrival | None = None  # on its way
        self.phase: tuple[str, int, int] | None = None
        # Time, batches and samples of the phase, and seconds waited for them.
        self.recent: deque[tuple[float, int, int, float]] = deque(maxlen=RECENT)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tells of it if it is time."""
        if batch_idx == 0:
            self._count(trainer, batch_idx)
        if self.clock() >= self.due:
            loss = loss_of(outputs)
            if self.loss is None and loss is not None:
                self.loss = Arrival(loss)
            if self.loss is None or self.loss.is_here():
                value = None if self.loss is None else self.loss.values().item()
                self.loss = None
                self._report(trainer, batch_idx, trainer.num_training_batches, value)

    def _evaluated(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.sanity_checking:
            return
        if batch_idx == 0:
            self._count(trainer, batch_idx, dataloader_idx)
        if self.clock() >= self.due:
            validated_or_tested = trainer.num_val_batches if trainer.validating else trainer.num_test_batches
            batches = trainer.num_predict_batches if trainer.predicting else validated_or_tested
            self._report(trainer, batch_idx, batches[dataloader_idx], loader=dataloader_idx)

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _evaluated

    def _count(self, trainer: Trainer, batch_idx: int, loader: int = 0) -> None:
        """Has the rates be over this batch, too, and over none of another phase."""
        word, loaders = STAGES[trainer.state.stage or ""]
        phase, batch = (word, trainer.current_epoch, loader), batch_idx + 1
        if phase != self.phase or batch <= self.recent[-1][1]:  # which is validated several times in an epoch
            self.phase = phase
            self.recent.clear()
        samples, waited = samples_seen(getattr(trainer, loaders)), seconds_waited(getattr(trainer, loaders))
        self.recent.append((self.clock(), batch, samples, waited))

    def _report(
        self, trainer: Trainer, batch_idx: int, batches: int | float, loss: float | None = None, loader: int = 0
    ) -> None:
        self._count(trainer, batch_idx, loader)
        then, first, samples_then, waited_then = self.recent[0]
        now, batch, samples, waited = self.recent[-1]
        self.due = now + EVERY_S
        # Of a batch, this rank's shard is this part.
        part = (self.weighting.weight if trainer.training else 1.0) / trainer.world_size
        seconds, known = now - then, batches != math.inf
        step_seconds = seconds / (batch - first) if seconds else None
        newest = self.uploads.newest if self.uploads else None
        self.tell(
            Progress(
                phase=STAGES[trainer.state.stage or ""][0],
                epoch=trainer.current_epoch + 1,
                batch=batch,
                batches=int(batches) if known else None,
                samples_per_second=(samples - samples_then) / part / seconds if seconds and part else None,
                seconds_left=(batches - batch) * step_seconds if step_seconds and known else None,
                loss=loss,
                workers=trainer.world_size,
                checkpoint=step_of(newest) if newest else None,
                step=trainer.global_step,
                step_seconds=step_seconds,
                data_wait_seconds=(waited - waited_then) / (batch - first) if seconds else None,
            )
        )
