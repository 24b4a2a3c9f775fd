"""The pictures of `repa analyze`."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from ...data.storage.files import write_file
from ...trainer.evaluation.tokens import principal_components

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from torch import Tensor

_SIDE = 1.7
_MOST_HEADS = 12


def draw_components(
    rows: NDArray[np.int64],
    images: NDArray[np.uint8] | None,
    teachers: Mapping[str, tuple[Tensor, tuple[int, int]]],
    path: Path,
) -> None:
    """Draw the first three principal components of tokens as red, green and blue, beside the images.

    The components are those of all drawn images together, so that a colour means the same in each.

    Args:
        rows: of the cache.
        images: uint8 ``[B, R, R, 3]``, or None.
        teachers: name → tokens ``[B, T, D]`` and their grid.
        path: of the PNG file.
    """
    columns = [*(["image, decoded"] if images is not None else []), *teachers]
    figure, axes = _grid(len(rows), len(columns))
    start = 0 if images is None else 1
    for line in range(len(rows)):
        if images is not None:
            axes[line][0].imshow(images[line])
        axes[line][0].set_ylabel(f"row {rows[line]}", fontsize=8)
    for column, (tokens, grid) in enumerate(teachers.values(), start=start):
        values = principal_components(tokens).of(tokens).cpu().numpy()
        low, high = np.quantile(values, (0.01, 0.99), axis=(0, 1))
        colours = ((values - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
        colours = np.pad(colours, ((0, 0), (0, 0), (0, 3 - colours.shape[-1])))
        for line in range(len(rows)):
            axes[line][column].imshow(colours[line].reshape(*grid, 3), interpolation="nearest")
    for column, name in enumerate(columns):
        axes[0][column].set_title(name, fontsize=9)
    _save(figure, path)


def draw_attention(
    rows: NDArray[np.int64],
    images: NDArray[np.uint8] | None,
    maps: Tensor,
    grid: tuple[int, int],
    title: str,
    path: Path,
) -> None:
    """Draw where the token that gets most attention looks, and what all look at, beside the images.

    Args:
        rows: of the cache.
        images: uint8 ``[B, R, R, 3]``, or None.
        maps: attention ``[B, H, T, T]`` of one block.
        grid: rows and columns of the tokens.
        title: of the picture.
        path: of the PNG file.
    """
    heads = min(maps.shape[1], _MOST_HEADS)
    names = [*(["image, decoded"] if images is not None else []), "attention received"]
    names += [f"head {head + 1}" for head in range(heads)]
    figure, axes = _grid(len(rows), len(names))
    figure.suptitle(title, fontsize=10)
    received = maps.mean(dim=(1, 2)).cpu()  # [B, T]
    for line in range(len(rows)):
        token = int(received[line].argmax())
        down, across = divmod(token, grid[1])
        shown = [received[line], *(maps[line, head, token].cpu() for head in range(heads))]
        first = len(names) - len(shown)
        if images is not None:
            axes[line][0].imshow(images[line])
            side = images.shape[1] / grid[0], images.shape[2] / grid[1]
            _mark(axes[line][0], (across + 0.5) * side[1] - 0.5, (down + 0.5) * side[0] - 0.5)
        axes[line][0].set_ylabel(f"row {rows[line]}", fontsize=8)
        for column, values in enumerate(shown, start=first):
            axes[line][column].imshow(values.reshape(grid).numpy(), cmap="magma", interpolation="nearest")
            _mark(axes[line][column], across, down)
    for column, name in enumerate(names):
        axes[0][column].set_title(name, fontsize=9)
    _save(figure, path)


def draw_decoded(
    rows: NDArray[np.int64],
    real: NDArray[np.uint8],
    made: NDArray[np.uint8],
    psnr: NDArray[np.float64],
    path: Path,
) -> None:
    """Draw images beside what their latents decode to, and eight times the difference.

    Args:
        rows: of the cache.
        real: the images uint8 ``[B, R, R, 3]``.
        made: decoded, the same.
        psnr: in dB ``[B]``.
        path: of the PNG file.
    """
    figure, axes = _grid(len(rows), 3)
    for line in range(len(rows)):
        difference = (8 * np.abs(real[line].astype(int) - made[line])).clip(0, 255).astype(np.uint8)
        for column, image in enumerate((real[line], made[line], difference)):
            axes[line][column].imshow(image)
        axes[line][0].set_ylabel(f"row {rows[line]}\n{psnr[line]:.1f} dB", fontsize=8)
    for column, name in enumerate(("image", "decoded", "difference × 8")):
        axes[0][column].set_title(name, fontsize=9)
    _save(figure, path)


def draw_blocks(times: Mapping[str, Mapping[str, Any]], teachers: Sequence[str], path: Path) -> None:
    """Draw what each block of a run holds, a line for each time and teacher.

    Args:
        times: time → block → numbers, as in the document.
        teachers: whose alignment is drawn.
        path: of the PNG file.
    """
    measures = [
        *((f"CKNNA with {teacher}", "cknna", teacher) for teacher in teachers),
        ("accuracy of a linear probe", "probe", None),
        ("norm of a token", "norm", None),
    ]
    plt = _pyplot()
    figure, axes = plt.subplots(
        1, len(measures), figsize=(4.2 * len(measures), 3.2), layout="constrained", squeeze=False
    )
    for each, (title, key, teacher) in zip(axes[0], measures, strict=True):
        for time, blocks in times.items():
            numbers = [of[key] if teacher is None else of[key][teacher] for of in blocks.values()]
            if None not in numbers:
                each.plot([int(block) for block in blocks], numbers, marker="o", label=f"t = {time}")
        each.set_title(title, fontsize=10)
        each.set_xlabel("block")
        each.xaxis.get_major_locator().set_params(integer=True)
        each.grid(visible=True, alpha=0.3)
        if each.lines:
            each.legend()
    _save(figure, path)


def _mark(axes: Axes, x: float, y: float) -> None:
    axes.plot([x], [y], marker="x", color="white", markersize=6, markeredgewidth=2.5)
    axes.plot([x], [y], marker="x", color="black", markersize=5, markeredgewidth=1)


def _grid(rows: int, columns: int) -> tuple[Figure, Any]:
    plt = _pyplot()
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(_SIDE * columns + 0.5, _SIDE * rows + 0.5),
        layout="constrained",
        squeeze=False,
    )
    for each in axes.flat:
        each.set_xticks([])
        each.set_yticks([])
    return figure, axes


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def _save(figure: Figure, path: Path) -> None:
    image = BytesIO()
    figure.savefig(image, dpi=110, format="png")
    _pyplot().close(figure)
    write_file(path, image.getvalue(), path.parent)
