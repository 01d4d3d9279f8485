"""What a person can type: every option works, and whatever is wrong is one sentence, status 2 and nothing left."""

import dataclasses
import inspect
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from conftest import wait_until

import ray_mnist
from ray_mnist import SimpleModel, train
from ray_mnist.checks.preflight import CPUS_FOR_DATA
from ray_mnist.cli import console, early, parser
from ray_mnist.config import RunConfig, SweepConfig, flag
from ray_mnist.data import download
from ray_mnist.data.sources import MNIST_FILES
from ray_mnist.run.folder import RunFolder
from ray_mnist.run.records import read_metrics
from ray_mnist.search.options import SHORT, make_sweep_options

DIGITS = ["--dataset", "digits"]
Outcome = tuple[int, str, str]
Run = Callable[..., Outcome]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`python -m ray_mnist.train <arguments>` in this process, in the folder `tmp_path`: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "*")

    def call(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["train", *arguments])
        capsys.readouterr()
        return console.exit_status(train.train), *capsys.readouterr()

    return call


@pytest.fixture
def parse() -> Callable[..., Any]:
    """The configuration that these arguments give."""
    return lambda *arguments: parser.parse(parser.make_parser("train", ""), arguments)


@pytest.fixture
def dead_port() -> int:
    """A port where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def everything_in(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def assert_refused(outcome: Outcome, *words: str) -> None:
    status, out, err = outcome
    assert (status, out) == (2, ""), err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert not [word for word in words if word not in err], err


# Bad input

HELP = "--help"
REFUSED = {
    "unknown option": (["--nope"], ["--nope", HELP]),
    "workers -1": (["--num-workers", "-1"], ["--num-workers -1", "at least 0"]),
    "workers x": (["--num-workers", "x"], ["--num-workers x", "a whole number", "such as 2:4"]),
    "workers 2:": (["--num-workers", "2:"], ["--num-workers 2: ", "a whole number", "such as 2:4"]),
    "workers from 4 to 2": (["--num-workers", "4:2"], ["--num-workers 4:2", "the fewest first"]),
    "workers from 0": (["--num-workers", "0:2"], ["--num-workers 0:2", "at least one"]),
    "workers of a file": (["--config", "range.yaml"], ["--num-workers 2:4:6", "a whole number"]),
    "batch 1:30": (["--batch-size", "1:30"], ["--data.batch_size", "1:30", "int", HELP]),
    "batch of a file": (["--config", "batch.yaml"], ["batch.yaml", "--data.batch_size", "1:30", "int", HELP]),
    "seed 1:30": (["--seed", "1:30"], ["--seed", "1:30", "int", HELP]),
    "lr 1:30.5": (["--lr", "1:30.5"], ["--model.lr", "1:30.5", "float", HELP]),
    "no epochs": (["--max-epochs", "0"], ["--max-epochs 0", "at least 1"]),
    "seed -1": (["--seed", "-1"], ["--seed -1", "at least 0"]),
    "seed too large": (["--seed", "4294967296"], ["--seed 4294967296", "at most 4294967295"]),
    "failures -1": (["--max-failures", "-1"], ["--max-failures -1", "at least 0"]),
    "checkpoint every 0": (["--checkpoint-every-n-steps", "0"], ["--checkpoint-every-n-steps 0", "at least 1"]),
    "checkpoint every 0 s": (["--checkpoint-every-s", "0"], ["--checkpoint-every-s 0", "at least 1"]),
    "no CPU": (["--cpus-per-worker", "0"], ["--cpus-per-worker 0", "at least 1"]),
    "half a CPU": (["--cpus-per-worker", "0.5"], ["--cpus-per-worker", "0.5", "int", HELP]),
    "batch 0": (["--batch-size", "0"], ["--batch-size 0", "at least 1"]),
    "batch x": (["--batch-size", "x"], ["--data.batch_size", "x", "int", HELP]),
    "batch beyond the data": (["--batch-size", "1152"], ["--batch-size 1152", "use at most 1151"]),
    "lr nan": (["--lr", "nan"], ["--model.lr", "nan", "float", HELP]),
    "lr -1": (["--lr", "-1"], ["--lr -1.0", "positive"]),
    "unknown schedule of ours": (["--model.schedule", "x"], ["--model.schedule", "x", "cosine"]),
    "unknown data set": (["--dataset", "minst"], ["--dataset minst", "mnist, fashion-mnist, kmnist, cifar10, digits"]),
    "unknown class": (["--model", "Nope"], ["--model Nope", "SimpleModel, ConvModel", "pkg.module.Class"]),
    "unknown package": (["--model", "nopkg.Nope"], ["--model nopkg.Nope", "No module named 'nopkg'", HELP]),
    "no LightningModule": (["--model", "torch.nn.Linear"], ["--model torch.nn.Linear", "LightningModule", HELP]),
    "no data module": (["--data", "torch.nn.Linear"], ["--data torch.nn.Linear", "LightningDataModule", HELP]),
    "unknown model argument": (["--model.nope", "3"], ["--model", "'nope'", HELP]),
    "unknown data argument": (["--data.nope", "3"], ["--data", "'nope'", HELP]),
    "too few classes": (["--model.num_classes", "9"], ["--model.num_classes 9", "10", "leave it out"]),
    "unknown Trainer argument": (["--trainer.nope", "1"], ["--trainer.nope", HELP]),
    "Trainer argument x": (
        ["--trainer.gradient_clip_val", "x"],
        ["--trainer.gradient_clip_val x: Expected", " or ", HELP],
    ),
    "unknown callback": (["--trainer.callbacks+=Nope"], ["--trainer.callbacks Nope", "pkg.module.Class", HELP]),
    "callback without": (["--trainer.callbacks+=EarlyStopping"], ["--trainer.callbacks: ", "required: monitor", HELP]),
    "callback that refuses": (
        ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_top_k=-3"],
        ["--trainer cannot be made", "save_top_k=-3"],
    ),
    "Trainer's place": (["--trainer.devices", "2"], ["devices='2'", "give num_workers=N"]),
    "Trainer's strategy": (["--trainer.strategy", "deepspeed"], ["strategy='deepspeed'", "use one of auto, ddp"]),
    "no epochs of the Trainer's": (["--trainer.max_epochs", "-1"], ["--max-epochs -1", "at least 1"]),
    "epochs twice": (["--trainer.max_epochs", "4", "--max-epochs", "5"], ["--max-epochs 5 and --trainer.max_epochs 4"]),
    "unknown optimizer": (["--optimizer", "Nope"], ["--optimizer Nope: neither one of torch's", HELP]),
    "optimizer's argument x": (["--optimizer", "SGD", "--optimizer.lr", "x"], ["--optimizer.lr x: Expected a float"]),
    "optimizer's argument nope": (["--optimizer", "SGD", "--optimizer.nope", "1"], ["--optimizer", "'nope'", HELP]),
    "optimizer that refuses": (
        ["--optimizer", "SGD", "--optimizer.lr", "-1"],
        ["--optimizer torch.optim.SGD cannot be made", "Invalid learning rate: -1.0"],
    ),
    "unknown schedule": (["--optimizer", "SGD", "--lr_scheduler", "Nope"], ["--lr_scheduler Nope: neither", HELP]),
    "schedule without": (
        ["--optimizer", "SGD", "--lr_scheduler", "StepLR"],
        ["--lr_scheduler: ", "required: step_size"],
    ),
    "schedule of nothing": (
        ["--lr_scheduler", "StepLR", "--lr_scheduler.step_size", "1"],
        ["--lr_scheduler needs --optimizer"],
    ),
    "precision": (["--precision", "nonsense"], ["'nonsense'", "32-true", "bf16-mixed"]),
    "storage below a file": (["--storage-path", "file/below"], ["--storage-path", "file/below", "another folder"]),
    "storage in /proc": (["--storage-path", "/proc/runs"], ["--storage-path /proc/runs", "another folder"]),
    "storage of unknown kind": (["--storage-path", "nope://x"], ["--storage-path nope://x"]),
    "data below a file": (["--dataset", "mnist", "--data.data_dir", "file/below"], ["file/below", "--data.data_dir"]),
    "mirror that is no URL": (["--dataset", "mnist", "--data.mirror", "host"], ["'host'", "--data.mirror http://"]),
    "resume what": (["--resume"], ["--resume", "--name"]),
    "resume nothing": (["--resume", "--name", "nothing"], ["--resume", "runs/nothing", "no run in"]),
    "existing name": (["--storage-path", "old", "--name", "run"], ["old/run", "--resume", "another --name"]),
    "name with a slash": (["--name", "a/b"], ["--name 'a/b'", "leave out '/'"]),
    "empty name": (["--name", ""], ["--name ''", "cannot be a folder's name"]),
    "broken YAML": (["--config", "broken.yaml"], ["broken.yaml", "line 1", HELP]),
    "unknown key": (["--config", "unknown.yaml"], ["'nope'", HELP]),
    "no mapping": (["--config", "list.yaml"], ["list.yaml", HELP]),
    "missing file": (["--config", "missing.yaml"], ["missing.yaml", "does not exist", HELP]),
    "GPU and TPU": (["--use-gpu", "--tpu-cores", "8"], ["--use-gpu", "--tpu-cores", "drop one"]),
    "workers and TPU": (["--num-workers", "2", "--tpu-cores", "8"], ["--num-workers", "--tpu-cores", "drop one"]),
    "address": (["--num-workers", "1", "--address", "nonsense"], ["--address nonsense", "HOST:PORT"]),
    "port too large": (["--num-workers", "1", "--address", "h:65536"], ["--address h:65536", "HOST:PORT"]),
}


@pytest.mark.parametrize(("arguments", "words"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_one_sentence(run: Run, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "old/run").mkdir(parents=True)
    (tmp_path / "broken.yaml").write_text("seed: [1\n")
    (tmp_path / "range.yaml").write_text("num_workers: 2:4:6\n")
    (tmp_path / "batch.yaml").write_text("data: {class_path: MNISTDataModule, init_args: {batch_size: 1:30}}\n")
    (tmp_path / "unknown.yaml").write_text("nope: 3\n")
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    before = everything_in(tmp_path)
    assert_refused(run(*DIGITS, *arguments), *words)
    assert everything_in(tmp_path) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_here(run: Run, tmp_path: Path) -> None:
    assert_refused(run(*DIGITS, "--use-gpu"), "--use-gpu", "no GPU on this machine", "drop --use-gpu")
    assert everything_in(tmp_path) == {}


def test_arithmetic_comes_before_the_data_and_the_data_before_the_cluster(
    run: Run, tmp_path: Path, dead_port: int
) -> None:
    """A cluster may take minutes to start: here one that would be refused at once stands in for it."""
    cluster = ["--num-workers", "3", "--address", f"127.0.0.1:{dead_port}"]
    no_data = ["--data.mirror", f"http://127.0.0.1:{dead_port}/"]
    assert_refused(run(*cluster, *no_data, "--batch-size", "2"), "--batch-size 2", "3 workers", "use at least 3")
    assert everything_in(tmp_path) == {}
    assert_refused(run(*cluster, *DIGITS, "--batch-size", "1152"), "--batch-size 1152", "use at most 1151")
    assert everything_in(tmp_path) == {}
    assert_refused(run(*cluster, *no_data), f"http://127.0.0.1:{dead_port}/", "--data.mirror URL")
    assert everything_in(tmp_path) == NO_DATA


def test_a_cluster_that_does_not_answer(run: Run, tmp_path: Path, dead_port: int) -> None:
    outcome = run(*DIGITS, "--num-workers", "1", "--address", f"127.0.0.1:{dead_port}")
    assert_refused(outcome, f"--address 127.0.0.1:{dead_port}", "refused", "ray start --head")
    assert everything_in(tmp_path) == {}


def idx(shape: tuple[int, ...], value: int) -> bytes:
    count = 1
    for size in shape:
        count *= size
    return bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + bytes([value]) * count


IMAGES, LABELS = MNIST_FILES[:2]
DAMAGED = {
    "truncated": (IMAGES, idx((5, 28, 28), 1)[:-1], "holds 3,919 bytes where its header announces 3,920"),
    "fewer labels": (LABELS, idx((4,), 1), f"holds 4 labels for the 5 images of {IMAGES}"),
    "label 10": (LABELS, idx((5,), 10), "holds the label 10"),
}


@pytest.mark.parametrize(("name", "content", "complaint"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_data_file(run: Run, tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    for file in MNIST_FILES:
        (tmp_path / file).write_bytes(idx((5, 28, 28) if "images" in file else (5,), 1))
    (tmp_path / name).write_bytes(content)
    before = everything_in(tmp_path)
    assert_refused(run("--data.data_dir", "."), f"{tmp_path / name} {complaint}", "delete it to fetch it anew")
    assert everything_in(tmp_path) == before


# The lock stays: whoever deletes it takes it away from those who wait for it.
NO_DATA = {"data": None, "data/.mnist.lock": b""}


def test_no_data_and_no_network(run: Run, tmp_path: Path, dead_port: int) -> None:
    outcome = run("--data.mirror", f"http://127.0.0.1:{dead_port}/")
    assert_refused(outcome, f"http://127.0.0.1:{dead_port}/", "refused", "--data.mirror URL", "--dataset digits")
    assert everything_in(tmp_path) == NO_DATA


def test_a_mirror_that_never_answers(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "MIRROR_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the system accepts, and nobody answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        outcome = run("--data.mirror", url)
    assert_refused(outcome, f"{url} (no answer within 0.3 s)", "--data.data_dir DIR", "--dataset digits")
    assert everything_in(tmp_path) == NO_DATA


def test_a_full_disk(run: Run, full_disk: Path) -> None:
    outcome = run(*DIGITS, "--storage-path", str(full_disk / "runs"))
    assert_refused(outcome, f"--storage-path {full_disk}/runs", "4.7 MB", "No space left", "make room")
    assert everything_in(full_disk) == {}


# As processes

Command = Callable[..., "subprocess.CompletedProcess[str]"]


def test_training_that_diverges_has_status_1(run: Run) -> None:
    status, _, err = run(*DIGITS, "--lr", "1e30")
    assert status == 1
    assert err.startswith(
        "error: training failed: diverged: the loss is nan in step 2 on rank 0, with learning rate 1e+30"
    )
    assert err.count("\n") == 1


def test_a_process_ends_with_the_sentence(command: Command, tmp_path: Path) -> None:
    done = command("--nope", timeout=600)
    assert_refused((done.returncode, done.stdout, done.stderr), "--nope", HELP)
    assert everything_in(tmp_path) == {}


@pytest.mark.slow
def test_gpus_that_the_cluster_does_not_have(command: Command, tmp_path: Path) -> None:
    """The Ray cluster that is started for the run ends with it."""
    with tempfile.TemporaryDirectory(prefix="ray-") as ray_folder:
        environment = os.environ | {"RAY_TMPDIR": ray_folder, "CUDA_VISIBLE_DEVICES": ""}
        arguments = ["--num-workers", "4", "--use-gpu", *DIGITS]
        done = command(*arguments, timeout=600, env=environment)
        cpus = max(os.cpu_count() or 1, 4 + CPUS_FOR_DATA)
        numbers = ["4 CPUs and 4 GPUs", f"(1 node, {cpus} CPUs, 0 GPUs)", "room for 0 of the 4 workers"]
        assert_refused((done.returncode, done.stdout, done.stderr), *numbers, "drop --use-gpu", "--address")
        assert "the cluster at " in done.stderr
        assert list(Path(ray_folder, "ray").glob("session_*")), "Ray ran somewhere else"
        wait_until(lambda: not started_with("RAY_TMPDIR", ray_folder), 600, "Ray's processes to end")
    assert everything_in(tmp_path) == {}


def started_with(variable: str, value: str) -> list[psutil.Process]:
    """The processes that have this variable in their environment, as all that Ray starts inherit it."""

    def has_it(process: psutil.Process) -> bool:
        try:
            return process.environ().get(variable) == value
        except psutil.Error:
            return False

    return [process for process in psutil.process_iter() if has_it(process)]


# Options that work


def test_help_lists_every_option(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run("--help")
    words = capsys.readouterr().out.replace("[", " ").replace("=", " ").split()
    options = [flag(option.name) for option in dataclasses.fields(RunConfig)]
    assert end.value.code == 0
    assert [option for option in [*options, "--config", *parser.SHORT] if option not in words] == []
    assert len(options) == 19


@pytest.mark.parametrize("name", early.OURS)
def test_what_is_known_of_our_classes_before_they_are_imported_is_true(name: str) -> None:
    taken = inspect.signature(getattr(ray_mnist, name)).parameters
    assert [*inspect.signature(early.OURS[name]).parameters.values()] == [*taken.values()]


@pytest.mark.parametrize("written", ["2:4", "'2:4'", "[2, 4]"])
def test_a_range_of_workers_is_what_is_written(written: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"num_workers: {written}\n")
    options = parser.make_options("train", "").parse_args(["--config", str(tmp_path / "config.yaml")])
    assert RunConfig(num_workers=options.num_workers).num_workers == (2, 4)
    options = parser.make_options("train", "").parse_args(["--num-workers", written.strip("'")])
    config = RunConfig(num_workers=options.num_workers)
    assert (config.min_workers, config.max_workers) == (2, 4)
    assert RunConfig(num_workers="3:3").num_workers == RunConfig(num_workers=(3, 3)).num_workers == 3


def run_options() -> parser.Parser:
    return parser.make_options("train", "")


@pytest.mark.parametrize(
    "wrong", [["--model=Nope"], ["--data", "nope.Data"], ["--lr", "x"], ["--model", "ConvModel", "--model.width", "3"]]
)
def test_nothing_is_started_for_classes_that_cannot_be_made(wrong: list[str]) -> None:
    """Where they may well be, the run options tell what to start while they are imported."""
    assert early.answer(run_options, parser.expand(wrong)) is None
    for right in ([], ["--lr", "0.1"], ["--model=ConvModel"], ["--model", "pytorch_lightning.demos.Net", "--lr", "x"]):
        assert early.answer(run_options, parser.expand(right)) is not None


PRINTED = {
    "nothing": [],
    "run options": ["--num-workers", "2", "--use-gpu", "--name=x"],
    "a range": ["--num-workers", "2:4"],
    "another of our classes": ["--lr", "0.5", "--model", "ConvModel", "--model.init_args.num_classes=20"],
    "its path": ["--model=ray_mnist.ConvModel", "--data", "MNISTDataModule", "--model.input_shape", "[3, 8, 8]"],
    "a module's": ["--model", "ray_mnist.models.SimpleModel", *DIGITS],
    "only what differs": ["--seed", "3", "--print_config=skip_default"],
    "a class of another's": ["--model", "pytorch_lightning.demos.boring_classes.BoringModel"],
    "a file": ["--config", "config.yaml"],
}


@pytest.mark.parametrize("arguments", PRINTED.values(), ids=PRINTED)
def test_a_configuration_is_the_same_before_and_after_all_is_imported(
    run: Run, parse: Any, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("seed: 5\nmodel: {class_path: ConvModel}\n")
    printed = []
    for ask in (run, parse):
        with pytest.raises(SystemExit) as end:
            ask(*arguments, *(() if "--print_config=skip_default" in arguments else ("--print_config",)))
        assert end.value.code == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != ""


def test_a_sweep_s_configuration_is_the_same_before_and_after_all_is_imported(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = parser.expand(["--space", "model.schedule=constant,cosine", "--dataset=digits"], SHORT)
    printed = []
    for ask in (
        lambda given: early.answer(make_sweep_options, given, SweepConfig),
        lambda given: parser.parse(parser.add_all_arguments(make_sweep_options()), given, short=False),
    ):
        with pytest.raises(SystemExit) as end:
            ask([*arguments, "--print_config"])
        assert end.value.code == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert "- model.schedule=constant,cosine" in printed[0]


EARLY = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_loss"]
LIGHTNING_CONFIG = """
trainer:
  max_epochs: 3
  precision: 32
  gradient_clip_val: 0.5
  enable_progress_bar: null
  callbacks: [{class_path: EarlyStopping, init_args: {monitor: val_loss, patience: 7}}]
