"""All methods on all backbones, as the checks before step 0 see them, and the page that says so."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from repa.data.format.columns import MOMENTS, ColumnSpec
from repa.data.testing import synthetic_cache, synthetic_captions
from repa.trainer.config import build
from repa.trainer.methods import METHODS
from repa.trainer.models import registry
from repa.trainer.run.checks import check

if TYPE_CHECKING:
    from pathlib import Path

    import pytest
    from repa.trainer.config import TrainConfig
    from repa.trainer.models.base import BackboneConfig

FAMILIES = tuple(registry.BACKBONES)
ROWS = [(name, preset) for name, method in METHODS.items() for preset in ("", *method.named_presets)]
# of methods that are refused on a backbone as typed, what works there
SETTINGS = {
    ("repa", "SiT-down-B/2"): ("method.depth=5",),
    ("sra", "SiT-down-B/2"): ("method.teacher_block=12",),
    ("erw", "SiT-down-B/2"): ("method.warmup_depth=4", "method.depth=11"),
    ("erw", "SiT-down-XL/2"): ("method.depth=27",),
    ("haste", "MMDiT-24/2"): (
        "method.depth=8",
        "method.student_blocks=5,6,7",
        "method.teacher_blocks=8,10,12",
        "method.stop=100000",
    ),
    ("irepa", "MMDiT-24/2"): ("method.depth=8",),
    ("urepa", "MMDiT-24/2"): ("method.depth=8",),
    ("sra", "MMDiT-24/2"): ("method.student_block=8", "method.teacher_block=16"),
    ("sra2", "MMDiT-24/2"): ("method.depth=8",),
    ("erw", "MMDiT-24/2"): ("method.warmup_depth=4", "method.depth=8"),
}
# presets that name blocks which B has not
SIZES = {("erw", "readme"): "XL"}
OF_TEXT = frozenset(name for name, family in registry.BACKBONES.items() if family.config.takes_sequences)
TEXT = "clip-l-text/states"
BLOCKS = {"dinov2-b+attention": {"blocks": [8, 10, 12], "depth": 12}}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What one method is on one backbone.

    Attributes:
        settings: that it needs there, as of ``--set``.
        refused: why it is refused as typed, or with the settings too; empty where it is not.
        works: whether it runs, with the settings where it needs some.
    """

    settings: tuple[str, ...] = ()
    refused: str = ""
    works: bool = True

    def __str__(self) -> str:
        if not self.works:
            return "refused"
        return f"works with {' '.join(f'`{each}`' for each in self.settings)}" if self.settings else "works"


def write_declared(path: Path) -> Path:
    """Write a cache of 256² images and DINOv2-B, without a row."""
    return _write(path, rows=1, side=32, grid=16, width=768, heads=12, head_width=64, invalid={0: "none"})


def write_tiny(path: Path) -> Path:
    """Write 8 rows of a cache as small as it can be, with the same columns."""
    return _write(path, rows=8, side=8, grid=4, width=12, heads=2, head_width=8, invalid={})


def _write(
    path: Path, *, rows: int, side: int, grid: int, width: int, heads: int, head_width: int, invalid: Any
) -> Path:
    attention = ColumnSpec(shape=(3, heads, grid**2, head_width), dtype="float16")
    columns = {
        MOMENTS: ColumnSpec(shape=(8, side, side), dtype="float32"),
        "dinov2-b/patch": ColumnSpec(shape=(grid**2, width), dtype="float16"),
        "dinov2-b/cls": ColumnSpec(shape=(width,), dtype="float16"),
        "dinov2-b/q": attention,
        "dinov2-b/k": attention,
    }
    synthetic_cache(path, num_rows=rows, columns=columns, notes=BLOCKS, resolution=8 * side, invalid=invalid)
    synthetic_captions(path, columns={TEXT: ColumnSpec(shape=(77, width), dtype="float16")})
    return path


def model_of(method: str, preset: str, family: str) -> str:
    """Return the model of a family that a method is looked at on."""
    if family in OF_TEXT:
        return f"{family}-24/2"
    return f"{family}-{SIZES.get((method, preset), 'B')}/2"


def typed(method: str, preset: str, family: str, cache: Path, settings: tuple[str, ...]) -> TrainConfig:
    """Return the configuration of a method on a family's B, or the size of a preset."""
    model = model_of(method, preset, family)
    flags = {"method": method, "model": model, "cache": str(cache), "precision": "32-true"}
    chosen = (f"method.preset={preset}",) if preset else ()
    if family in OF_TEXT:
        flags["condition"] = TEXT
    return build(flags=flags, assignments=(*chosen, *settings))


def found(method: str, preset: str, family: str, declared: Path) -> Cell:
    """Return what the checks say of one method on one backbone."""
    refused = _refused(typed(method, preset, family, declared, ()))
    settings = SETTINGS.get((method, model_of(method, preset, family)), ())
    if not settings:
        return Cell(refused=refused, works=not refused)
    still = _refused(typed(method, preset, family, declared, settings))
    return Cell(settings=settings, refused=still or refused, works=not still)


def _refused(config: TrainConfig) -> str:
    with torch.device("meta"):
        problems = check(config).problems
    # there is no row to train on
    return "; ".join(each.what for each in problems if each.field != "--batch-size")


def shrink(patch: pytest.MonkeyPatch) -> None:
    """Make networks narrow and leave them as deep as they are, so that the methods' blocks stay."""
    small = {"width": 24, "heads": 2, "mlp_width": 32}
    config_of = registry.config_of

    def narrow(model: str, **settings: Any) -> BackboneConfig:
        config = config_of(model, **settings)
        names = {item.name for item in fields(config)}
        return replace(config, **{key: each for key, each in small.items() if key in names})

    patch.setattr(registry, "config_of", narrow)


_HEAD = """# Methods and backbones

What the checks before step 0 say of every method and every named preset on every backbone, for images of 256²
and the teacher DINOv2-B. A column is a family of backbones with its objective, of which B/2 is looked at. The
page is written from the registries by `pytest tests/trainer/test_methods_and_backbones.py --update-docs`. The
same tests run two steps of each method on each backbone that takes it, with networks as deep and narrow ones.
"""


def page(cells: dict[tuple[str, str, str], Cell]) -> str:
    """Return the page."""
    notes: list[str] = []
    heads = [f"{each}, `{registry.BACKBONES[each].objective}`" for each in FAMILIES]
    lines = [_HEAD, f"| method | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for method, preset in ROWS:
        row = [_name(method, preset)]
        for family in FAMILIES:
            cell = cells[method, preset, family]
            row.append(f"{cell}{_noted(cell.refused, notes)}")
        lines.append(f"| {' | '.join(row)} |")
    if notes:
        lines += ["", "Why it is refused as typed, in the words of the check:", ""]
        lines += [f"{number}. {note}" for number, note in enumerate(notes, start=1)]
    return "\n".join(lines) + "\n"


def _name(method: str, preset: str) -> str:
    link = f"[`{method}`](methods/{method}.md)"
    of_size = f", {SIZES[method, preset]}/2" if (method, preset) in SIZES else ""
    return f"{link} `method.preset={preset}`{of_size}" if preset else link


def _noted(reason: str, notes: list[str]) -> str:
    if not reason:
        return ""
    if reason not in notes:
        notes.append(reason)
    return f" ({notes.index(reason) + 1})"
