"""What becomes of a run after its training: it is tested, exported, listed and compared, from its folder alone."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import every_damage

from ray_mnist import MNISTDataModule, RequestError, SimpleModel, Trainer, evaluate, export, runs, train
from ray_mnist.cli import console
from ray_mnist.run import lock
from ray_mnist.run.folder import CHECKPOINT, RunFolder, checkpoint_name

Outcome = tuple[int, str, str]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs: `shell`, and `python`, whose newest checkpoint is not its best, but knows nothing."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        arguments = ["--dataset", "digits", "--max-epochs", "2", "--seed", "3", "--storage-path", str(folder)]
        patch.setattr(sys, "argv", ["train", *arguments, "--name", "shell"])
        assert console.exit_status(train.train) == 0
        trainer = Trainer(max_epochs=1, storage_path=str(folder), name="python", logger=False)
        trainer.fit(SimpleModel(lr=0.01), MNISTDataModule("digits"))
    checkpoint = torch.load(folder / "python" / trainer.result.values["best_checkpoint"] / CHECKPOINT)
    for weight in checkpoint["state_dict"].values():
        weight.zero_()
    (folder / "python" / checkpoint_name(999)).mkdir()
    torch.save(checkpoint, folder / "python" / checkpoint_name(999) / CHECKPOINT)
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """A command with arguments, in this process: (status, stdout, stderr)."""

    def call(command: Callable[[], object], *arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", [command.__name__, *map(str, arguments)])
        capsys.readouterr()
        return console.exit_status(command), *capsys.readouterr()

    return call


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def refused(outcome: Outcome) -> str:
    """The sentence."""
    status, out, err = outcome
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


# Evaluate


@pytest.mark.parametrize("name", ["shell", "python"])
def test_a_run_is_tested_again_to_the_last_digit(
    name: str, storage: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = result(storage / name)
    monkeypatch.setattr(sys, "argv", ["evaluate", str(storage / name)])
    assert evaluate.evaluate() == [{key: before[key] for key in ("test_loss", "test_accuracy")}]
    status, out, err = run(evaluate.evaluate, storage / name)
    assert (status, err) == (0, "")
    found = f"test_loss {before['test_loss']:.4f}  test_accuracy {before['test_accuracy']:.4f}"
    assert out == f"{found} on digits; {storage / name / before['best_checkpoint']}\n"
    assert not [path for path in storage.iterdir() if path.name not in ("shell", "python")]


@pytest.mark.usefixtures("gloo")
def test_two_workers_find_what_one_finds(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = result(storage / "shell")
    monkeypatch.setattr(sys, "argv", ["evaluate", str(storage / "shell"), "--num-workers", "2"])
    (metrics,) = evaluate.evaluate()
    assert metrics["test_accuracy"] == before["test_accuracy"]
    assert metrics["test_loss"] == pytest.approx(before["test_loss"], rel=1e-6)


@pytest.mark.slow
def test_two_workers_on_ray_find_what_one_finds(storage: Path, command: Any) -> None:
    done = command(str(storage / "shell"), "--num-workers", "2", module="evaluate")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"test_accuracy {result(storage / 'shell')['test_accuracy']:.4f} on digits" in done.stdout


OWN_DATA = """
import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset


class Blank(LightningDataModule):
    def __init__(self, count: int = 10, side: int = 28):
        super().__init__()
        self.save_hyperparameters()
        self.input_shape = (1, side, side)

    def test_dataloader(self):
        images = torch.zeros(self.hparams.count, *self.input_shape)
        return DataLoader(TensorDataset(images, torch.full((len(images),), 7)), 4)


class NoTest(LightningDataModule):
    pass
