"""Published checkpoints of SiT, REPA, REG and SRA, whose shapes give the architecture for a strict load.

The first SiT's have the shapes of DiT's, 2C channels, and a time from noise to data. Which of the two a file
is of, its training script's flags say, or its name, or the user.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from math import isqrt
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ...data.errors import RepaError
from ...data.reading.latents import STABLE_DIFFUSION_SCALE, LatentScale
from ...data.units import counted
from .base import with_weights
from .conditions import build_conditioner
from .dit import DiT, DiTConfig
from .published_file import KNOWN, PublishedFile, read_published, some
from .reversed_time import LAST, reverse_time
from .sit import SIT_SIZES, SiT, SiTConfig

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from .base import Backbone, BackboneConfig
    from .conditioning import ConditionColumn

Config = TypeVar("Config", bound=SiTConfig)
_TABLE = "y_embedder.embedding_table.weight"
# REPA's projectors and those after it, SRA's head
_PROJECTORS = re.compile(r"projectors\.|ap_head\.")
# as of the published files, DiT-XL-2-256x256.pt
_NAMED = re.compile(r"(?<![A-Za-z])(SiT|DiT)-")
# the first SiT's names of our paths
_PATHS = {"Linear": "linear", "GVP": "cosine"}
FAMILY = "--family"
"""The flag that says of which family a published file is."""


@dataclass(frozen=True, kw_only=True)
class PublishedCheckpoint:
    """A published model.

    Attributes:
        config: architecture, inferred from the shapes.
        network: the class of such a backbone.
        backbone: state dict of a network of that architecture.
        projectors: state dict of what the alignment alone uses, keys without ``projectors.`` or, in SRA's
            files, ``ap_head.``; may be empty.
        weights: ``ema`` or ``model``; None for a bare state dict.
        objective: settings of the family's objective that the file tells, the ``path`` or nothing.
        steps: training steps it had, None if the file does not say.
        scale: from the autoencoder's latents to the network's; None where each channel is normalised by
            statistics that the file does not hold.
        condition: what its conditioner is built from; None for class labels.
    """

    config: BackboneConfig
    network: type[Backbone]
    backbone: Mapping[str, Tensor]
    projectors: Mapping[str, Tensor]
    weights: str | None
    objective: Mapping[str, str]
    steps: int | None
    scale: LatentScale | None = STABLE_DIFFUSION_SCALE
    condition: ConditionColumn | None = None

    def build(self) -> Backbone:
        """Return the model, in the dtype of the file, in eval mode."""
        return with_weights(self.make, self.backbone).eval()

    def make(self) -> Backbone:
        """Return such a network, its weights drawn."""
        return self.network(
            self.config, None if self.condition is None else build_conditioner(self.condition)
        )


class OtherFamilyError(RepaError):
    """A file is of another family of backbones than its reader's."""


def load_published(
    path: Path, *, weights: str = "ema", certain: bool = False, heads: int | None = None
) -> PublishedCheckpoint:
    """Read a published checkpoint of a SiT.

    Of the first SiT, half of the channels, which its loss leaves out, are dropped, and its time is reversed.

    Args:
        path: ``.safetensors``, or any other name for a file of `torch.save`.
        weights: which of the two sets of a nested file, ``ema`` or ``model``.
        certain: whether somebody says that it is a SiT's, which a file of 2C channels need not say.
        heads: attention heads of a size that is not in `SIT_SIZES`; known sizes need none.

    Raises:
        RepaError: unreadable, no checkpoint of a SiT, keys missing or too many, or a size of unknown heads.
    """
    file = read_published(path, weights=weights)
    if not file.is_doubled:
        return read_plain(file, SiTConfig, SiT, heads)
    doubled = read_plain(file, DiTConfig, DiT, heads)
    check_family(file, "SiT", certain=certain)
    config = SiTConfig(**asdict(doubled.config))
    halved = {**doubled.backbone}
    for name in LAST:
        rows = halved[name].reshape(config.patch_size**2, 2, config.in_channels, *halved[name].shape[1:])
        halved[name] = rows[:, 0].flatten(0, 1)
    return replace(
        doubled, config=config, network=SiT, backbone=reverse_time(halved), objective=_first_path(file)
    )


def read_plain(
    file: PublishedFile, kind: type[SiTConfig], network: type[SiT], heads: int | None
) -> PublishedCheckpoint:
    """Read a checkpoint of plain blocks as it stands in its file.

    Args:
        file: the file.
        kind: class of the architecture.
        network: class of the network.
        heads: attention heads of a size that is none of `SIT_SIZES`.

    Raises:
        RepaError: no such checkpoint, keys missing or too many, or a size of unknown heads.
    """
    path = file.path
    if file.is_gated:
        raise OtherFamilyError(f"{path} has blocks with a gated MLP, as LightningDiT", f"give one of {KNOWN}")
    state = _rename_legacy(file.state)
    projectors = {key[found.end() :]: state[key] for key in state if (found := _PROJECTORS.match(key))}
    backbone = {key: value for key, value in state.items() if not _PROJECTORS.match(key)}
    path_type = file.flag("path_type")
    published = PublishedCheckpoint(
        config=infer(kind, backbone, path, heads),
        network=network,
        backbone=backbone,
        projectors=projectors,
        weights=file.weights,
        objective={} if path_type is None else {"path": path_type},
        steps=file.steps,
    )
    check_strictly(published, path)
    return published