"""
FILE, IN_FILE = ["--config", "lightning.yaml"], {"gradient_clip_val": 0.5, "callbacks": ["EarlyStopping"]}


@pytest.mark.parametrize(
    ("arguments", "options", "trainer"),
    [
        ([], {"max_epochs": 10}, {}),
        (["--trainer.gradient_clip_val", "1"], {"max_epochs": 10}, {"gradient_clip_val": 1}),
        (["--trainer.max_epochs", "4"], {"max_epochs": 4}, {}),
        (["--trainer.precision", "16-mixed", "--max-epochs", "4"], {"precision": "16-mixed", "max_epochs": 4}, {}),
        (
            ["--trainer.max_epochs", "null", "--trainer.precision", "null"],
            {"max_epochs": 10, "precision": "32-true"},
            {},
        ),
        (["--trainer.max_steps", "4"], {}, {"max_steps": 4}),
        (["--trainer.max_steps", "4", "--trainer.max_epochs", "-1"], {}, {"max_steps": 4}),
        (["--trainer.max_steps", "4", "--max-epochs", "10"], {"max_epochs": 10}, {"max_steps": 4}),
        ([*EARLY, "--trainer.callbacks+=RichProgressBar"], {}, {"callbacks": ["EarlyStopping", "RichProgressBar"]}),
        (["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs"], {}, {"logger": "CSVLogger"}),
        (FILE, {"max_epochs": 3, "precision": "32"}, IN_FILE),
        ([*FILE, "--trainer.max_epochs", "5"], {"max_epochs": 5}, IN_FILE),
    ],
)
def test_the_arguments_of_lightnings_trainer_are_taken(
    arguments: list[str],
    options: dict[str, Any],
    trainer: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what is written into config.yaml gives the same once more."""
    monkeypatch.chdir(tmp_path)
    Path("lightning.yaml").write_text(LIGHTNING_CONFIG)
    for again in (False, True):
        lightning = parser.make_parser("train", "")
        config = parser.parse(lightning, ["--config", "config.yaml"] if again else arguments)
        found = parser.trainer_arguments(lightning, config)
        if "callbacks" in found:
            found["callbacks"] = [type(callback).__name__ for callback in found["callbacks"]]
        if "logger" in found:
            found["logger"] = type(found["logger"]).__name__
        assert found == trainer
        assert options.items() <= parser.options_of(config).items()
        assert ("max_epochs" in config) == ("max_steps" not in trainer or "max_epochs" in options)
        Path("config.yaml").write_text(yaml.safe_dump(parser.plain(lightning, config)))


