"""Programs of the package `lightning`, as they are written for it: one changed line, and their own classes."""

import gc
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torchmetrics
import yaml
from test_programs import same

from ray_mnist import RequestError, Trainer, lightning_package
from ray_mnist.cli import lightning_arguments
from ray_mnist.config import RunConfig
from ray_mnist.launch import ray as launch
from ray_mnist.run.folder import RunFolder
from ray_mnist.worker import Job

FOLDER = Path(__file__).parent / "lightning_programs"
PROGRAMS = [file.stem for file in sorted(FOLDER.glob("*.py"))]
# Runs the programs given in the folders given, in one process, and says which modules of either package it has.
RUN_ALL = """
import os, runpy, sys
for file, folder in zip(sys.argv[1::2], sys.argv[2::2]):
    os.chdir(folder)
    runpy.run_path(file, run_name="__main__")
print({sys.modules[name].__name__.split(".")[0] for name in sys.modules if "lightning" in name.split(".")[0]})
"""


def with_ours(name: str, folder: Path, num_workers: int) -> Path:
    """The program with the one line changed, in its folder."""
    theirs = (FOLDER / f"{name}.py").read_text()
    ours = f"from ray_mnist import Trainer; trainer = Trainer(num_workers={num_workers}, name='run', "
    if name == "gan":  # whose parameters are not all used in each backward pass
        ours += "strategy='ddp_find_unused_parameters_true', "
    changed, times = re.subn(r"trainer = \w+\.Trainer\(", ours, theirs)
    assert times == 1
    folder.mkdir(parents=True)
    (folder / "program.py").write_text(changed)
    return folder / "program.py"


def python(program: str, *arguments: Any, folder: Path) -> str:
    """What a program prints; its last line."""
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    ).stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the programs leave, with Lightning's own Trainer in `theirs`, with ours in `ours`.

    All in one process, which imports `lightning` first of all.
    """
    folder = tmp_path_factory.mktemp("alone")
    arguments: list[Path] = []
    for name in PROGRAMS:
        (folder / "theirs" / name).mkdir(parents=True)
        arguments += [FOLDER / f"{name}.py", folder / "theirs" / name]
    for name in PROGRAMS:
        arguments += [with_ours(name, folder / "ours" / name, 0), folder / "ours" / name]
    assert "'pytorch_lightning'" not in python(RUN_ALL, *arguments, folder=folder)
    return folder


def weights(folder: Path) -> Any:
    return torch.load(folder / "weights.pt")


@pytest.mark.parametrize("name", PROGRAMS)
def test_one_process_gives_what_lightning_gives(name: str, alone: Path) -> None:
    same(weights(alone / "theirs" / name), weights(alone / "ours" / name), 1e-6, name)
    assert RunFolder(str(alone / "ours" / name / "runs"), "run").read("result.json").count(b'"lightning":') == 1


@pytest.mark.parametrize("name", PROGRAMS)
def test_two_workers_give_what_lightning_gives(
    name: str, alone: Path, gloo: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process that has imported `pytorch_lightning` before."""
    program = with_ours(name, tmp_path / "two", 2)
    monkeypatch.chdir(tmp_path / "two")
    exec(program.read_text(), {"__name__": "__main__"})
    same(weights(alone / "theirs" / name), weights(tmp_path / "two"), 1e-5, name)


WHOSE = """
import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_fit_start(self):
        kinds = [self.trainer, self.trainer.strategy, *self.trainer.callbacks]
        self.whose = {base.__module__.split(".")[0] for kind in kinds for base in type(kind).__mro__}

from ray_mnist import Trainer

model = Net()
trainer = Trainer(max_epochs=1, num_workers=2)
trainer.fit(model, DataLoader(TensorDataset(torch.ones(8, 1)), batch_size=4))
print(sorted(model.whose - {"builtins", "abc", "typing"}))
"""


