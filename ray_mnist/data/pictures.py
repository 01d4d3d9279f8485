"""People's own pictures, photographed or drawn, made into images as the data sets have them."""

from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy import ndimage

from ray_mnist.errors import RequestError, one_line

Floats = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]

WORKING_SIZE = 256  # pixels that the longer side of a picture is reduced to: strokes are wider than a pixel then
STROKE = 2  # pixels that the strokes of MNIST's digits are wide, the thin ones


def find(paths: list[str]) -> list[Path]:
    """The pictures that these name: files as they are, folders for the pictures in them, by name.

    Raises:
        RequestError: one of them is not there, or a folder has no picture.
    """
    return [file for path in paths for file in _pictures_in(Path(path).expanduser())]


def _pictures_in(path: Path) -> Iterator[Path]:
    if not path.exists():
        raise RequestError(f"{path} is not there: name a picture, or a folder of pictures.")
    if not path.is_dir():
        yield path
        return
    suffixes = Image.registered_extensions()
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in suffixes)
    if not found:
        raise RequestError(f"There are no pictures in the folder {path}.")
    yield from found


def read(source: Path | IO[bytes], shape: tuple[int, int, int], box: int) -> torch.Tensor:
    """The picture as a data set would have it.

    Args:
        source: a picture of any size that Pillow reads.
        shape: (C, H, W) to have. With one channel it is bright on black, whichever the picture was, and nothing but
            what was drawn, its centre of mass in the middle; with three the middle of the picture as it is.
        box: how many pixels the longer side of what was drawn is to have.

    Returns:
        float32 (C, H, W) in [0, 1].

    Raises:
        RequestError: it is no picture, or nothing can be seen on it.
    """
    channels, height, width = shape
    name = source if isinstance(source, Path) else "What was sent"
    try:
        with Image.open(source) as file:
            picture = ImageOps.exif_transpose(file).convert("RGBA")
    except UnidentifiedImageError as error:
        raise RequestError(f"{name} is no picture that can be read: no format is known that begins so.") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RequestError(f"{name} is no picture that can be read: {one_line(error)}") from error
    if channels == 3:
        fitted = ImageOps.fit(picture.convert("RGB"), (width, height))
        return torch.from_numpy(np.asarray(fitted, np.float32).transpose(2, 0, 1) / 255)
    drawn = drawing(picture)
    if drawn is None:
        raise RequestError(f"{name} shows nothing: what is drawn must stand out from its background.")
    return torch.from_numpy(centred(*drawn, (height, width), box)).expand(channels, -1, -1)


def drawing(picture: Image.Image) -> tuple[Floats, Mask] | None:
    """How much of each pixel is drawn on, of 0 to 1, and which pixels are; None where nothing is drawn."""
    picture.thumbnail((WORKING_SIZE, WORKING_SIZE))
    alpha = np.asarray(picture.getchannel("A"), np.float32) / 255
    on_canvas = alpha[_rim(alpha.shape)].mean() < 0.5  # of a drawing program
    grey = alpha if on_canvas else np.asarray(picture.convert("L"), np.float32) / 255
    rest = grey - background(grey)
    rest = ndimage.gaussian_filter(rest, max(rest.shape) / WORKING_SIZE)  # the grain of a camera
    rest *= np.sign((rest**3).sum())  # whether darker or brighter, what was drawn stands out
    ink = rest.clip(0)
    mask = ink > otsu(ink)
    if not mask.any() or mask.all():
        return None
    contrast = ink[mask].mean() - ink[~mask].mean()
    if contrast < max(0.08, 3 * rest[~mask].std()):
        return None
    mask = without_specks(mask)
    near = ndimage.binary_dilation(mask, np.ones((3, 3)))
    return np.where(near, ink / np.median(ink[mask]), 0).clip(0, 1).astype(np.float32), mask


def without_specks(mask: Mask) -> Mask:
    """The parts larger than a tenth of the largest, without those at the edge, as a table is, if others remain."""
    parts, count = ndimage.label(mask, np.ones((3, 3)))
    sizes = np.bincount(parts.flat, minlength=count + 1)
    sizes[0] = 0
    inside = sizes.copy()
    inside[np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]])] = 0
    kept: Mask = ((inside if inside.max() > sizes.max() / 10 else sizes) > sizes.max() / 10)[parts]
    return kept


def background(grey: Floats) -> Floats:
    """The light on the paper, which changes slowly: a quadratic surface through the pixels that are not drawn on."""
    y, x = np.meshgrid(*(np.linspace(-1, 1, size) for size in grey.shape), indexing="ij")
    terms = np.stack([np.ones_like(x), x, y, x * y, x * x, y * y], axis=-1)
    bare = _rim(grey.shape)
    surface = np.full_like(grey, np.median(grey[bare]))
    for _ in range(8):
        far = np.abs(grey - surface)
        bare = far <= max(0.03, 3 * np.median(far[bare]))
        surface = terms @ np.linalg.lstsq(terms[bare], grey[bare], rcond=None)[0]
    return surface


def _rim(shape: tuple[int, ...]) -> Mask:
    """The outer tenth of a picture."""
    rim = np.ones(shape, bool)
    rim[tuple(slice(1 + size // 10, -1 - size // 10) for size in shape)] = False
    return rim


def otsu(values: Floats) -> float:
    """The threshold between two groups of values that are each as alike as can be (Otsu 1979)."""
    counts, edges = np.histogram(values, 128)
    middles = (edges[1:] + edges[:-1]) / 2
    below, above = counts.cumsum(), counts.sum() - counts.cumsum()
    sums = (counts * middles).cumsum()
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(edges[1 + np.nan_to_num(between).argmax()])


def centred(ink: Floats, mask: Mask, size: tuple[int, int], box: int) -> Floats:
    """What was drawn, as in MNIST: its longer side scaled to `box` pixels, its centre of mass in the middle.

    Returns:
        float32 (1, height, width) in [0, 1].
    """
    extent = max(np.ptp(np.nonzero(mask), axis=1) + 1)
    # Thin lines would fade as they are scaled down: of a line, the mean distance to its edge is a quarter of its width.
    thickness = 4 * ndimage.distance_transform_edt(mask)[mask].mean() - 1
    wanted = STROKE * extent / box
    if thickness < wanted:
        ink = np.maximum(ink, ndimage.distance_transform_edt(~mask) <= (wanted - thickness) / 2)
    rows, columns = (slice(each.min(), each.max() + 1) for each in np.nonzero(ink > 0.1))
    ink = ink[rows, columns]
    height, width = (max(1, round(side * box / max(ink.shape))) for side in ink.shape)
    small = np.asarray(Image.fromarray(ink).resize((width, height), Image.Resampling.BILINEAR))
    small = (small / small.max()).clip(0, 1)
    image = np.zeros((1, *size), np.float32)
    corner = [
        int(np.clip(round(whole / 2 - middle), 0, whole - side))
        for whole, side, middle in zip(size, small.shape, ndimage.center_of_mass(small), strict=True)
    ]
    image[0, corner[0] : corner[0] + height, corner[1] : corner[1] + width] = small
    return image