def check_family(file: PublishedFile, family: str, *, certain: bool) -> None:
    """Check whether a file of 2C channels is of a family, DiT or SiT.

    Args:
        file: the file.
        family: which.
        certain: whether somebody says that it is.

    Raises:
        RepaError: it says that it is of the other, or nothing, and nobody says it.
    """
    model = _NAMED.search(file.flag("model") or "")
    named = model or _NAMED.search(file.path.name)
    if named is not None and named[1] != family:
        raise OtherFamilyError(
            f"{file.path} is {'a checkpoint' if model else 'by its name'} of {named[1]}, not of {family}",
            f"leave {FAMILY} out, or say {named[1]}" if model else f"leave {FAMILY} out, or rename the file",
            field=FAMILY,
        )
    if named is None and not certain:
        raise RepaError(
            f"{file.path} predicts two channels for each of its latents, as DiT and the first SiT do, "
            "and does not say which of them it is",
            f"say {FAMILY} DiT or {FAMILY} SiT",
            field=FAMILY,
        )


def _first_path(file: PublishedFile) -> dict[str, str]:
    """Return our name of the path that the first SiT was trained on, nothing where it does not say.

    Raises:
        RepaError: a path that there is not, or it predicts no velocity.
    """
    path_type, predicted = file.flag("path_type"), file.flag("prediction") or "velocity"
    if (path_type is not None and path_type not in _PATHS) or predicted != "velocity":
        raise RepaError(
            f"{file.path} was trained to predict the {predicted} of the path {path_type or 'Linear'}",
            f"give one that predicts the velocity of {' or '.join(_PATHS)}",
            field="--ckpt",
        )
    return {} if path_type is None else {"path": _PATHS[path_type]}


def _rename_legacy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename ``decoder_blocks``, the blocks after the aligned one in REPA's first files, from 0 again."""
    shift = _count_blocks(state)
    return {
        re.sub(r"^decoder_blocks\.(\d+)\.", lambda match: f"blocks.{int(match[1]) + shift}.", key): value
        for key, value in state.items()
    }


def _count_blocks(state: Mapping[str, Tensor]) -> int:
    return len({match[1] for key in state if (match := re.match(r"blocks\.(\d+)\.", key))})


def infer(
    kind: type[Config],
    state: Mapping[str, Tensor],
    path: Path,
    heads: int | None,
    *,
    labels: bool = True,
    **settings: Any,
) -> Config:
    """Infer the architecture that has the state dict's shapes.

    Args:
        kind: class of the architecture.
        state: of the backbone.
        path: of the file.
        heads: attention heads of a size that is none of `SIT_SIZES`.
        labels: whether it is conditioned on labels.
        settings: what the shapes do not say.

    Raises:
        RepaError: no transformer has them.
    """
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    needed = {
        "x_embedder.proj.weight": 4,
        "pos_embed": 3,
        **({_TABLE: 2} if labels else {}),
        "final_layer.linear.weight": 2,
    }
    lacking = [key for key, rank in needed.items() if len(shapes.get(key, ())) != rank]
    if lacking:
        raise RepaError(
            f"{path} holds no weights of a {kind.family} (no {some(lacking)} of the right rank; "
            f"it has {some(list(state))})",
            f"give a published checkpoint of {KNOWN}",
        )
    width, channels, patch_size, _ = shapes["x_embedder.proj.weight"]
    token_widths = shapes.get("cls_projectors2.weight", ())[1:]
    tokens = shapes["pos_embed"][1] - len(token_widths)
    settings |= {"num_classes": shapes[_TABLE][0] - 1} if labels else {}
    depth = _count_blocks(state)
    size_name, heads = _heads(depth, width, shapes.get("blocks.0.attn.q_norm.weight"), heads, path)
    return kind(
        depth=depth,
        width=width,
        heads=heads,
        patch_size=patch_size,
        input_size=isqrt(tokens) * patch_size,
        in_channels=channels,
        qk_norm="blocks.0.attn.q_norm.weight" in shapes,
        token_widths=token_widths,
        size_name=size_name,
        **settings,
    )


def _heads(
    depth: int, width: int, head_norm: tuple[int, ...] | None, given: int | None, path: Path
) -> tuple[str | None, int]:
    """Infer the letter of the size, and heads.

    The shapes alone say the heads only where QK-norm has a weight.
    """
    for letter, size in SIT_SIZES.items():
        if (size.depth, size.width) == (depth, width):
            return letter, size.heads
    if head_norm is not None:
        return None, width // head_norm[0]
    if given is not None:
        return None, given
    known = ", ".join(f"{letter} {size.depth}×{size.width}" for letter, size in SIT_SIZES.items())
    raise RepaError(
        f"{path} has depth {depth} and width {width}, which is no known size ({known})",
        "give a checkpoint of one of these",
    )


def check_strictly(published: PublishedCheckpoint, path: Path) -> None:
    """Check that there is every key of the architecture in its shape, and no other.

    Raises:
        RepaError: names the first of the keys that are missing, too many or of another shape.
    """
    state, facts = published.backbone, published.config.facts
    with torch.device("meta"):
        expected = {key: tuple(value.shape) for key, value in published.make().state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    faults = [
        f"{counted(len(keys), 'key')} {what} ({some(keys)})"
        for what, keys in (
            ("missing", [key for key in expected if key not in found]),
            ("unexpected", [key for key in found if key not in expected]),
            ("of another shape", [key for key, shape in expected.items() if found.get(key, shape) != shape]),
        )
        if keys
    ]
    if faults:
        raise RepaError(
            f"{path} does not fit a {published.network.__name__} of depth {facts.depth} and width "
            f"{facts.width}: {'; '.join(faults)}",
            f"only checkpoints of {KNOWN} load",
        )