@pytest.mark.slow
def test_the_workers_of_ray_have_the_programs_package(tmp_path: Path) -> None:
    assert python(WHOSE, folder=tmp_path) == "['lightning', 'ray', 'ray_mnist']"


BOTH = """
import sys
sys.modules.pop("ray_mnist", None)
import lightning as L, pytorch_lightning as pl
from ray_mnist import RequestError, Trainer

class Net(L.LightningModule):
    pass

refused = []
for attempt in (
    lambda: Trainer().fit(Net(), []),
    lambda: Trainer(callbacks=[pl.callbacks.TQDMProgressBar(), L.pytorch.callbacks.TQDMProgressBar()]),
):
    try:
        attempt()
    except RequestError as error:
        refused.append(str(error))
print(refused)
"""


def test_a_mix_of_both_that_cannot_be_made_one_is_refused_with_the_way_out(tmp_path: Path) -> None:
    sentence = (
        "{} is of the package lightning, which was imported beside pytorch_lightning before ray_mnist could make one "
        "of the two: put `import ray_mnist` before both."
    )
    refused = [sentence.format(what) for what in ("model: Net", "callbacks: TQDMProgressBar")]
    assert python(BOTH, folder=tmp_path) == str(refused)
    assert not (tmp_path / "runs").exists()


OURS = """
import sys
from ray_mnist import MNISTDataModule, SimpleModel, Trainer
from ray_mnist.launch import ray
ray.make_strategy("ddp")
Trainer(max_epochs=1, name="run").fit(SimpleModel(), MNISTDataModule("digits"))
print([name for name in sys.modules if name.partition(".")[0] == "lightning"])
"""


def test_what_does_not_use_lightning_does_not_import_it(tmp_path: Path) -> None:
    assert python(OURS, folder=tmp_path) == "[]"


def test_one_of_the_two_is_there_by_both_names() -> None:
    spec = pl.callbacks.early_stopping.__spec__
    for ours, theirs in (
        ("pytorch_lightning", "lightning.pytorch"),
        ("pytorch_lightning.cli", "lightning.pytorch.cli"),
        ("pytorch_lightning.callbacks.early_stopping", "lightning.pytorch.callbacks.early_stopping"),
        ("lightning_fabric.utilities.seed", "lightning.fabric.utilities.seed"),
    ):
        assert import_module(theirs) is import_module(ours)
    assert import_module("lightning").LightningModule is pl.LightningModule
    assert spec is pl.callbacks.early_stopping.__spec__
    assert spec.name == "pytorch_lightning.callbacks.early_stopping"
    with pytest.raises(ModuleNotFoundError, match=r"'pytorch_lightning\.nothing'"):
        import_module("lightning.pytorch.nothing")
    assert lightning_package.package_in_use() == "pytorch_lightning"


NETS = """
import lightning as L
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

class Net(L.LightningModule):
    def __init__(self, lr: float = 0.1, width: int = 10):
        super().__init__()
        self.save_hyperparameters()
        self.layers = torch.nn.Sequential(torch.nn.Linear(64, width), torch.nn.ReLU(), torch.nn.Linear(width, 10))

    def loss(self, batch):
        images, labels = batch
        return torch.nn.functional.cross_entropy(self.layers(images), labels)

    def training_step(self, batch, batch_idx):
        assert isinstance(self.trainer, L.Trainer)
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)

class Digits(L.LightningDataModule):
    def __init__(self, batch_size: int = 64):
        super().__init__()
        self.save_hyperparameters()

    def loader(self, start, stop):
        images, labels = load_digits(return_X_y=True)
        part = TensorDataset(torch.tensor(images[start:stop]).float() / 16, torch.tensor(labels[start:stop]))
        return DataLoader(part, batch_size=self.hparams.batch_size)

    def train_dataloader(self):
        return self.loader(0, 400)

    def val_dataloader(self):
        return self.loader(400, 500)
"""
FROM_THE_SHELL = ["--model", "nets.Net", "--data", "nets.Digits", "--max-epochs", "1", "--name", "run"]


