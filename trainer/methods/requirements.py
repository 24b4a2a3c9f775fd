"""What a method may need of cache, backbone and settings, and what is said when it is not there.

A method declares its needs in `Method.requires`, in the order in which they are reported, and phrases no
refusal itself. Settings are named as in its class of settings; their values are the preset's where nobody
set them. A new need is one class here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...data.format.columns import AUTOENCODER, model_of, scale_column, source_of
from ...data.format.factor_layout import attention_axes
from ...data.units import counted
from .alignment import teachers_with
from .base import Problem, Requirement
from .remedies import teacher_added
from .settings_needs import (
    AlignsFirst,
    Deeper,
    DepthWithin,
    HasPreset,
    NoGroupEmpty,
    Paired,
    SameTokens,
    TakesEffect,
    Where,
    blocks_of,
    listed,
    ranges,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from .base import Method

__all__ = [
    "AlignsFirst",
    "Deeper",
    "DepthWithin",
    "GridDivides",
    "HasPreset",
    "HeadsFit",
    "NeedsColumn",
    "NoGroupEmpty",
    "OtherGrid",
    "Paired",
    "SameGrid",
    "SameTokens",
    "SameWidth",
    "StoredAttention",
    "TakesEffect",
    "Where",
]


class NeedsColumn(Requirement):
    """Need targets of a teacher, chosen by the setting ``encoders`` or the cache's only one.

    Args:
        kinds: kinds of the columns that each teacher must have, as ``patch``.
    """

    def __init__(self, *kinds: str) -> None:
        self._kinds = kinds

    def problems(self, method: Method) -> Iterator[Problem]:
        """Report a teacher that is missing, named twice, or not chosen among several."""
        field, asked = "method.encoders", method.config.encoders
        present = teachers_with(method.specs, *self._kinds)
        if not asked and not present:
            yield Problem(
                what=f"the cache has no teacher with a {' and a '.join(self._kinds)} column (it has "
                f"{', '.join(method.specs) or 'none'})",
                remedy=teacher_added("one", "--encoder dinov2-b", method.notes),
                field=field,
            )
        elif not asked and len(present) > 1:
            yield Problem(
                what=f"the cache has {len(present)} teachers ({', '.join(present)}) and none was chosen",
                remedy=f"choose with `--set {field}=[{present[0]}]`; several are averaged",
                field=field,
            )
        for name in dict.fromkeys(asked):
            for column in (f"{name}/{kind}" for kind in self._kinds):
                if column not in method.specs:
                    yield Problem(
                        what=f"the cache has no column {column} (teachers it has: "
                        f"{', '.join(present) or 'none'})",
                        remedy=teacher_added("it", f"--encoder {name}", method.notes),
                        field=field,
                    )
        if len(set(asked)) < len(asked):
            yield Problem(
                what=f"{field} names a teacher twice ({', '.join(asked)})",
                remedy="name each once",
                field=field,
            )


class SameGrid(Requirement):
    """Need targets that lie on the grid of the backbone's tokens.

    Args:
        blocks: kind of the columns, whose last axis but one is their tokens → name of the setting that says
            with which blocks they are compared.
    """

    def __init__(self, **blocks: str) -> None:
        self._blocks = blocks

    def problems(self, method: Method) -> Iterator[Problem]:
        """Report columns on another grid, once for all that lie on one grid of one teacher."""
        reported = set()
        for kind, setting in self._blocks.items():
            grids = [
                method.backbone.grid_of(block)
                for block in blocks_of(method, setting)
                if method.backbone.has_block(block)
            ]
            for column in _columns(method, kind):
                for grid in dict.fromkeys(grids):
                    fault = (column.partition("/")[0], _tokens(method, column), _grid(method, column), grid)
                    if fault not in reported:
                        reported.add(fault)
                        yield from self._compare(method, column, grid, setting)

    def fits(self, teacher: tuple[int, int], student: tuple[int, int]) -> bool:
        """Return whether tokens on these two grids can be compared."""
        return teacher == student

    def _compare(self, method: Method, column: str, grid: tuple[int, int], setting: str) -> Iterator[Problem]:
        rows, columns = _grid(method, column)
        tokens = _tokens(method, column)
        if tokens is None:
            # of factors that are not described: `StoredAttention` says so
            return
        if rows * columns != tokens:
            yield Problem(
                what=f"{column} has {counted(tokens, 'token')} a row, its grid {rows}×{columns} has "
                f"{rows * columns}",
                remedy=f"the cache's manifest is damaged: write {source_of(column)} again",
                field=column,
            )
        elif not self.fits((rows, columns), grid):
            named = [each for each in blocks_of(method, setting) if method.backbone.has_block(each)]
            here = [each for each in named if method.backbone.grid_of(each) == grid]
            where = f" in block {listed(here)}" if method.backbone.blocks else ""
            yield Problem(
                what=f"{column} has a {rows}×{columns} grid, the backbone {grid[0]}×{grid[1]} tokens{where}",
                remedy=self._blocks_remedy(method, (rows, columns), setting)
                or _grid_remedy(method, (rows, columns), grid),
                field=column,
            )

    def _blocks_remedy(self, method: Method, teacher: tuple[int, int], setting: str) -> str:
        """Name the blocks that fit, where the backbone's grids differ, or nothing."""
        backbone = method.backbone
        blocks = [
            block for block in range(1, backbone.depth + 1) if self.fits(teacher, backbone.grid_of(block))
        ]
        if not backbone.blocks or not blocks:
            return ""
        return f"choose of blocks {ranges(blocks)}, whose grid fits, with `--set method.{setting}=…`"


