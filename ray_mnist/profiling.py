"""Where the time of a training step goes: torch's profiler looks at some steps of each rank."""

import tempfile
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from torch.profiler import profile, schedule

from ray_mnist.run.folder import RunFolder

SKIPPED, WARM_UP, STEPS = 10, 2, 10  # the first ones allocate and compile


class Profile(Callback):
    """Writes `profile/rank-N.json.gz`, a trace of `STEPS` steps for https://ui.perfetto.dev, and `.txt`, its operators.

    A run with fewer steps than come before those has no trace.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.profiler: profile | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins to count steps."""

        def write(profiler: profile) -> None:
            name = f"profile/rank-{trainer.global_rank}"
            with tempfile.TemporaryDirectory(prefix="ray_mnist-") as aside:
                profiler.export_chrome_trace(f"{aside}/trace.json.gz")
                self.folder.write(f"{name}.json.gz", Path(aside, "trace.json.gz").read_bytes())
            longest_first = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=50)
            self.folder.write(f"{name}.txt", longest_first)

        steps = schedule(skip_first=SKIPPED, wait=0, warmup=WARM_UP, active=STEPS, repeat=1)
        self.profiler = profile(schedule=steps, on_trace_ready=write)
        self.profiler.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Tells the profiler that a step is over."""
        if self.profiler is not None:
            self.profiler.step()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends it, and has it write what there is of the steps that were looked at."""
        if self.profiler is not None:
            self.profiler.stop()
            self.profiler = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Likewise: a profiler that goes on would be in the way of the next one in this process."""
        self.on_train_end(trainer, pl_module)