"""


@pytest.fixture
def own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_data.py").write_text(OWN_DATA)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("own_data")
def test_a_run_is_tested_on_other_data(storage: Path, run: Any) -> None:
    status, out, _ = run(evaluate.evaluate, "--data.count", "3", storage / "shell", "--data", "own_data.Blank")
    assert status == 0
    assert out.startswith("test_loss ")
    assert "test_accuracy 0.0000 on Blank" in out or "test_accuracy 1.0000 on Blank" in out


@pytest.mark.usefixtures("own_data")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "nothing is no run folder: there is no config.yaml in it"),
        (["nope://x/y"], "nope://x cannot be used"),
        (["{storage}/shell", "--nope"], "--nope"),
        (["{storage}/shell", "--num-workers", "-1"], "--num-workers -1"),
        (["{storage}/shell", "--dataset", "minst"], "--dataset minst is not known"),
        (["{storage}/shell", "--data", "own_data.NoTest"], "NoTest cannot be tested: it has no test_dataloader"),
        (
            ["{storage}/shell", "--data", "own_data.Blank", "--data.side", "8"],
            "images of shape (1, 28, 28), and those of the data are (1, 8, 8)",
        ),
        (["{storage}/shell", "--model", "ConvModel"], "cannot be loaded into the model"),
    ],
)
def test_what_cannot_be_tested_is_one_sentence(arguments: list[str], words: str, storage: Path, run: Any) -> None:
    assert words in refused(run(evaluate.evaluate, *(each.format(storage=storage) for each in arguments)))


def test_a_run_that_names_no_data_needs_it_named(storage: Path, run: Any, tmp_path: Path) -> None:
    shutil.copytree(storage / "shell", tmp_path / "run")
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    del config["data"]
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config))
    assert "give --data CLASS" in refused(run(evaluate.evaluate, tmp_path / "run"))
    status, out, _ = run(evaluate.evaluate, tmp_path / "run", "--data", "MNISTDataModule", "--dataset", "digits")
    assert status == 0
    assert f"test_accuracy {result(storage / 'shell')['test_accuracy']:.4f} on digits" in out


@every_damage
@pytest.mark.parametrize("command", [evaluate.evaluate, export.export])
def test_a_damaged_checkpoint_is_one_sentence(
    command: Any, damage: Callable[[bytes], bytes], why: str, storage: Path, run: Any, tmp_path: Path
) -> None:
    shutil.copytree(storage / "shell", tmp_path / "run")
    for file in (tmp_path / "run").glob(f"*/{CHECKPOINT}"):
        file.write_bytes(damage(file.read_bytes()))
    more = [tmp_path / "out", "--format", "torch-export"] if command is export.export else []
    best = tmp_path / "run" / result(storage / "shell")["best_checkpoint"] / CHECKPOINT
    assert refused(run(command, tmp_path / "run", *more)) == f"error: The checkpoint {best} {why}.\n"


def test_a_model_of_the_script_that_was_run_needs_its_module(storage: Path, run: Any, tmp_path: Path) -> None:
    shutil.copytree(storage / "shell", tmp_path / "run")
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    config["model"]["class_path"] = "__main__.Net"
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config))
    assert "give --model SCRIPT.Net" in refused(run(evaluate.evaluate, tmp_path / "run"))
    assert run(evaluate.evaluate, tmp_path / "run", "--model", "SimpleModel")[0] == 0


def test_a_run_that_has_not_ended_has_its_newest_checkpoint_tested(storage: Path, run: Any, tmp_path: Path) -> None:
    shutil.copytree(storage / "shell", tmp_path / "run")
    (tmp_path / "run/result.json").unlink()
    newest = max(path.name for path in (tmp_path / "run").glob("checkpoint_*"))
    assert newest in run(evaluate.evaluate, tmp_path / "run")[1]
    for path in (tmp_path / "run").glob("checkpoint_*"):
        shutil.rmtree(path)
    assert "There is no checkpoint in" in refused(run(evaluate.evaluate, tmp_path / "run"))


# Export

# A program of somebody's who has torch, or ONNX's runtime, and nothing else.
LOADERS = {
    "onnx": """
import onnxruntime
session = onnxruntime.InferenceSession(path)
found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
""",
    "torch-export": """
found = torch.export.load(path).module()(images)
""",
    "safetensors": """
from safetensors.torch import load_file
weights = load_file(path)
net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
net.load_state_dict({name.removeprefix("net."): weight for name, weight in weights.items()})
found = net(images)
""",
}
ALONE = """
import sys
for name in ("ray_mnist", "pytorch_lightning", "ray"):
    sys.modules[name] = None