def test_the_arguments_of_lightnings_trainer_are_what_is_trained_with(run: Run, tmp_path: Path) -> None:
    status, out, err = run(*DIGITS, "--name", "run", "--trainer.max_steps", "40", "--trainer.limit_train_batches", "5")
    assert (status, err) == (0, "")
    assert "epoch   8  " in out
    assert json.loads((tmp_path / "runs/run/result.json").read_text())["steps"] == 40
    config = yaml.safe_load((tmp_path / "runs/run/config.yaml").read_text())
    assert config["trainer"] == {"max_steps": 40, "limit_train_batches": 5}
    assert "max_epochs" not in config


OPTIMIZED = ["--optimizer.lr", "0.1", "--optimizer", "SGD", "--optimizer.momentum", "0.9"]
SCHEDULED = ["--lr_scheduler", "StepLR", "--lr_scheduler.step_size", "1", "--lr_scheduler.gamma", "0.5"]


class Optimized(SimpleModel):
    """Has what `OPTIMIZED` and `SCHEDULED` say."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


def test_an_optimizer_and_its_schedule_take_the_place_of_the_models_own(run: Run, gloo: None, tmp_path: Path) -> None:
    """As LightningCLI has them; on workers too, from the config.yaml of the first run."""
    options = [*DIGITS, "--max-epochs", "2"]
    assert run(*options, *OPTIMIZED, *SCHEDULED, "--name", "given")[::2] == (0, "")
    assert run(*options, "--model", "test_cli.Optimized", "--name", "own")[::2] == (0, "")
    assert run("--config", "runs/given/config.yaml", "--name", "workers", "--num-workers", "2")[::2] == (0, "")
    given, own, workers = (
        read_metrics(RunFolder(str(tmp_path / "runs"), name)) for name in ("given", "own", "workers")
    )
    assert [row["val_loss"] for row in given] == [row["val_loss"] for row in own]
    assert [row["val_loss"] for row in given] == pytest.approx([row["val_loss"] for row in workers], rel=1e-4)


def test_a_schedule_follows_what_it_monitors(run: Run, tmp_path: Path) -> None:
    plateau = ["--lr_scheduler", "ReduceLROnPlateau", "--lr_scheduler.monitor", "val_loss"]
    assert run(*DIGITS, "--max-epochs", "2", *OPTIMIZED, *plateau, "--name", "run")[0] == 0
    newest = max(tmp_path.glob("runs/run/checkpoint_*/checkpoint.ckpt"))
    (schedule,) = torch.load(newest, weights_only=True)["lr_schedulers"]  # as it was before the last epoch's end
    first, _ = read_metrics(RunFolder(str(tmp_path / "runs"), "run"))
    assert schedule["best"] == pytest.approx(first["val_loss"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--print_config"],
        ["--print_config", "--lr", "0.5", "--model", "ConvModel"],
        ["--num-workers", "-1"],
        ["--seed", "x"],
        ["--nope"],
        ["--resume", "--lr", "0.5"],
    ],
)
def test_what_needs_no_training_does_not_wait_for_torch_and_lightning(arguments: list[str]) -> None:
    program = "import sys; from ray_mnist import train; from ray_mnist.cli import console\n"
    program += "try: console.exit_status(train.train)\nexcept SystemExit: pass\n"
    program += "print([name for name in ('torch', 'pytorch_lightning', 'ray') if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True, timeout=600
    )
    assert done.stdout.splitlines()[-1] == "[]"


ENDING = """
import atexit, sys
from ray_mnist.cli import console
from ray_mnist.errors import RequestError