class GridDivides(SameGrid):
    """Need targets on a grid whose sides are one whole multiple of those of the backbone's tokens.

    Args:
        blocks: as of `SameGrid`.
    """

    def fits(self, teacher: tuple[int, int], student: tuple[int, int]) -> bool:
        """Return whether the student's tokens, up-sampled by a whole factor, lie on the teacher's grid."""
        factor = teacher[0] // student[0]
        return factor > 0 and teacher == (factor * student[0], factor * student[1])


class OtherGrid(Requirement):
    """Need tokens and targets on different grids where a setting says how the one is brought to the other.

    Args:
        setting: its name; at its default it is left alone.
        blocks: as of `SameGrid`.
    """

    def __init__(self, setting: str, **blocks: str) -> None:
        self._setting, self._blocks = setting, blocks

    def problems(self, method: Method) -> Iterator[Problem]:
        """Report a setting that is no default where all grids are alike."""
        default = getattr(method.config_class(), self._setting)
        value = getattr(method.asked, self._setting)
        theirs = {_grid(method, column) for kind in self._blocks for column in _columns(method, kind)}
        blocks = [block for name in self._blocks.values() for block in blocks_of(method, name)]
        mine = {method.backbone.grid_of(block) for block in blocks if method.backbone.has_block(block)}
        if value != default and len(mine) == 1 and mine == theirs:
            yield Problem(
                what=f"method.{self._setting}={value} has no effect: the backbone's tokens lie on the "
                "teacher's grid",
                remedy=f"leave it at {default}",
                field=f"method.{self._setting}",
            )


class SameWidth(Requirement):
    """Need columns of a teacher that have equally many channels, as one projector is compared with them.

    Args:
        kinds: kinds of the columns, whose last axis is their channels.
    """

    def __init__(self, *kinds: str) -> None:
        self._kinds = kinds

    def problems(self, method: Method) -> Iterator[Problem]:
        """Report each column with other channels than the teacher's first."""
        first, *others = self._kinds
        for column in _columns(method, first):
            teacher, channels = column.partition("/")[0], method.specs[column].shape[-1]
            for name in (f"{teacher}/{kind}" for kind in others):
                if name in method.specs and method.specs[name].shape[-1] != channels:
                    yield Problem(
                        what=f"{name} has {counted(method.specs[name].shape[-1], 'channel')}, {column} "
                        f"{channels}: one projector is compared with both",
                        remedy="choose another teacher with `--set method.encoders=[…]`",
                        field=name,
                    )


class HeadsFit(Requirement):
    """Need a head of the student for each of the teacher's.

    Args:
        kind: kind of the teacher's column, of queries or keys.
        blocks: name of the setting that says with which blocks it is compared.
    """

    def __init__(self, kind: str, blocks: str) -> None:
        self._kind, self._blocks = kind, blocks

    def problems(self, method: Method) -> Iterator[Problem]:
        """Report a teacher with more heads than the student has."""
        blocks = [block for block in blocks_of(method, self._blocks) if method.backbone.has_block(block)]
        if not blocks:
            return
        mine = min(method.backbone.heads_of(block) for block in blocks)
        for column in _columns(method, self._kind):
            teacher, axes = column.partition("/")[0], _axes(method, column)
            heads = 0 if axes is None else axes[1]
            if heads > mine:
                yield Problem(
                    what=f"{teacher} has {heads} attention heads, the backbone {mine}: each of the "
                    "teacher's needs one",
                    remedy=f"use a --model with at least {heads} heads, or an encoder with at most {mine}",
                    field=column,
                )


