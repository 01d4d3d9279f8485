"""What the user's code prints, warns of and logs arrives; what Lightning and Ray say of themselves does not."""

import logging
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import pytorch_lightning as pl
from torch.utils.data import DataLoader

from ray_mnist import MNISTDataModule, SimpleModel, Trainer
from ray_mnist.cli import console
from ray_mnist.launch.channel import merged
from ray_mnist.launch.output import root_logger, worker_output
from ray_mnist.run.events import Event, Printed, WorkerStarted

# Workers


def in_fork(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns in a process of its own, whose streams and loggers it may change."""
    with ProcessPoolExecutor(1, get_context("fork")) as process:
        return process.submit(function, *arguments).result(240)


class Talkative:
    """A data set that prints."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        print("a sample is fetched")
        return index


def show(message: Warning | str, category: type[Warning], filename: str, *_: object) -> None:
    print(f"{filename}: {category.__name__}: {message}", file=sys.stderr)


def events_of_a_worker(rank: int, folder: Path) -> list[Event]:
    """What a worker tells which talks in every way, and imports a module that does."""
    (folder / "talkative.py").write_text("import sys\nsys.stdout.writelines(['imp', 'orted\\n'])\n")
    sys.path.insert(0, str(folder))
    sys.stdout, sys.stderr = (open(folder / name, "w", buffering=1) for name in ("out", "err"))  # noqa: SIM115
    logging.basicConfig(level=logging.INFO, format="%(levelname)s of %(name)s: %(message)s", force=True)
    warnings.showwarning = show  # instead of pytest, which collects them
    driver = root_logger()
    logging.basicConfig(level=logging.DEBUG, force=True)  # as Ray has it in a worker
    events: list[Event] = []
    with worker_output(events.extend, rank, "the log", driver):
        __import__("talkative")
        print("printed", 1)
        logging.getLogger("mine").info("logged %d", 2)
        logging.getLogger("mine").debug("not wanted")
        warnings.warn("warned", stacklevel=1)
        logging.getLogger("pytorch_lightning").warning("noise")
        logging.getLogger("ray.train").warning("noise")
        for workers in (0, 1):
            list(DataLoader(Talkative(), num_workers=workers, multiprocessing_context="fork" if workers else None))
        print("last", file=sys.stderr, end="")
    return list(merged(events))  # however many batches there were


def test_rank_0_tells_all_that_its_code_says_in_its_order_and_as_the_driver_logs(tmp_path: Path) -> None:
    started, *printed = in_fork(events_of_a_worker, 0, tmp_path)
    assert started == WorkerStarted(0, "the log")
    assert printed == [
        Printed("imported\nprinted 1\n", "stdout"),
        Printed(f"INFO of mine: logged 2\n{__file__}: UserWarning: warned\n", "stderr"),
        Printed("a sample is fetched\n", "stdout"),
        Printed("last", "stderr"),
    ]
    # The log has what a process of the loader printed, too.
    assert (tmp_path / "out").read_text() == "imported\nprinted 1\n" + 2 * "a sample is fetched\n"
    assert (tmp_path / "err").read_text() == printed[1].text + "last"


def test_the_other_ranks_tell_where_their_output_is(tmp_path: Path) -> None:
    assert in_fork(events_of_a_worker, 1, tmp_path) == [WorkerStarted(1, "the log")]
    assert (tmp_path / "out").read_text() == "imported\nprinted 1\n" + 2 * "a sample is fetched\n"
    assert "INFO of mine: logged 2\n" in (tmp_path / "err").read_text()


def test_what_is_told_goes_to_the_stream_it_was_written_to(capsys: pytest.CaptureFixture[str]) -> None:
    show = console.Display()
    for event in (Printed("a", "stdout"), Printed("b\n", "stderr"), Printed("[bold]c\n", "stdout")):
        show(event)
    assert capsys.readouterr() == ("a[bold]c\n", "b\n")


# This process


class Says(pl.Callback):
    """Talks while the model trains. Lightning has several things to warn of, too."""

    def on_train_start(self, *_: object) -> None:
        print("printed")
        print("printed too", file=sys.stderr)
        warnings.warn("warned", stacklevel=1)
        logging.getLogger("mine").warning("logged")


def test_in_this_process_the_users_output_arrives_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])  # pytest's
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = Trainer(max_epochs=1, storage_path=str(tmp_path), callbacks=[Says()])
        trainer.fit(SimpleModel(), MNISTDataModule("digits"))
    out, err = capsys.readouterr()
    assert "\nprinted\n" in out
    assert err == "printed too\nlogged\n"
    # Python itself may warn meanwhile of what earlier tests left open.
    assert [str(each.message) for each in caught if each.category is not ResourceWarning] == ["warned"]


def module(name: str, code: str) -> Any:
    """A module of this name that has the functions `warn` or `call`."""
    module = ModuleType(name)
    exec(compile(code, f"{name}.py", "exec"), module.__dict__)
    return module


HOW = {
    "warnings.warn": "import warnings\ndef warn(level):\n    warnings.warn('said', stacklevel=level)\n",
    "rank_zero_warn": "from pytorch_lightning.utilities import rank_zero_warn\n"
    "def warn(level):\n    rank_zero_warn('said', stacklevel=level)\n",
}
CALL = "def call(function, *arguments):\n    function(*arguments)\n"


@pytest.mark.parametrize(
    ("warner", "how", "level", "caller", "shown"),
    [
        ("mine", "warnings.warn", 1, "mine", True),
        ("mine", "warnings.warn", 2, "pytorch_lightning.trainer", True),  # a hook that names who calls it
        ("mine", "rank_zero_warn", 4, "mine", True),
        ("pytorch_lightning.trainer", "rank_zero_warn", 4, "mine", False),
        ("pytorch_lightning.trainer", "rank_zero_warn", 5, "mine", False),  # which names the user's module
        ("ray.train", "warnings.warn", 1, "mine", False),
        ("torch.utils", "warnings.warn", 2, "mine", True),
        ("torch.utils", "warnings.warn", 2, "lightning_fabric.utilities", False),
    ],
)
def test_a_warning_is_noise_by_who_gives_it_and_not_by_what_it_names(
    warner: str, how: str, level: int, caller: str, shown: bool
) -> None:
    warn, call = module(warner, HOW[how]).warn, module(caller, CALL).call
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with console.quiet():
            call(warn, level)
        assert len(caught) == shown
        call(warn, level)
    assert len(caught) == shown + 1


def test_what_the_user_puts_in_the_place_of_the_warnings_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    before = warnings.showwarning
    with console.quiet():
        assert warnings.showwarning is not before
    assert warnings.showwarning is before
    with console.quiet():
        warnings.showwarning = print
    assert warnings.showwarning is print