def test_its_classes_are_taken_from_the_shell(command: Any, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    done = command(*FROM_THE_SHELL, "--model.width", "5")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Digits · Net (385 parameters) · this process, on CPU" in done.stdout
    config = yaml.safe_load((tmp_path / "runs/run/config.yaml").read_text())
    assert [config[part]["class_path"] for part in ("model", "data")] == ["nets.Net", "nets.Digits"]


@pytest.mark.slow
def test_its_classes_are_searched(command: Any, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    options = ["--num-samples", "2", "--space", "model.width=4,6", "--trainer.limit_val_batches", "2"]
    options += ["--space", "trainer.gradient_clip_val=0.5,0.6", "--optimizer", "SGD", "--space", "optimizer.lr=0.1:0.2"]
    done = command(*FROM_THE_SHELL, *options, module="tune")
    assert (done.returncode, done.stderr) == (0, "")
    rows = (tmp_path / "runs/run/trials.csv").read_text().splitlines()[1:]
    assert [row.split(",")[-2] for row in rows] == ["done", "done"]
    best = yaml.safe_load((tmp_path / "runs/run/best_config.yaml").read_text())
    assert best["trainer"]["limit_val_batches"] == 2
    assert best["trainer"]["gradient_clip_val"] in (0.5, 0.6)
    assert 0.1 <= best["optimizer"]["init_args"]["lr"] <= 0.2


def test_a_worker_is_told_which_of_the_two_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "package_of_theirs.py").write_text("")
    (tmp_path / "code_of_ours.py").write_text(
        "import sys\nfirst = 'package_of_theirs' in sys.modules\ndef begin(config): return first, config"
    )
    assert lightning_package.call_with("package_of_theirs", "code_of_ours:begin", "config") == (True, "config")
    job = Job("fit", pl.LightningModule(), {}, str(tmp_path), "run", seed=0)
    told: Any = launch.make_trainer(job, RunConfig(num_workers=1), {"send": print}, 0, lambda begin, **_: begin)
    assert told.func is lightning_package.call_with
    assert told.args == ("pytorch_lightning", "ray_mnist.launch.ray:train_function")


def test_garbage_is_looked_for_after_the_imports_and_not_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "heavy.py").write_text("import gc\nlooked_for = gc.isenabled()")
    (tmp_path / "broken.py").write_text("1 / 0")
    lightning_package.import_heavy("heavy")
    assert not sys.modules.pop("heavy").looked_for
    with pytest.raises(ZeroDivisionError):
        lightning_package.import_heavy("broken")
    assert gc.isenabled()


def test_torchmetrics_is_imported_without_what_it_does_not_use() -> None:
    code = """
import sys
from ray_mnist.lightning_package import import_heavy
import_heavy("pytorch_lightning")
assert "torchmetrics" in sys.modules
assert not {"scipy.signal", "scipy.stats"} & sys.modules.keys()
import scipy.signal
assert len(scipy.signal.windows.hamming(3)) == 3
import_heavy("torchmetrics")
assert sys.modules["scipy.signal"] is scipy.signal
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    # Once it does this no more, nothing has to keep it from it.
    assert 'if package_available("scipy"):\n    import scipy.signal\n' in Path(torchmetrics.__file__).read_text()


def test_another_version_of_lightning_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"lightning": "2.4.0", "pytorch-lightning": "2.6.6"}
    monkeypatch.setattr(lightning_arguments, "version", versions.get)
    Trainer(num_workers=2)
    monkeypatch.setattr(lightning_arguments, "package_in_use", lambda: "lightning.pytorch")
    with pytest.raises(RequestError, match=r"^lightning 2\.4\.0 is not .*: pip install lightning==2\.6\.6\.$"):
        Trainer(num_workers=2)
