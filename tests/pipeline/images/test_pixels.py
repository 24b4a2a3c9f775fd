"""The crop, bit for bit; the models' value ranges; decoding in other processes."""

from __future__ import annotations

import math
import multiprocessing
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from repa.data.errors import RepaError
from repa.pipeline.images.base import UndecodableImage
from repa.pipeline.images.decode import decode_image
from repa.pipeline.images.folder import FolderImages
from repa.pipeline.images.pixels import center_crop_adm, to_autoencoder_input, to_pixels, to_teacher_input
from repa.pipeline.images.workers import decode_row, decode_rows

PRECISION = 22  # bits of the fixed-point weights with which Pillow resamples bytes


def box(x: float) -> float:
    return 1.0 if -0.5 < x <= 0.5 else 0.0


def bicubic(x: float) -> float:
    a, x = -0.5, abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


def weights(size: int, new_size: int, kernel: object, support: float) -> np.ndarray:
    """Fixed-point weights [new_size, size] of a resampling, whole numbers in float64."""
    scale = size / new_size
    stretch = max(scale, 1.0)
    result = np.zeros((new_size, size))
    for row in range(new_size):
        centre = (row + 0.5) * scale
        first = max(int(centre - support * stretch + 0.5), 0)
        last = min(int(centre + support * stretch + 0.5), size)
        values = [kernel((x - centre + 0.5) / stretch) for x in range(first, last)]  # type: ignore[operator]
        total = sum(values)
        for x, value in zip(range(first, last), values, strict=True):
            fixed = value / total * (1 << PRECISION)
            result[row, x] = math.trunc(fixed + math.copysign(0.5, fixed))
    return result


def resample(pixels: np.ndarray, width: int, height: int, kernel: object, support: float) -> np.ndarray:
    """Two passes, columns first, bytes in between, without Pillow."""
    for axis, new_size in ((1, width), (0, height)):
        size = pixels.shape[axis]
        if size == new_size:
            continue
        moved = np.moveaxis(pixels, axis, 0).astype(np.float64)  # sums stay below 2**53: exact
        total = np.tensordot(weights(size, new_size, kernel, support), moved, axes=1) + (1 << (PRECISION - 1))
        pixels = np.moveaxis(np.clip(np.floor(total / (1 << PRECISION)), 0, 255), 0, axis).astype(np.uint8)
    return pixels


def reference_crop(pixels: np.ndarray, size: int) -> np.ndarray:
    """The crop of ADM on an array [H, W, 3], without Pillow."""
    while min(pixels.shape[:2]) >= 2 * size:
        pixels = resample(pixels, pixels.shape[1] // 2, pixels.shape[0] // 2, box, 0.5)
    scale = size / min(pixels.shape[:2])
    pixels = resample(pixels, round(pixels.shape[1] * scale), round(pixels.shape[0] * scale), bicubic, 2.0)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [
        (64, 64, 64),  # nothing to do
        (65, 64, 64),  # a margin of one pixel
        (127, 191, 64),  # just under twice the size: no halving
        (128, 128, 64),  # halved to the size exactly
        (129, 203, 64),  # halved with an odd side cut
        (517, 261, 64),  # halved twice
        (1023, 700, 40),
        (31, 47, 64),  # smaller than the crop: enlarged
        (1, 3, 16),
        (100, 37, 24),
    ],
)
def test_the_crop_is_adms_bit_for_bit(width: int, height: int, size: int) -> None:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    crop = center_crop_adm(Image.fromarray(pixels), size)
    assert crop.dtype == np.uint8
    assert np.array_equal(crop, reference_crop(pixels, size))


@pytest.mark.parametrize("size", [256, 64])
def test_the_crop_of_real_images_bit_for_bit(shared: Path, size: int) -> None:
    source = FolderImages(shared / "imagenet-sample", limit=8)
    assert len(source) == 8
    for row in range(len(source)):
        image = source.load(row)
        assert np.array_equal(center_crop_adm(image, size), reference_crop(np.asarray(image), size))
        planes = decode_row(source, row, size)
        assert np.array_equal(planes, center_crop_adm(image, size).transpose(2, 0, 1))


def test_a_sliver_is_not_enlarged_to_gigabytes() -> None:
    with pytest.raises(UndecodableImage, match="2x40000 pixels: too elongated to crop to 256"):
        center_crop_adm(Image.new("RGB", (2, 40000)), 256)


def test_autoencoder_range_and_back() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    values = to_autoencoder_input(every)
    assert values.dtype == torch.float32
    assert torch.equal(values[0, 0].flatten(), torch.arange(256) / 127.5 - 1)
    assert (to_pixels(values).int() - every.int()).abs().max() <= 1  # the fraction is cut, not rounded
    overshoot = torch.tensor([-1.7, -1.0, 0.0, 1.0, 2.0]).view(1, 1, 1, 5)
    assert to_pixels(overshoot).flatten().tolist() == [0, 0, 127, 255, 255]


