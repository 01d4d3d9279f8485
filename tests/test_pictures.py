"""Pictures that people draw or photograph, as the models see them, and what a model trained on MNIST says of them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter
from scipy.interpolate import CubicSpline

from ray_mnist import ConvModel, MNISTDataModule, RequestError, SimpleModel, Trainer
from ray_mnist import predict as command
from ray_mnist.classifier import ask
from ray_mnist.cli import console
from ray_mnist.data import pictures, sources

GREY = (1, 28, 28)
LOOP = [(0.5 + 0.3 * np.sin(a), 0.5 - 0.42 * np.cos(a)) for a in np.linspace(0, 2 * np.pi, 13)]
EIGHT = [(0.5 + 0.27 * np.sin(2 * a), 0.5 - 0.45 * np.cos(a)) for a in np.linspace(0, 2 * np.pi, 25)]
# The way of the pen for each digit, in a square: smooth strokes, and corners where one ends and the next begins.
STROKES: list[list[list[tuple[float, float]]]] = [
    [LOOP],
    [[(0.52, 0.05), (0.5, 0.5), (0.48, 0.95)]],
    [[(0.2, 0.25), (0.35, 0.09), (0.62, 0.08), (0.75, 0.28), (0.6, 0.55), (0.2, 0.92)], [(0.2, 0.92), (0.85, 0.9)]],
    [[(0.22, 0.14), (0.5, 0.05), (0.74, 0.25), (0.45, 0.47)], [(0.45, 0.47), (0.78, 0.68), (0.55, 0.94), (0.2, 0.85)]],
    [[(0.3, 0.05), (0.17, 0.52)], [(0.17, 0.52), (0.85, 0.5)], [(0.7, 0.08), (0.66, 0.5), (0.6, 0.97)]],
    [[(0.8, 0.07), (0.3, 0.08)], [(0.3, 0.08), (0.26, 0.45)],
     [(0.26, 0.45), (0.62, 0.42), (0.78, 0.68), (0.52, 0.94), (0.2, 0.87)]],
    [[(0.68, 0.05), (0.35, 0.32), (0.22, 0.68), (0.4, 0.93), (0.65, 0.9), (0.74, 0.7), (0.58, 0.56), (0.26, 0.7)]],
    [[(0.17, 0.1), (0.8, 0.08)], [(0.8, 0.08), (0.55, 0.5), (0.42, 0.95)]],
    [EIGHT],
    [[(0.75, 0.3), (0.6, 0.08), (0.32, 0.14), (0.25, 0.36), (0.45, 0.5), (0.7, 0.38), (0.75, 0.25)],
     [(0.75, 0.25), (0.72, 0.6), (0.62, 0.96)]],
]  # fmt: skip


def drawn(
    digit: int, size: int = 200, pen: float = 0.09, margin: float = 0.25, at: tuple[float, float] = (0, 0)
) -> Image.Image:
    """Black on white, `margin` of the digit's height around it, moved by the share `at` of that margin."""
    whole = round(size * (1 + 2 * margin))
    scale = 4  # drawn larger, for smooth edges
    picture = Image.new("L", (whole * scale, whole * scale), 255)
    pencil = ImageDraw.Draw(picture)
    for stroke in STROKES[digit]:
        curve = CubicSpline(np.linspace(0, 1, len(stroke)), np.array(stroke)) if len(stroke) > 2 else None
        for t in np.linspace(0, 1, 200):
            x, y = curve(t) if curve else np.array(stroke[0]) * (1 - t) + np.array(stroke[1]) * t
            x, y = ((c + margin * (1 + move)) * size * scale for c, move in zip((x, y), at, strict=True))
            radius = pen * size * scale / 2
            pencil.ellipse((x - radius, y - radius, x + radius, y + radius), fill=0)
    return picture.resize((whole, whole), Image.Resampling.LANCZOS)


def inverted(picture: Image.Image) -> Image.Image:
    return picture.point(lambda value: 255 - value)


def photographed(picture: Image.Image, seed: int = 0) -> Image.Image:
    """As a camera sees it: in colour, with light from one side, a soft focus, noise, and a little turned."""
    random = np.random.default_rng(seed)
    turned = picture.rotate(random.uniform(-8, 8), Image.Resampling.BICUBIC, fillcolor=255)
    grey = np.asarray(turned.filter(ImageFilter.GaussianBlur(picture.width / 300)), np.float32) / 255
    y, x = np.mgrid[0 : grey.shape[0], 0 : grey.shape[1]] / grey.shape[0]
    light = 0.45 + 0.3 * x + 0.2 * y - 0.15 * (x - 0.5) ** 2
    colour = (0.15 + 0.85 * grey)[..., None] * light[..., None] * np.array([1, 0.95, 0.85])
    return Image.fromarray((colour + random.normal(0, 0.03, colour.shape)).clip(0, 1).__mul__(255).astype(np.uint8))