class StoredAttention(Requirement):
    """Need queries and keys of a teacher's blocks, read as columns of the kinds q and k.

    Args:
        blocks: name of the setting that says which of the teacher's blocks.
        teacher_depth: attribute of the presets that says how many blocks the teacher has whose blocks they
            name.
    """

    def __init__(self, blocks: str, *, teacher_depth: str) -> None:
        self._blocks, self._teacher_depth = blocks, teacher_depth

    def problems(self, method: Method) -> Iterator[Problem]:
        """Report what is not in the cache, or is not described there, or is of another teacher than meant."""
        for teacher in _teachers_read(method, "q"):
            names = f"{teacher}/q", f"{teacher}/k"
            missing = [name for name in names if name not in method.specs]
            if missing:
                blocks = listed(blocks_of(method, self._blocks), ",") or "haste"
                yield Problem(
                    what=f"the cache has no attention targets of {teacher} ({', '.join(missing)})",
                    remedy=teacher_added("them", f"--encoder {teacher} --attention {blocks}", method.notes),
                    field=missing[0],
                )
                continue
            source = source_of(names[0])
            noted = method.notes.get(source, {})
            if not _describes(noted, [_axes(method, name) for name in names]):
                yield Problem(
                    what=f"the manifest does not say of {source} which blocks and logits {names[0]} and "
                    f"{names[1]} hold",
                    remedy=f"the cache's manifest is damaged: write {source} again",
                    field=names[0],
                )
                continue
            yield from self._stored(method, teacher, noted["blocks"], noted.get("depth"))

    def _stored(
        self, method: Method, teacher: str, stored: Sequence[int], depth: int | None
    ) -> Iterator[Problem]:
        """Report blocks that are absent, or of a teacher of another depth than the preset is for."""
        setting = f"method.{self._blocks}"
        preset = method.preset_of(method.backbone)
        for_depth = getattr(preset, self._teacher_depth, None)
        absent = [block for block in blocks_of(method, self._blocks) if block not in stored]
        if preset and not getattr(method.asked, self._blocks) and depth not in (None, for_depth):
            yield Problem(
                what=f"{teacher} has {counted(depth or 0, 'block')}, the preset of "
                f"{method.backbone.size_name} is for a teacher of {for_depth}",
                remedy=f"choose of the cached blocks {listed(stored)} with `--set {setting}=[…]`",
                field=setting,
            )
        elif absent:
            blocks = listed(blocks_of(method, self._blocks), ",")
            yield Problem(
                what=f"the cache has the attention of blocks {listed(stored)} of {teacher}, not of "
                f"{listed(absent)}",
                remedy=f"choose of those with `--set {setting}=[…]`, or write another cache with "
                f"`repa preprocess --encoder {teacher} --attention {blocks}`",
                field=setting,
            )


def _read(method: Method, kind: str) -> list[str]:
    """Return the columns of a kind that the losses read in some phase, in the cache or not."""
    names = (column for phase in method.phases() for column in method.columns(phase))
    return [name for name in dict.fromkeys(names) if name.rpartition("/")[2] == kind]


def _columns(method: Method, kind: str) -> list[str]:
    return [name for name in _read(method, kind) if name in method.specs]


def _teachers_read(method: Method, kind: str) -> list[str]:
    return [name.rpartition("/")[0] for name in _read(method, kind)]


def _grid(method: Method, column: str) -> tuple[int, int]:
    return method.grids[source_of(column)]


def _axes(method: Method, column: str) -> tuple[int, int, int] | None:
    """Return blocks, heads and tokens of stored queries or keys, None where the manifest does not say."""
    scales = method.specs.get(scale_column(column))
    return attention_axes(
        method.specs[column].shape,
        method.notes.get(source_of(column), {}),
        None if scales is None else scales.shape,
    )


def _tokens(method: Method, column: str) -> int | None:
    """Return the tokens of a row of a column, None where the manifest does not say."""
    shape = method.specs[column].shape
    if len(shape) > 1:
        return shape[-2]
    axes = _axes(method, column)
    return None if axes is None else axes[2]


def _describes(noted: Mapping[str, Any], axes: Sequence[tuple[int, int, int] | None]) -> bool:
    """Return whether what the manifest notes of attention fits the rows of queries and keys."""
    blocks, scale = noted.get("blocks"), noted.get("logit_scale")
    if not isinstance(blocks, list | tuple) or not isinstance(scale, float | int):
        return False
    return axes[0] is not None and axes[0] == axes[1] and axes[0][0] == len(blocks)


def _grid_remedy(method: Method, teacher: tuple[int, int], student: tuple[int, int]) -> str:
    """Name the model that has the teacher's grid, or the teachers that have the backbone's."""
    remedies = [f"--model {name}" for grid, name in method.backbone.siblings if grid == teacher]
    remedies += [
        f"--set method.encoders=[{name}], whose grid fits"
        for name, grid in method.grids.items()
        if grid == student and name != AUTOENCODER and name == model_of(name)
    ]
    if remedies:
        return "use " + ", or ".join(remedies)
    return (
        f"no model of this size fits it: add an encoder whose grid is {student[0]}×{student[1]} with "
        "`repa preprocess --encoder`"
    )