def test_teacher_input_is_normalised_then_scaled() -> None:
    from torchvision.transforms import Normalize

    mean, std = (0.48, 0.45, 0.40), (0.26, 0.25, 0.27)
    images = torch.randint(
        0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    normalised = Normalize(mean, std)(images / 255.0)
    assert torch.equal(to_teacher_input(images, 32, mean, std), normalised)
    expected = torch.nn.functional.interpolate(normalised, 28, mode="bicubic")
    assert torch.equal(to_teacher_input(images, 28, mean, std), expected)
    tensors = torch.tensor(mean), torch.tensor(std)
    assert torch.equal(to_teacher_input(images, 28, *tensors), expected)


def test_bicubic_without_antialias_against_the_formula() -> None:
    """Output x reads input (x + ½)·s − ½ with Keys' kernel, a = −0.75, edges repeated."""
    images = torch.randint(
        0, 256, (1, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )

    def keys(x: float) -> float:
        a, x = -0.75, abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    matrix = torch.zeros(14, 16, dtype=torch.float64)
    for row in range(14):
        centre = (row + 0.5) * 16 / 14 - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[row, min(max(tap, 0), 15)] += keys(centre - tap)
    expected = matrix @ (images.double() / 255 - 0.5) / 0.25 @ matrix.T
    actual = to_teacher_input(images, 14, (0.5,) * 3, (0.25,) * 3)
    assert torch.allclose(actual.double(), expected, atol=1e-5)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> FolderImages:
    """Twelve images, of which row 4 is empty and row 7 truncated."""
    root = tmp_path_factory.mktemp("mixed")
    generator = np.random.default_rng(0)
    for row in range(12):
        stream = BytesIO()
        Image.fromarray(generator.integers(0, 256, (40 + row, 50, 3), dtype=np.uint8)).save(stream, "JPEG")
        content = {4: b"", 7: stream.getvalue()[:800]}.get(row, stream.getvalue())
        (root / f"{row:02d}.jpg").write_bytes(content)
    return FolderImages(root)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_rows_come_in_order_whoever_decodes_them(mixed: FolderImages, workers: int) -> None:
    rows = [3, 4, 5, 6, 7, 11, 0]
    before = torch.random.get_rng_state()
    with decode_rows(mixed, rows, 32, workers) as decoded:
        result = list(decoded)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [row for row, _ in result] == rows
    for row, pixels in result:
        if row in (4, 7):
            assert isinstance(pixels, str)
            assert ("empty file" if row == 4 else "truncated") in pixels
        else:
            content = (mixed.root / mixed.keys[row]).read_bytes()
            expected = center_crop_adm(decode_image(content), 32).transpose(2, 0, 1)
            assert isinstance(pixels, np.ndarray)
            assert pixels.flags.c_contiguous
            assert np.array_equal(pixels, expected)


def test_no_rows_is_no_rows(mixed: FolderImages) -> None:
    with decode_rows(mixed, [], 32, 0) as decoded:
        assert list(decoded) == []
    with decode_rows(mixed, [], 32, 1) as decoded:
        assert list(decoded) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_file_stops_with_a_plain_message(tmp_path: Path, workers: int) -> None:
    for row in range(3):
        Image.new("RGB", (40, 40)).save(tmp_path / f"{row}.png")
    source = FolderImages(tmp_path)
    (tmp_path / "1.png").unlink()
    with decode_rows(source, range(3), 32, workers) as decoded:
        assert next(decoded)[0] == 0
        with pytest.raises(RepaError) as error:
            next(decoded)
        for process in multiprocessing.active_children():  # the loader waits five seconds for them
            process.join(600)
            assert not process.is_alive()
    assert str(error.value) == (
        f"image {tmp_path / '1.png'} has vanished since the folder was listed; run the same command again"
    )


def test_leaving_early_ends_the_workers(mixed: FolderImages) -> None:
    with decode_rows(mixed, range(12), 32, 2) as decoded:
        assert next(decoded)[0] == 0
        processes = multiprocessing.active_children()
        assert len(processes) == 2
    for process in processes:
        process.join(600)
        assert not process.is_alive()


SCRIPT = """
import multiprocessing, sys, time
from repa.pipeline.images.folder import FolderImages
from repa.pipeline.images.workers import decode_rows

if __name__ == "__main__":
    with decode_rows(FolderImages(sys.argv[1]), [0] * 10_000, 32, 2) as decoded:
        next(decoded)
        print(*(process.pid for process in multiprocessing.active_children()), flush=True)
        time.sleep(300)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_killed_parent_leaves_no_worker(mixed: FolderImages, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with subprocess.Popen([sys.executable, script, mixed.root], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert len(workers) == 2
        process.kill()
        deadline = time.monotonic() + 600
        while any(map(lives, workers)):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def lives(pid: int) -> bool:
    """Is a process there, and not ended already with nobody who asks how?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(("resolution", "workers"), [(32, 1), (256, 1), (256, 2)])
def test_a_killed_worker_is_one_line(mixed: FolderImages, resolution: int, workers: int) -> None:
    with decode_rows(mixed, [0, 1] * 400, resolution, workers) as decoded:
        next(decoded)
        processes = multiprocessing.active_children()
        assert len(processes) == workers
        # images of 256² are more than a pipe holds: by then it is in the middle of one
        time.sleep(0.5)
        processes[0].kill()
        with pytest.raises(RepaError, match="a decoding process was ended from outside"):
            list(decoded)
