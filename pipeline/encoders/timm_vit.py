"""Vision transformers of timm as teachers.

The reference loads DINOv2 from torch.hub and sets its position table with
`timm.layers.resample_abs_pos_embed` (bicubic, antialiased) to 16×16. timm's own models of the same name,
made with the teacher's ``img_size`` and loaded through timm's checkpoint filter, resample by that very
function: the same weights, the same features.
"""

from __future__ import annotations

import contextlib
import copy
import io
import sys
from typing import TYPE_CHECKING, Any

import timm
import torch

from ...data.errors import RepaError
from ...data.format.manifest import LOADED_NOTE, Provenance
from ..images.pixels import to_teacher_input
from .attention import AttentionCapture, use_fused_attention
from .distilled import Distilled, read_distilled, require_fit
from .idle_blocks import require_idle_fits, shape_merged
from .idle_teacher import IdleTeacher, usual_file
from .precision import forward_pass
from .timm_teacher import DEMO
from .weights import (
    drawn_weights,
    hub_file,
    library_versions,
    load_strictly,
    one_line,
    read_state_dict,
    weights_sha256,
)

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from .timm_teacher import TimmTeacher

HUB_FILES = ("model.safetensors", "pytorch_model.bin")
PATCH_KERNEL = "patch_embed.proj.weight"
CLASSIFIER = ("head.", "head_dist.")


