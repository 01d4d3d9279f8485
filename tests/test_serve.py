"""A trained model behind HTTP: real pictures are sent to it, and digits drawn in a real browser."""

import json
import math
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytorch_lightning as pl
from conftest import lacking, wait_until
from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from sklearn.datasets import load_digits

from ray_mnist import MNISTDataModule, SimpleModel, Trainer, serve
from ray_mnist.cli import console

pytestmark = pytest.mark.timeout(400)

SIDE = 280  # pixels of the page's canvas


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A model of the digits that is served, until a SIGTERM that leaves nothing of it."""
    folder = tmp_path_factory.mktemp("serve")
    pl.seed_everything(0, verbose=False)  # what was drawn before would count for the weights
    Trainer(max_epochs=20, storage_path=str(folder), name="run", logger=False).fit(
        SimpleModel(), MNISTDataModule("digits")
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "log"
    command = [sys.executable, "-m", "ray_mnist.serve", str(folder / "run"), "--port", str(port)]
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: "\n" in log.read_text() or server.poll() is not None, 300, "the server")
        assert log.read_text() == f"http://127.0.0.1:{port} has a page to draw on; Ctrl-C ends it\n"
        yield f"http://127.0.0.1:{port}"
    finally:
        started = psutil.Process(server.pid).children(recursive=True)
        server.send_signal(signal.SIGTERM)
        status = server.wait(60)
    assert status == 0
    wait_until(lambda: not any(process.is_running() for process in started), 30, "its processes to end")
    assert log.read_text().count("\n") == 1


def ask(address: str, picture: bytes) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(f"{address}/predict", data=picture, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["detail"]


def strokes(name: str) -> list[tuple[float, float]]:
    """The points of a digit as a person draws it, from 0 to 1."""
    if name == "0":
        turns = [2 * math.pi * step / 16 for step in range(17)]
        return [(0.5 + 0.2 * math.sin(turn), 0.5 - 0.32 * math.cos(turn)) for turn in turns]
    return {
        "1": [(0.5, 0.15), (0.5, 0.85)],
        "4": [(0.5, 0.15), (0.25, 0.6), (0.8, 0.6), (0.65, 0.6), (0.65, 0.4), (0.6, 0.88)],
    }[name]


@pytest.mark.slow
def test_pictures_are_recognised_and_what_is_none_is_refused(address: str, tmp_path: Path) -> None:
    from PIL import Image

    right = 0
    for image, label in zip(load_digits().images[:30], load_digits().target[:30], strict=True):
        picture = tmp_path / "picture.png"
        Image.fromarray((255 - 15 * image).astype("uint8")).resize((80, 80)).save(picture)
        status, chances = ask(address, picture.read_bytes())
        assert status == 200
        assert list(chances.values()) == sorted(chances.values(), reverse=True)
        assert sum(chances.values()) == pytest.approx(1, abs=1e-5)
        right += next(iter(chances)) == str(label)
    assert right >= 27
    for wrong, code, words in (
        (b"a digit: 7", 422, "What was sent is no picture that can be read"),
        (b"", 422, "What was sent is no picture that can be read"),
        (bytes(2**25 + 1), 413, "A picture may have 33,554,432 bytes at most."),
    ):
        assert ask(address, wrong)[0] == code
        assert words in ask(address, wrong)[1]


@pytest.mark.slow
def test_digits_drawn_in_a_browser_are_recognised(address: str, tmp_path: Path) -> None:
    """The page itself, with a real mouse: none of the others looks at it."""
    if not (driver := shutil.which("chromedriver")):
        lacking("no chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    # It reaches for no network beside the page's.
    for switch in ("background-networking", "component-update", "sync", "gpu"):
        options.add_argument(f"--disable-{switch}")
    for argument in ("--headless=new", "--no-sandbox", "--no-first-run", f"--user-data-dir={tmp_path}"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    try:
        browser.get(address)
        answers, canvas = browser.find_element(By.ID, "answers"), browser.find_element(By.ID, "canvas")
        assert answers.text == "Draw with the mouse or a finger."
        for digit in "014":
            browser.find_element(By.ID, "clear").click()
            assert answers.text == ""
            first, *others = [(round(SIDE * (x - 0.5)), round(SIDE * (y - 0.5))) for x, y in strokes(digit)]
            mouse = ActionChains(browser, duration=20).move_to_element_with_offset(canvas, *first).click_and_hold()
            for point in others:
                mouse.move_to_element_with_offset(canvas, *point)
            mouse.release().perform()
            wait_until(lambda: answers.text != "", 60, "the answer")
            assert answers.text.split()[0] == digit
        browser.find_element(By.ID, "clear").click()
        canvas.click()  # draws nothing
        wait_until(
            lambda: (
                answers.text == "What was sent shows nothing: what is drawn must stand out from its " + ("background.")
            ),
            60,
            "the complaint",
        )
    finally:
        browser.quit()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "81230"], "--port 81230 cannot be listened on"),
        (["--num-replicas", "0"], "--num-replicas 0 answer nothing: give at least 1."),
    ],
)
def test_what_cannot_be_served_is_refused(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["serve", str(tmp_path), *arguments])
    assert console.exit_status(serve.serve) == 2
    assert words in capsys.readouterr().err
