"""A teacher from outside the package at work (see `OwnTeacher`)."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from ...data.errors import RepaError
from ...data.format.manifest import Provenance
from ..images.pixels import to_teacher_input
from .precision import forward_pass
from .weights import (
    drawn_weights,
    library_versions,
    load_strictly,
    read_state_dict,
    weights_sha256,
)

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from .base import OwnTeacher


class OwnEncoder:
    """A frozen module of somebody else's. See `Encoder`, and `load_encoder` for the arguments.

    Attributes:
        name: of the source.
        grid: rows and columns of the patch tokens.
        width: D.
        depth: number of blocks.
        heads: 0: its queries and keys are not known.
        head_width: 0.
        logit_scale: 0.
    """

    def __init__(
        self,
        teacher: OwnTeacher,
        *,
        resolution: int,
        device: torch.device,
        compute_dtype: str,
        weights: Path | None,
        random_weights: bool,
    ) -> None:
        self._teacher = teacher
        self.name = teacher.name
        self.grid = teacher.grid(resolution)
        self.width, self.depth = teacher.width, teacher.depth
        self.heads, self.head_width, self.logit_scale = 0, 0, 0.0
        self._input_size = teacher.input_size(resolution)
        self._device, self._compute_dtype = device, compute_dtype
        with drawn_weights():
            module = teacher.build()
        trained = bool(module.state_dict())
        self._random_weights = trained and weights is None
        remedy = f"bring a file and give `--weights {self.name}=FILE`"
        if weights is not None:
            what = f"weights file {weights} does not fit {self.name}"
            load_strictly(module, read_state_dict(weights), what=what, remedy=remedy)
        elif trained and not random_weights:
            raise RepaError(
                f"encoder {self.name} has no weights",
                f"{remedy}, or try things out with `repa preprocess --random-weights`",
                field="--weights",
            )
        self._sha256 = weights_sha256(module.state_dict())
        self._module = module.eval().requires_grad_(False).to(device)
        mean, std = teacher.normalisation
        self._mean, self._std = torch.tensor(mean, device=device), torch.tensor(std, device=device)

    @torch.inference_mode()
    def encode(self, images: Tensor, attention: tuple[int, ...] = ()) -> dict[str, Tensor]:
        """Return the features of a batch, see `Encoder.encode`.

        Raises:
            RepaError: attention is asked for, or the features have other shapes than the teacher says.
        """
        if attention:
            raise RepaError(
                f"encoder {self.name} gives no queries and keys", "leave --attention out", field="--attention"
            )
        pixels = to_teacher_input(images, self._input_size, self._mean, self._std)
        with forward_pass(self._compute_dtype, self._device):
            found = self._teacher.features(self._module, pixels)
        tokens = self.grid[0] * self.grid[1]
        expected = {"patch": (len(images), tokens, self.width), "cls": (len(images), self.width)}
        for kind, shape in expected.items():
            values = found.get(kind)
            if values is None or tuple(values.shape) != shape:
                here = "nothing" if values is None else list(values.shape)
                raise RepaError(
                    f"encoder {self.name} gives {here} as {kind}, not {list(shape)}",
                    "mend its features, or the width and patch_size that it says it has",
                    field="--encoder",
                )
        return {kind: found[kind].float() for kind in expected}

    def in_float32(self) -> OwnEncoder:
        """Return the same network computing in float32."""
        other = copy.copy(self)
        other._compute_dtype = "float32"
        return other

    def provenance(self, batch_size: int) -> Provenance:
        """Return what the manifest keeps."""
        kind = type(self._teacher)
        mean, std = self._teacher.normalisation
        return Provenance(
            model=f"{kind.__module__}:{kind.__qualname__}",
            weights_sha256=self._sha256,
            random_weights=self._random_weights,
            input_size=self._input_size,
            mean=mean,
            std=std,
            compute_dtype=self._compute_dtype,
            batch_size=batch_size,
            grid=self.grid,
            libraries=library_versions("torch", "pillow"),
            notes={"patch": "its own", "cls": "its own"},
        )