import torch
path, images, expected = sys.argv[1], *torch.load(sys.argv[2])
{load}
assert found.shape == expected.shape and (found - expected).abs().max() < 1e-4
"""
PACKAGES = {"onnx": "onnxruntime", "torch-export": "torch", "safetensors": "safetensors"}


@pytest.mark.parametrize("kind", LOADERS)
def test_what_is_exported_is_the_model_without_this_package(kind: str, storage: Path, run: Any, tmp_path: Path) -> None:
    pytest.importorskip(PACKAGES[kind])
    file = tmp_path / "model.bin"
    status, out, err = run(export.export, storage / "shell", file, "--format", kind)
    assert (status, err) == (0, "")
    assert out.startswith(f"{file} gives what {storage}/shell/checkpoint_")
    assert out.endswith("on 359 test images\n")
    assert [path.name for path in tmp_path.iterdir()] == ["model.bin"]

    checkpoint = storage / "shell" / result(storage / "shell")["best_checkpoint"] / CHECKPOINT
    model = SimpleModel.load_from_checkpoint(checkpoint).eval()
    images = torch.rand(5, 1, 28, 28)
    torch.save((images, model(images).detach()), tmp_path / "expected.pt")
    program = ALONE.format(load=LOADERS[kind])
    subprocess.run([sys.executable, "-c", program, file, tmp_path / "expected.pt"], check=True, timeout=600)


def test_without_a_test_set_an_export_is_checked_on_random_images(storage: Path, run: Any, tmp_path: Path) -> None:
    shutil.copytree(storage / "shell", tmp_path / "run")
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    del config["data"]
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config))
    _, out, _ = run(export.export, tmp_path / "run", tmp_path / "model.pt2", "--format", "torch-export")
    assert out.endswith("on 64 random images, for want of a test set\n")


def test_what_is_not_the_model_is_not_left_there(
    storage: Path, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = export.write_program

    def write_another(model: Any, example: Any, path: Path) -> Any:
        program = write(model, example, path)
        return lambda images: program(images) + 0.001

    monkeypatch.setattr(export, "write_program", write_another)
    status, out, err = run(export.export, storage / "shell", tmp_path / "model.pt2", "--format", "torch-export")
    assert (status, out) == (1, "")
    assert "other results than the model, by up to 0.001" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model.bin"], "format"),
        (["model.bin", "--format", "pickle"], "--format"),
        (["nothing/model.bin", "--format", "torch-export"], "there is no folder"),
    ],
)
def test_an_export_that_cannot_be_is_one_sentence(
    arguments: list[str], words: str, storage: Path, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in refused(run(export.export, storage / "shell", *arguments))
    assert list(tmp_path.iterdir()) == []


def test_a_format_whose_package_is_missing_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RequestError, match=r"--format onnx needs the package onnxruntime: pip install 'ray-mnist\[exp"):
        export.needed("onnxruntime", "onnx")


# Runs


@pytest.fixture(params=["local", "object store"])
def place(request: pytest.FixtureRequest, storage: Path, tmp_path: Path) -> str:
    """A folder, or a bucket, with a run that is done, one that is under way, and one that broke off."""
    place = str(tmp_path)
    if request.param == "object store":
        place = f"{request.getfixturevalue('bucket')}/runs"
    for name in ("done", "running", "stopped"):
        folder = RunFolder(place, name)
        for file in ("config.yaml", "result.json") if name == "done" else ("config.yaml",):
            folder.write(file, (storage / "shell" / file).read_bytes())
    RunFolder(place, "other").write("notes.txt", "")
    RunFolder(place, "running").write(f"{lock.CLAIM}theirs", lock.myself())
    return place


def test_runs_are_listed_with_their_outcome(place: str, storage: Path, run: Any) -> None:
    status, out, err = run(runs.runs, place)
    assert (status, err) == (0, "")
    head, *lines = (line.split() for line in out.splitlines())
    assert head[:4] == ["run", "outcome", "dataset", "model"]
    assert [line[:2] for line in lines] == [["done", "done"], ["running", "running"], ["stopped", "unfinished"]]
    accuracy = f"{result(storage / 'shell')['test_accuracy']:.4g}"
    assert lines[0][2:8] == ["digits", "SimpleModel", "0", "2", "0", accuracy]
    assert lines[2][2:] == ["-"] * 7


def test_two_runs_beside_each_other_show_where_they_differ(storage: Path, run: Any) -> None:
    status, out, err = run(runs.runs, "compare", storage / "shell", storage / "python")
    assert (status, err) == (0, "")
    head, *lines = (line.split() for line in out.splitlines())
    assert head == [str(storage / "shell"), str(storage / "python")]
    cells = {line[0]: line[1:] for line in lines}
    assert cells["model.init_args.lr"] == ["0.001", "0.01"]
    assert cells["max_epochs"] == ["2", "1"]
    assert cells["epochs"] == ["2", "1"]
    shell, python = (result(storage / name)["test_accuracy"] for name in ("shell", "python"))
    assert cells["test_accuracy"] == [f"{shell:.4g}", f"{python:.4g}"]
    assert not {"name", "num_workers", "precision", "versions.torch"} & cells.keys() - {"num_workers"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "nothing cannot be read"),
        (["nope://x"], "nope://x cannot be used"),
        (["."], "There are no runs in ."),
        (["compare", "."], "b"),
        (["compare", ".", "."], "is no run folder"),
    ],
)
def test_what_is_no_run_is_one_sentence(
    arguments: list[str], words: str, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in refused(run(runs.runs, *arguments))


# All of them


@pytest.mark.parametrize(
    ("command", "arguments", "status", "said"),
    [
        *(
            (command, ["--help"], 0, "usage: ")
            for command in ("tune", "evaluate", "predict", "export", "serve", "runs")
        ),
        ("tune", ["--search", "foo"], 2, "error: --search foo is not known"),
        ("tune", ["--num-workers", "x"], 2, "error: --num-workers x is not possible"),
    ],
)
def test_the_help_and_what_is_refused_do_not_wait_for_torch(
    command: str, arguments: list[str], status: int, said: str
) -> None:
    program = (
        f"import runpy, sys\ntry: runpy.run_module('ray_mnist.{command}', run_name='__main__', alter_sys=True)\n"
        f"except SystemExit as end: assert end.code == {status}\n"
        "print([name for name in ('torch', 'pytorch_lightning', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=600)
    assert (done.stderr if status else done.stdout).startswith(said)
    assert done.stdout.splitlines()[-1] == "[]"