class TimmEncoder:
    """A frozen ViT of timm. See `Encoder`, and `load_encoder` for the arguments.

    Attributes:
        name: of the source.
        grid: rows and columns of the patch tokens.
        width: D.
        depth: number of blocks.
        heads: H.
        head_width: Dh.
        logit_scale: 1/√Dh.
        input_size: side in pixels of what the ViT sees.
        device: where it computes.
        compute_dtype: of the forward pass.
        random_weights: True when drawn, not trained.
    """

    def __init__(
        self,
        teacher: TimmTeacher,
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
        self.width = teacher.width
        self.input_size = teacher.input_size(resolution)
        self.device = device
        self.compute_dtype = compute_dtype
        path = weights or _shipped(teacher)
        self.random_weights = path is None and random_weights
        if path is None and not random_weights:
            path = _from_hub(teacher)  # before the model is built: an error should not take seconds
        self._distilled: Distilled | None = None
        if isinstance(teacher, IdleTeacher) and path is not None:
            self._distilled = read_distilled(path)
            require_fit(self._distilled, teacher, resolution, path)
        model = build(teacher, self.input_size)
        self._sha256 = None if path is None else load_checkpoint(model, path, teacher)
        self._loaded_sha256 = weights_sha256(model.state_dict())
        use_fused_attention(model)
        self._model = model.eval().requires_grad_(False).to(device)
        self.depth = len(model.blocks)
        self.heads, self.head_width = teacher.heads, teacher.head_width
        self.logit_scale = self.head_width**-0.5
        mean, std = teacher.normalisation
        self._mean, self._std = torch.tensor(mean, device=device), torch.tensor(std, device=device)

    @torch.inference_mode()
    def encode(self, images: Tensor, attention: tuple[int, ...] = ()) -> dict[str, Tensor]:
        """Compute the features of a batch, and queries and keys of blocks, see `Encoder.encode`."""
        return self.compute(images, attention)

    def compute(self, images: Tensor, attention: tuple[int, ...] = ()) -> dict[str, Tensor]:
        """Compute what `encode` does, with gradients where they are on."""
        capture = self._capture(attention) if attention else contextlib.nullcontext()
        pixels = self.pixels(images)
        with forward_pass(self.compute_dtype, self.device):
            with capture:
                tokens = self._model.forward_features(pixels)
            if self._teacher.class_feature == "token":
                class_feature = tokens[:, 0]
            else:
                class_feature = self._model.forward_head(tokens, pre_logits=True)
        patches = tokens[:, self._model.num_prefix_tokens :]
        features = {"patch": patches.float(), "cls": class_feature.float()}
        if isinstance(capture, AttentionCapture):
            features["q"], features["k"] = capture.result()
        return features

    def _capture(self, blocks: tuple[int, ...]) -> AttentionCapture:
        if list(blocks) != sorted(set(blocks)) or not 1 <= blocks[0] <= blocks[-1] <= self.depth:
            raise ValueError(f"blocks {blocks} are not ascending numbers from 1 to {self.depth}")
        return AttentionCapture(
            self.name,
            blocks,
            depth=self.depth,
            heads=self.heads,
            head_width=self.head_width,
            tokens=self.grid[0] * self.grid[1],
            prefix_tokens=self._model.num_prefix_tokens,
        )

    def pixels(self, images: Tensor) -> Tensor:
        """Return uint8 images ``[B, 3, R, R]`` as the ViT takes them, float32 ``[B, 3, S, S]``."""
        return to_teacher_input(images, self.input_size, self._mean, self._std)

    @property
    def model(self) -> Any:
        """The ViT."""
        return self._model

    def with_model(self, model: Any) -> TimmEncoder:
        """Return the same encoder computing with another ViT of the same input and output."""
        other = copy.copy(self)
        other._model = model
        return other

    def in_float32(self) -> TimmEncoder:
        """Return the same network computing in float32."""
        other = copy.copy(self)
        other.compute_dtype = "float32"
        return other

    def provenance(self, batch_size: int) -> Provenance:
        """Return what the manifest keeps."""
        mean, std = self._teacher.normalisation
        as_in_file = self._sha256 in (None, self._loaded_sha256)
        notes: dict[str, Any] = {} if as_in_file else {LOADED_NOTE: self._loaded_sha256}
        model = DEMO if self.name == DEMO else self._teacher.timm_name
        if isinstance(self._teacher, IdleTeacher):
            model = f"{model}, channel-idle copy"
        if self._distilled is not None:
            notes["distilled"] = self._distilled.notes()
        return Provenance(
            model=model,
            weights_sha256=self._sha256 or self._loaded_sha256,
            random_weights=self.random_weights,
            input_size=self.input_size,
            mean=mean,
            std=std,
            compute_dtype=self.compute_dtype,
            batch_size=batch_size,
            grid=self.grid,
            libraries=library_versions("torch", "timm", "pillow"),
            notes={"patch": self._teacher.patch_feature, "cls": self._teacher.class_feature, **notes},
        )


def build(teacher: TimmTeacher, input_size: int) -> Any:
    """Build the teacher's architecture for an input size, with weights drawn from a fixed seed."""
    with drawn_weights():
        options: dict[str, Any] = {**teacher.options, "img_size": input_size, "num_classes": 0}
        model = timm.create_model(teacher.timm_name, pretrained=False, **options)
        if isinstance(teacher, IdleTeacher):
            require_idle_fits(model, teacher.teacher)
            shape_merged(model, teacher.idle, teacher.norm)
        return model


def load_checkpoint(model: Any, path: Path, teacher: TimmTeacher) -> str:
    """Load a file through timm's own filter for the architecture, then strictly.

    The filter converts the original authors' names and resamples the position table to the model's grid; the
    classifier, which teachers have none of, is dropped.

    Args:
        model: from `build`.
        path: timm's file, or the original authors'.
        teacher: its row.

    Returns:
        `weights_sha256` of the file's tensors, those of the classifier and of other networks left out.

    Raises:
        RepaError: another model's file; says what differs.
    """
    what = f"weights file {path} does not fit {teacher.name} ({teacher.timm_name})"
    remedy = _bring(teacher)
    state = read_state_dict(path)
    prefix = teacher.checkpoint_prefix
    if prefix and any(name.startswith(prefix) for name in state):
        state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    sha256 = weights_sha256({name: value for name, value in state.items() if not name.startswith(CLASSIFIER)})
    kernel = state.get(PATCH_KERNEL)
    if kernel is not None and kernel.ndim == 4 and kernel.shape[-1] != teacher.patch_size:
        # the filter would scale it, silently
        raise RepaError(
            f"{what}: its patches have {kernel.shape[-1]} pixels a side, not {teacher.patch_size}",
            f"{remedy}",
        )
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it drops of DINOv3's files
            state = sys.modules[type(model).__module__].checkpoint_filter_fn(state, model)
    # written for the right file; for a wrong one it fails anyhow: KeyError, RuntimeError, …
    except Exception as error:
        raise RepaError(f"{what}: {one_line(error)}", f"{remedy}") from error
    state = {name: value for name, value in state.items() if not name.startswith(CLASSIFIER)}
    load_strictly(model, state, what=what, remedy=remedy)
    return sha256


def _shipped(teacher: TimmTeacher) -> Path | None:
    if isinstance(teacher, IdleTeacher):
        usual = usual_file(teacher.name)
        return usual if usual.is_file() else None
    if teacher.name != DEMO:
        return None
    from ..demo import TEACHER_WEIGHTS

    return TEACHER_WEIGHTS


def _from_hub(teacher: TimmTeacher) -> Path:
    remedy = f"{_bring(teacher)}, or try things out with `repa preprocess --random-weights`"
    if teacher.hub is None:
        raise RepaError(f"encoder {teacher.name} has no weights on the hub", f"{remedy}")
    return hub_file(teacher.hub, HUB_FILES, remedy=f"for encoder {teacher.name} {remedy}")


def _bring(teacher: TimmTeacher) -> str:
    if isinstance(teacher, IdleTeacher):
        flags = f"--encoder {teacher.teacher} --idle {teacher.idle:g} --norm {teacher.norm}"
        what = f"the file that `repa distill {flags}` wrote"
    elif teacher.hub is not None:
        what = f"{HUB_FILES[0]} of https://huggingface.co/{teacher.hub}"
    elif teacher.name == DEMO:
        what = "the file that repa.pipeline.demo.train_teacher wrote"
    else:
        what = f"the original authors' checkpoint ({teacher.source.split(';')[0]})"
    return f"bring {what} and give `--weights {teacher.name}=FILE`"