class Imported:
    def __del__(self):
        print("taken apart")

def command():
    global imported, left
    imported, left = Imported(), open("left.txt", "w")
    left.write("not closed")
    atexit.register(print, "done at exit")
    {end}

console.run(command)
"""


@pytest.mark.parametrize(
    ("end", "status"),
    [("pass", 0), ("raise RequestError('no')", 2), ("sys.exit()", 0), ("sys.exit(143)", 143), ("sys.exit('no')", 1)],
)
def test_a_command_ends_at_once_with_all_done_that_was_left_to_the_end(tmp_path: Path, end: str, status: int) -> None:
    program = [sys.executable, "-c", ENDING.format(end=end)]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (status, "done at exit\n")
    assert (tmp_path / "left.txt").read_text() == "not closed"


def test_print_config_is_taken_back(parse: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "ConvModel", "--lr", "0.5", *DIGITS, "--max-epochs", "3", "--use-gpu", "--name", "x"]
    with pytest.raises(SystemExit) as end:
        parse(*arguments, "--print_config")
    assert end.value.code == 0
    file = tmp_path / "config.yaml"
    file.write_text(capsys.readouterr().out)
    again, first = parse("--config", str(file)), parse(*arguments)
    assert again.pop("config") is not None
    assert first.pop("config") is None
    assert again == first
    assert (first.max_epochs, first.use_gpu, first.model.init_args.lr) == (3, True, 0.5)


@pytest.mark.parametrize(
    ("short", "long", "value"),
    [
        ("--lr", "--model.lr", "0.5"),
        ("--batch-size", "--data.batch_size", "7"),
        ("--dataset", "--data.dataset", "kmnist"),
    ],
)
def test_short_options_mean_the_long_ones(parse: Any, short: str, long: str, value: str) -> None:
    forms = [[short, value], [f"{short}={value}"], [long, value], [f"{long}={value}"]]
    first, *others = [parse(*form) for form in forms]
    assert first != parse()
    assert [other == first for other in others] == [True] * 3


def test_what_comes_later_wins(parse: Any, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("seed: 1\nmax_epochs: 4\nmodel: {class_path: SimpleModel, init_args: {lr: 0.25}}\n")
    later = parse("--config", str(file), "--seed", "2", "--lr", "0.5")
    assert (later.seed, later.max_epochs, later.model.init_args.lr) == (2, 4, 0.5)
    earlier = parse("--seed", "2", "--lr", "0.5", "--config", str(file))
    assert (earlier.seed, earlier.max_epochs, earlier.model.init_args.lr) == (1, 4, 0.25)


@pytest.mark.parametrize("model", ["SimpleModel", "ConvModel"])
def test_the_model_is_sized_to_the_data(parse: Any, model: str) -> None:
    config = parse("--dataset", "cifar10", "--model", model)
    made, _ = parser.instantiate(parser.make_parser("train", ""), config)
    assert made.hparams["input_shape"] == config.model.init_args.input_shape == (3, 32, 32)
    assert made(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_a_size_that_was_given_stays(parse: Any) -> None:
    config = parse("--dataset", "cifar10", "--model.input_shape", "[3, 16, 16]", "--model.num_classes", "20")
    made, _ = parser.instantiate(parser.make_parser("train", ""), config)
    assert made(torch.zeros(2, 3, 16, 16)).shape == (2, 20)


OWN_CLASSES = """
import torch
from pytorch_lightning import LightningDataModule, LightningModule
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset


