"""The reading of ``--attention``, from names and block numbers to the blocks of each teacher.

The presets are the method's, and stage 1 may not import stage 2: they meet here.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ...data.errors import RepaError
from ...pipeline.images.names import DEMO_DATA

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...trainer.methods.haste import Preset

HASTE = "haste"
DEMO_SIZE = "T"

# families differ in their blocks, and the presets are by size
_MODEL = re.compile(r"(?:[A-Za-z]+-)+([A-Z]+)(?:/\d+)?")
_BLOCKS = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")


def attention_blocks(wanted: str, encoders: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Choose the blocks of each teacher whose queries and keys are to be stored, counted from 1, ascending.

    Args:
        wanted: ``haste``, what `repa train --method haste` aligns with its default backbone (with the demo's
            teacher: SiT-T); ``haste:SiT-XL``, the same with another backbone; or block numbers: ``8,10,12``,
            ``9-12``.
        encoders: names of the teachers.

    Raises:
        RepaError: neither of these; a backbone or a teacher that the method has no preset for.
    """
    if not encoders:
        raise RepaError(
            "--attention stores the attention of a teacher",
            "give --encoder one that is not 'none'",
            field="--attention",
        )
    name, colon, model = wanted.partition(":")
    if name != HASTE or (colon and not model):
        return {encoder: _numbers(wanted, encoder) for encoder in encoders}
    return {encoder: _preset(encoder, model) for encoder in encoders}


def scaled_blocks(encoder: str) -> tuple[int, ...]:
    """Choose the blocks of a teacher where those of ``haste`` would lie at its depth.

    Args:
        encoder: name of the teacher.
    """
    from ...pipeline.encoders import find_teacher
    from ...trainer.methods.haste import PRESETS

    return _scaled(PRESETS[_size_for(encoder)], find_teacher(encoder).depth)


def _size_for(encoder: str) -> str:
    from ...trainer.config import TrainConfig

    default = TrainConfig().model
    return DEMO_SIZE if encoder == DEMO_DATA else default.removeprefix("SiT-").partition("/")[0]


def _scaled(preset: Preset, depth: int) -> tuple[int, ...]:
    return tuple(sorted({round(block * depth / preset.teacher_depth) for block in preset.teacher_blocks}))


def _numbers(wanted: str, encoder: str) -> tuple[int, ...]:
    from ...pipeline.encoders import find_teacher

    depth = find_teacher(encoder).depth
    blocks: set[int] = set()
    for part in wanted.split(","):
        match = _BLOCKS.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise RepaError(
                f"--attention {wanted!r} is unknown",
                f"give {HASTE}, {HASTE}:SiT-XL, or numbers of the teacher's blocks as 8,10,12 or 9-12",
                field="--attention",
            )
        if not 1 <= first <= last <= depth:
            # before the range is counted out: it may be longer than the memory
            raise RepaError(
                f"--attention names block {first if not 1 <= first <= depth else last} of encoder {encoder}",
                f"its blocks are 1 to {depth}",
                field="--attention",
            )
        blocks.update(range(first, last + 1))
    return tuple(sorted(blocks))


def _preset(encoder: str, model: str) -> tuple[int, ...]:
    from ...pipeline.encoders import find_teacher
    from ...trainer.methods.haste import PRESETS

    depth = find_teacher(encoder).depth
    if model:
        match = _MODEL.fullmatch(model)
        size = match[1] if match else model
    else:
        size = _size_for(encoder)
    if size not in PRESETS:
        raise RepaError(
            f"--attention {HASTE}:{model}: HASTE has presets for SiT-{', SiT-'.join(PRESETS)}",
            "give one of these, or the teacher's blocks as 8,10,12",
            field="--attention",
        )
    preset = PRESETS[size]
    if preset.teacher_depth != depth:
        raise RepaError(
            f"--attention {HASTE}: the preset of SiT-{size} is for a teacher of {preset.teacher_depth} "
            f"blocks, encoder {encoder} has {depth}",
            f"name its blocks, for example --attention {','.join(map(str, _scaled(preset, depth)))}",
            field="--attention",
        )
    return tuple(sorted(set(preset.teacher_blocks)))
