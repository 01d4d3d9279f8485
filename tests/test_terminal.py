"""A run in a real terminal, tmux's: narrow and wide, resized while it trains, and left with Ctrl-C."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import lacking, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

GATE = """
import time
from pathlib import Path

import pytorch_lightning as pl

from ray_mnist import progress_reporter


class Gate(pl.Callback):
    def setup(self, *_, stage):
        progress_reporter.EVERY_S = 0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == 1:
            print("the second batch is done " * 4)
        while not Path(f"go-{batch_idx + 1}").exists():
            time.sleep(0.05)
"""


class Tmux:
    """A shell in a terminal of this many columns."""

    def __init__(self, folder: Path, columns: int) -> None:
        self.socket, self.columns = folder / "tmux", columns
        # What the tests import has put the size of their own terminal into the environment.
        shell = "env -u COLUMNS -u LINES PS1='$ ' bash --norc --noprofile"
        self.do("-f", "/dev/null", "new-session", "-d", "-x", str(columns), "-y", "40", "-c", str(folder), shell)

    def do(self, *arguments: str) -> str:
        done = subprocess.run(
            ["tmux", "-S", str(self.socket), *arguments], capture_output=True, text=True, check=True, timeout=60
        )
        return done.stdout

    def type(self, command: str) -> None:
        self.do("send-keys", command, "Enter")

    def resize(self, columns: int) -> None:
        self.do("resize-window", "-x", str(columns))
        tty = os.open(self.do("display", "-p", "#{pane_tty}").strip(), os.O_RDONLY | os.O_NOCTTY)
        wait_until(lambda: os.get_terminal_size(tty).columns == columns, 60, "tmux to pass the width on")
        os.close(tty)

    def lines(self) -> list[str]:
        """The screen, without empty lines."""
        return [line.rstrip() for line in self.do("capture-pane", "-p").splitlines() if line.strip()]

    def wait_for(self, found: Callable[[list[str]], bool], what: str) -> list[str]:
        """The screen, once this is found on it."""
        screen: list[str] = []

        def look() -> bool:
            screen[:] = self.lines()
            return bool(screen) and found(screen)

        wait_until(look, 120, f"{what} on the screen")
        return screen

    @property
    def cursor_is_shown(self) -> bool:
        return self.do("display", "-p", "#{cursor_flag}") == "1\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "gate.py").write_text(GATE)
    return tmp_path


@pytest.fixture
def terminal(folder: Path, request: pytest.FixtureRequest) -> Iterator[Tmux]:
    if not shutil.which("tmux"):
        lacking("there is no tmux")
    tmux = Tmux(folder, request.param)
    try:
        yield tmux
    finally:
        tmux.do("kill-server")


SECOND = "the second batch is done " * 4  # more than a line
FIRST_PARTS = r"epoch 1/1  batch {}/\d+"
MORE_PARTS = FIRST_PARTS + r"  (\d:\d\d:\d\d left  .+ samples/s  )?loss \d\.\d{{4}}"


@pytest.mark.parametrize("terminal", [80, 30], indirect=True, ids=str)
def test_the_line_fits_a_terminal_that_changes_and_is_gone_after_ctrl_c(terminal: Tmux, folder: Path) -> None:
    shapes = {80: MORE_PARTS, 30: FIRST_PARTS}
    before, after = (80, 30) if terminal.columns == 80 else (30, 80)
    command = f"{sys.executable} -m ray_mnist.train --dataset digits --name run --max-epochs 1"
    terminal.type(f"clear; PYTHONPATH=. {command} --trainer.callbacks gate.Gate")

    screen = terminal.wait_for(lambda lines: "batch 1/" in lines[-1], "the first batch")
    assert re.fullmatch(shapes[before].format(1), screen[-1])
    assert not terminal.cursor_is_shown

    terminal.resize(after)
    (folder / "go-1").touch()
    screen = terminal.wait_for(lambda lines: "batch 2/" in lines[-1] and len(lines) > 4, "the second batch")
    assert re.fullmatch(shapes[after].format(2), screen[-1])
    assert SECOND.replace(" ", "") in "".join(screen[:-1]).replace(" ", "")

    terminal.do("send-keys", "C-c")
    screen = terminal.wait_for(lambda lines: lines[-1] == "$", "the shell")
    assert "interrupted: go on with" in "".join(screen)
    assert not any("batch 2/" in line for line in screen)
    assert terminal.cursor_is_shown
    terminal.type(r"clear; stty -a | grep -o -- '-\?echo\b'")
    terminal.wait_for(lambda lines: lines == ["echo", "$"], "that the shell echoes what is typed")