def on_nothing(picture: Image.Image) -> Image.Image:
    """White on a transparent canvas, as drawing programs save it."""
    canvas = Image.new("RGBA", picture.size, (255, 255, 255, 0))
    canvas.putalpha(inverted(picture))
    return canvas


WAYS: dict[str, Callable[[int], Image.Image]] = {
    "small": lambda digit: drawn(digit, 24, pen=0.12),
    "large": lambda digit: drawn(digit, 900),
    "white on black": lambda digit: inverted(drawn(digit)),
    "in a corner": lambda digit: drawn(digit, 120, margin=0.9, at=(-0.8, 0.7)),
    "filling the picture": lambda digit: drawn(digit, margin=0.08),
    "thin pen": lambda digit: drawn(digit, 400, pen=0.012),
    "thick pen": lambda digit: drawn(digit, pen=0.16),
    "pale": lambda digit: drawn(digit).point(lambda value: 140 + value * 60 // 255),
    "transparent": lambda digit: on_nothing(drawn(digit)),
    "photograph": lambda digit: photographed(drawn(digit, 500, pen=0.07), seed=digit),
    "photograph of chalk": lambda digit: photographed(inverted(drawn(digit, 300)), seed=digit),
}


@pytest.fixture(scope="module")
def mnist_run(mnist_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was trained on MNIST."""
    data = MNISTDataModule(data_dir=str(mnist_files), batch_size=128)
    trainer = Trainer(max_epochs=1, storage_path=str(tmp_path_factory.mktemp("mnist")), name="run", logger=False)
    trainer.fit(ConvModel(), data)
    assert trainer.result.values["test_accuracy"] > 0.97
    return Path(trainer.result.path)


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was trained on the digits that need no network."""
    trainer = Trainer(max_epochs=5, storage_path=str(tmp_path_factory.mktemp("digits")), name="run", logger=False)
    trainer.fit(SimpleModel(lr=0.003), MNISTDataModule("digits", batch_size=32))
    return Path(trainer.result.path)


@pytest.fixture
def predict(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`python -m ray_mnist.predict <arguments>` in this process: (status, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["predict", *map(str, arguments)])
        capsys.readouterr()
        return console.exit_status(command.predict), *capsys.readouterr()

    return call


@pytest.mark.slow
def test_drawn_and_photographed_digits_are_recognised(mnist_run: Path, predict: Any, tmp_path: Path) -> None:
    for way, draw in WAYS.items():
        for digit in range(10):
            draw(digit).save(tmp_path / f"{way} {digit}.png")
    status, out, err = predict(mnist_run, tmp_path, "--format", "json")
    assert (status, err) == (0, "")
    found = {Path(each["picture"]).stem: each["prediction"] for each in json.loads(out)}
    assert found == {f"{way} {digit}": str(digit) for way in WAYS for digit in range(10)}


@pytest.mark.parametrize("way", WAYS)
def test_a_drawing_is_seen_as_mnists_digits_are(way: str, tmp_path: Path) -> None:
    """Bright on black, 20 pixels high, its mass in the middle, and the same to a pixel whichever way it was made."""
    plain = seen(drawn(4), tmp_path)
    image = seen(WAYS[way](4), tmp_path)
    places = (image > 0.1).nonzero()
    assert (places.amax(0) - places.amin(0)).max() + 1 in (19, 20)
    grid = torch.arange(28) - 14
    middle = torch.stack([(image * grid[:, None]).sum(), (image * grid).sum()]) / image.sum()
    assert middle.abs().max() <= 0.501
    assert image.sum() > 0.8 * plain.sum()  # the strokes of a thin pen, too, are as wide as MNIST's
    moved = [image.roll((down, right), (0, 1)) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    assert max(likeness(each, plain) for each in moved) > 0.7  # the photograph is turned a little


def likeness(one: torch.Tensor, other: torch.Tensor) -> float:
    """The correlation of their pixels."""
    return float(torch.corrcoef(torch.stack([one.flatten(), other.flatten().float()]))[0, 1])


def seen(picture: Image.Image, folder: Path, box: int = 20) -> torch.Tensor:
    picture.save(folder / "picture.png")
    image = pictures.read(folder / "picture.png", GREY, box)
    assert (image.shape, image.dtype) == (GREY, torch.float32)
    assert (image.min(), image.max()) == (0, 1)
    return image[0]


def test_an_image_of_mnists_stays_as_it_is(mnist_files: Path, tmp_path: Path) -> None:
    images = sources.load("mnist", mnist_files).test_images[:50, 0]
    for image in images:
        again = seen(Image.fromarray(image.numpy()), tmp_path)
        assert likeness(again, image) > 0.99


def test_pictures_of_the_data_set_are_told_apart_in_bulk(digits_run: Path, predict: Any, tmp_path: Path) -> None:
    data = sources.load("digits", tmp_path)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(100):
        image = Image.fromarray(255 - data.test_images[number, 0].numpy()).resize((300, 300))
        image.save(folder / f"{number:03}.{('png', 'jpg', 'bmp')[number % 3]}")
    (folder / "notes.txt").write_text("no picture, and none that is asked for")
    status, out, err = predict(digits_run, folder)
    assert (status, err) == (0, "")
    lines = [line.split("  ") for line in out.splitlines()]
    assert [Path(line[0]).stem for line in lines] == [f"{number:03}" for number in range(100)]
    right = [line[1] == str(int(label)) for line, label in zip(lines, data.test_labels[:100], strict=True)]
    assert sum(right) >= 85
    status, out, _ = predict(digits_run, folder / "000.png", "--format=json")
    (found,) = json.loads(out)
    assert found["prediction"] == lines[0][1]
    assert list(found["probabilities"]) == list("0123456789")
    assert sum(found["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert found["probability"] == max(found["probabilities"].values())


def test_a_picture_for_a_model_of_colours_is_its_middle(tmp_path: Path) -> None:
    picture = Image.new("RGB", (300, 100), (255, 0, 0))
    picture.paste((0, 0, 255), (100, 0, 200, 100))
    picture.save(tmp_path / "picture.png")
    image = pictures.read(tmp_path / "picture.png", (3, 32, 32), 28)
    assert image.shape == (3, 32, 32)
    inside = image[:, 2:-2, 2:-2]  # at the edges the colours run together
    assert torch.equal(inside, torch.tensor([0.0, 0.0, 1.0])[:, None, None].expand_as(inside))


def grain(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).normal(128, 30, (200, 200)).clip(0, 255).astype(np.uint8))


NONE = {
    "text": (lambda path: path.write_text("a digit: 7"), "is no picture that can be read"),
    "empty": (lambda path: path.touch(), "is no picture that can be read"),
    "cut off": (lambda path: drawn(7).save(path) or path.write_bytes(path.read_bytes()[:500]), "is no picture that"),
    "missing": (lambda path: None, "is not there"),
    "an empty folder": (lambda path: path.mkdir(), "There are no pictures in the folder"),
    "one colour": (lambda path: Image.new("L", (50, 50), 200).save(path), "shows nothing"),
    "one pixel": (lambda path: Image.new("L", (1, 1), 200).save(path), "shows nothing"),
    "light alone": (lambda path: Image.linear_gradient("L").save(path), "shows nothing"),
    "noise": (lambda path: grain().save(path), "shows nothing"),
}


@pytest.mark.parametrize(("make", "why"), NONE.values(), ids=NONE)
def test_what_is_no_picture_is_one_sentence(
    make: Any, why: str, digits_run: Path, predict: Any, tmp_path: Path
) -> None:
    drawn(3).save(tmp_path / "three.png")
    path = tmp_path / "seven.png"
    make(path)
    status, out, err = predict(digits_run, tmp_path / "three.png", path)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert str(path) in err
    assert why in err


def test_a_picture_is_read_as_it_was_held(tmp_path: Path) -> None:
    """Cameras turn the picture by a note in the file."""
    upright = seen(drawn(4), tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    drawn(4).rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    assert torch.allclose(pictures.read(tmp_path / "turned.png", GREY, 20)[0], upright, atol=0.02)


@pytest.mark.parametrize("output", [torch.zeros(1, 1), torch.zeros(1), torch.zeros(1, 3, 28, 28), {"logits": 0}])
def test_a_model_that_tells_no_classes_apart_is_refused(output: Any) -> None:
    with pytest.raises(RequestError, match="is no classifier"):
        ask(lambda batch: output, [torch.zeros(GREY)])


def test_probabilities_are_taken_as_they_are_and_logits_made_into_them() -> None:
    chances, logits = torch.tensor([[0.25, 0.75]]), torch.tensor([[0.25, 0.75]]).log() + 3
    for output in (chances, logits):
        (row,) = ask(lambda batch, output=output: output, [torch.zeros(GREY)])
        assert row == pytest.approx([0.25, 0.75])