class Net(LightningModule):
    def __init__(self, hidden: int = 8, input_shape: tuple[int, int, int] = (1, 28, 28)):
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(torch.nn.Linear(64, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 10))

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        right = self.net(batch[0]).argmax(1) == batch[1]
        self.log("test_accuracy", right.float().mean(), batch_size=len(right))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


class Digits(LightningDataModule):
    input_shape = (1, 8, 8)

    def __init__(self, share: float = 0.5):
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage):
        digits = load_digits()
        data = TensorDataset(torch.tensor(digits.data).float() / 16, torch.tensor(digits.target))
        self.test, self.train = torch.utils.data.random_split(data, [self.hparams.share, 1 - self.hparams.share])

    def train_dataloader(self):
        return DataLoader(self.train, 16, shuffle=True)

    def test_dataloader(self):
        return DataLoader(self.test, 100)
"""


def test_own_classes_train(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_classes.py").write_text(OWN_CLASSES)
    monkeypatch.syspath_prepend(tmp_path)
    model = ["--model", "own_classes.Net", "--model.hidden", "32"]
    data = ["--data", "own_classes.Digits", "--data.share", "0.25"]
    status, out, err = run(*model, *data, "--max-epochs", "3", "--name", "own")
    assert (status, err) == (0, "")
    result = json.loads((tmp_path / "runs/own/result.json").read_text())
    assert (result["model"], result["dataset"]) == ("Net", "Digits")
    assert (result["train_samples"], result["test_samples"]) == (1347, 450)
    assert result["steps"] == 3 * 85
    assert result["test_accuracy"] > 0.8
    last = out.splitlines()[-1]
    assert last.startswith(f"test accuracy {result['test_accuracy']:.4f} on 450 ")
    assert last.endswith("run folder runs/own")
    config = yaml.safe_load((tmp_path / "runs/own/config.yaml").read_text())
    assert config["model"] == {"class_path": "own_classes.Net", "init_args": {"hidden": 32, "input_shape": [1, 8, 8]}}
    assert config["data"] == {"class_path": "own_classes.Digits", "init_args": {"share": 0.25}}


def test_resume_repeats_no_options_and_takes_those_given(run: Run, tmp_path: Path) -> None:
    options = ["--lr", "0.02", "--batch-size", "50", "--seed", "3"]
    assert run(*DIGITS, *options, "--max-epochs", "1", "--name", "x")[0] == 0
    config_file = tmp_path / "runs/x/config.yaml"
    before = yaml.safe_load(config_file.read_text())
    assert before["model"]["init_args"]["lr"] == 0.02
    assert before["data"]["init_args"] | {"dataset": "digits", "batch_size": 50} == before["data"]["init_args"]

    config_file.write_text(yaml.safe_dump(before | {"num_workers": 2, "dashboard": True}))
    here = ["--resume", "--name", "x", "--max-epochs", "3", "--num-workers", "0"]
    assert "--dashboard shows workers on Ray" in run(*here, "--dashboard")[2]
    status, out, err = run(*here)  # with which the dashboard of the workers is not meant any more
    assert (status, err) == (0, "")
    assert [row["epoch"] for row in read_metrics(RunFolder("runs", "x"))] == [1, 2, 3]
    assert "epoch 1/3" not in out
    assert yaml.safe_load(config_file.read_text()) == before | {"max_epochs": 3}
    result = json.loads((tmp_path / "runs/x/result.json").read_text())
    assert (result["steps"], result["epochs"], result["seed"]) == (3 * (1151 // 50), 3, 3)


def test_a_learning_rate_given_on_resume_is_trained_with(run: Run, tmp_path: Path) -> None:
    assert run(*DIGITS, "--max-epochs", "1", "--name", "x")[0] == 0
    assert run("--resume", "--name", "x", "--max-epochs", "2", "--lr", "1e-30")[0] == 0
    first, second = read_metrics(RunFolder("runs", "x"))
    assert second["val_loss"] == first["val_loss"]


def test_a_class_has_its_own_defaults_and_not_those_of_the_class_it_replaces(parse: Any) -> None:
    """ConvModel takes arguments of the same names as SimpleModel, the default, with other defaults."""
    init_args = parse("--model", "ConvModel").model.init_args
    assert (init_args.lr, init_args.schedule) == (0.002, "one-cycle")
    init_args = parse("--lr", "0.5", "--model=ConvModel").model.init_args
    assert (init_args.lr, init_args.schedule) == (0.5, "one-cycle")


def test_a_run_does_not_go_on_with_another_model(run: Run) -> None:
    assert run(*DIGITS, "--max-epochs", "1", "--name", "x")[0] == 0
    status, _, error = run("--resume", "--name", "x", "--max-epochs", "2", "--model", "ConvModel")
    assert status == 2
    assert "was started with ray_mnist.SimpleModel, not ray_mnist.models.ConvModel" in error
    assert yaml.safe_load(Path("runs/x/config.yaml").read_text())["max_epochs"] == 1
