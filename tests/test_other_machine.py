"""A worker on a machine that has neither the script nor the files beside it."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray
from conftest import wait_until

RAY_START = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]

SCRIPT = """
import pytorch_lightning as pl
from nets import Net, Table
from ray_mnist import Trainer

pl.seed_everything(0)
net = Net()
trainer = Trainer(max_epochs=1, num_workers=2, storage_path={storage!r}, name="run")
trainer.fit(net, Table())
"""

NETS = """
import pathlib, socket

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset


class Table(pl.LightningDataModule):
    def prepare_data(self):
        with open({log!r}, "a") as log:
            log.write(f"prepared on {{socket.gethostname()}}\\n")

    def setup(self, stage):
        with open({log!r}, "a") as log:
            log.write(f"set up on {{socket.gethostname()}} by rank {{self.trainer.global_rank}}\\n")
        rows = [[float(cell) for cell in line.split(",")] for line in pathlib.Path("data.csv").read_text().split()]
        table = torch.tensor(rows)
        self.rows = TensorDataset(table[:, :1], table[:, 1:])

    def train_dataloader(self):
        return DataLoader(self.rows, batch_size=10, shuffle=True)


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = torch.nn.functional.mse_loss(self.layer(x), y)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A script, a module and a data file that git ignores, in one folder."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "script.py").write_text(SCRIPT.format(storage=str(tmp_path / "runs")))
    (folder / "nets.py").write_text(NETS.format(log=str(tmp_path / "log")))
    (folder / "data.csv").write_text("\n".join(f"{n / 10},{n / 5}" for n in range(40)))
    (folder / ".gitignore").write_text("data.csv\n")
    return folder


@pytest.fixture
def address(project: Path) -> Iterator[str]:
    """A head that trains nothing, and a machine of another name on which the project's folder is empty."""
    other = ["unshare", "--uts", "--mount", "--kill-child", "sh", "-c"]
    if os.geteuid() != 0 or not shutil.which("unshare") or subprocess.run([*other, "true"]).returncode:
        pytest.skip("only root can make another machine of this one")
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    head = f"--head --port {port} --num-cpus 0 --include-dashboard false --temp-dir {folder}"
    machines = [subprocess.Popen([*RAY_START, *head.split()], **quiet)]
    try:
        found = folder / "ray_current_cluster"
        wait_until(found.exists, 600, "the Ray head to start")
        join = " ".join([*RAY_START, "--num-cpus", "2", "--address", found.read_text().strip()])
        hide = f"hostname other && mount -t tmpfs none {project} && cd / && exec {join}"
        machines.append(subprocess.Popen([*other, hide], **quiet))
        ray.init(address=found.read_text().strip(), logging_level="ERROR")
        wait_until(lambda: len(ray.nodes()) == 2, 600, "the other machine to join")
        ray.shutdown()
        yield found.read_text().strip()
    finally:
        ray.shutdown()
        processes = [process for machine in machines for process in psutil.Process(machine.pid).children(True)]
        for process in [*processes, *machines]:
            with suppress(psutil.NoSuchProcess):  # it went with its parent
                process.kill()
        psutil.wait_procs(processes, timeout=30)
        for machine in machines:
            machine.wait(30)
        shutil.rmtree(folder)


@pytest.mark.slow
def test_it_gets_a_copy_of_the_folder_with_what_git_ignores(project: Path, address: str) -> None:
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=project,
        env=os.environ | {"RAY_ADDRESS": address},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert (project.parent / "runs" / "run" / "result.json").is_file()
    log = (project.parent / "log").read_text().splitlines()
    assert log.count("prepared on other") == 1  # by one of the two workers that are there
    assert {"set up on other by rank 0", "set up on other by rank 1"} < set(log)
