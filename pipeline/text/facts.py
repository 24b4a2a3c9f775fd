"""What is known of text encoders without their weights, from their parts to the columns they give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from ...data.format.columns import SCALE_SUFFIX, TEXT_STATES, ColumnSpec, column_name
from ..demo import TEXT_FOLDER, TEXT_LENGTH, TEXT_OPTIONS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

INT8: Final = "int8"

# config.json of openai/clip-vit-large-patch14, laion/CLIP-ViT-bigG-14-laion2B-39B-b160k, google/t5-v1_1-xxl
CLIP_L: Final[Mapping[str, Any]] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}
CLIP_G: Final[Mapping[str, Any]] = {
    **CLIP_L,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
T5_XXL: Final[Mapping[str, Any]] = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
SD3_WIDTH: Final = 1536
"""Of the text in the blocks of Stable Diffusion 3 medium, after its context embedder."""


@dataclass(frozen=True, kw_only=True)
class TextPart:
    """One network of a text encoder, and its tokenizer.

    Attributes:
        family: whose classes of transformers load it.
        length: S, tokens that a caption is padded and cut to.
        config: of the architecture, for what is known without files and for weights that are drawn.
        layer: ``last`` for the states after the final norm, ``penultimate`` for those that the last block
            is given, without a norm.
        projected: whether the pooled vector goes through the network's projection.
        folders: sub-folder of the network and of its tokenizer in a folder of several.
    """

    family: Literal["clip", "t5"]
    length: int
    config: Mapping[str, Any]
    layer: Literal["last", "penultimate"] = "last"
    projected: bool = False
    folders: tuple[str, str] = ("text_encoder", "tokenizer")

    def sizes(self, config: Mapping[str, Any] | None = None) -> tuple[int, int | None]:
        """Return E of the states and of the pooled vector, which T5 has none of.

        Args:
            config: of the network at hand; by default the one that is known.

        Raises:
            KeyError: it lacks a size.
        """
        values = self.config if config is None else config
        if self.family == "t5":
            return int(values["d_model"]), None
        width = int(values["hidden_size"])
        return width, int(values["projection_dim"]) if self.projected else width


Joined = Literal["alone", "side by side", "stable diffusion 3"]


@dataclass(frozen=True, kw_only=True)
class TextFacts:
    """A text encoder as ``--text-encoder`` names it.

    Attributes:
        name: of the source of its columns.
        hub: where its files are published; a word for those that are `shipped`.
        parts: its networks.
        joined: how their states make one sequence. ``side by side`` joins channels; ``stable diffusion 3``
            joins the channels of the first two, pads them with zeros to the width of the third, and lets the
            tokens of that one follow (arXiv 2403.03206, section 4).
        zeros: whether the empty caption's columns are zeros, as Stable Diffusion XL has them.
        embedded: whether states go through the frozen context embedder of the model of the hub.
        masked: whether a mask of the tokens that are no padding is stored.
        shipped: folder of its files, of one that comes with the package.
    """

    name: str
    hub: str
    parts: tuple[TextPart, ...]
    joined: Joined = "alone"
    zeros: bool = False
    embedded: bool = False
    masked: bool = False
    shipped: Path | None = None

    @property
    def length(self) -> int:
        """S, tokens of the states."""
        if self.joined == "stable diffusion 3":
            return self.parts[0].length + self.parts[-1].length
        return self.parts[0].length

    @property
    def tokens(self) -> int:
        """Tokens of all parts, one after the other."""
        return sum(part.length for part in self.parts)

    def sizes(self, configs: Sequence[Mapping[str, Any] | None] = ()) -> TextSizes:
        """Return the sizes of its columns.

        Args:
            configs: of the networks at hand, one a part; those that are known by default.

        Raises:
            KeyError: one of them lacks a size.
        """
        given = configs or [None] * len(self.parts)
        found = [part.sizes(config) for part, config in zip(self.parts, given, strict=True)]
        pooled = [size for _, size in found if size is not None]
        width = found[-1][0]
        if self.joined == "side by side":
            # only the second one's pooled vector is used
            return TextSizes(
                length=self.length, width=sum(size for size, _ in found), pooled=pooled[-1], masked=False
            )
        return TextSizes(
            length=self.length,
            width=SD3_WIDTH if self.embedded else width,
            pooled=sum(pooled) or None,
            masked=self.masked,
        )


@dataclass(frozen=True, kw_only=True)
class TextSizes:
    """Sizes of the columns of a text encoder.

    Attributes:
        length: S of the states.
        width: E of the states.
        pooled: E of the pooled vector; None where there is none.
        masked: whether there is a mask ``[S]``.
    """

    length: int
    width: int
    pooled: int | None
    masked: bool

    def columns(self, name: str, dtype: str, compressor: str | None = None) -> dict[str, ColumnSpec]:
        """Return the columns of a source, name → spec.

        Args:
            name: of the source.
            dtype: ``float16``, ``float32`` or ``int8``, of the states; a pooled vector that would be int8
                is float16.
            compressor: see `ColumnSpec`.
        """
        states = column_name(name, TEXT_STATES)
        packed = None if compressor == "pcodec" and dtype == INT8 else compressor
        found = {
            states: ColumnSpec(shape=(self.length, self.width), dtype=dtype, compressor=packed),
        }
        if dtype == INT8:
            found[f"{states}{SCALE_SUFFIX}"] = ColumnSpec(
                shape=(self.width,), dtype="float32", compressor=compressor
            )
        if self.pooled is not None:
            found[column_name(name, "pooled")] = ColumnSpec(
                shape=(self.pooled,), dtype="float16" if dtype == INT8 else dtype, compressor=compressor
            )
        if self.masked:
            found[column_name(name, "mask")] = ColumnSpec(shape=(self.length,), dtype="uint8")
        return found


def _clip(config: Mapping[str, Any], **settings: Any) -> TextPart:
    return TextPart(family="clip", length=77, config=config, **settings)


def _t5(length: int, folder: int = 1) -> TextPart:
    suffix = f"_{folder}" if folder > 1 else ""
    folders = (f"text_encoder{suffix}", f"tokenizer{suffix}")
    return TextPart(family="t5", length=length, config=T5_XXL, folders=folders)


_CLIP_L_HUB = "openai/clip-vit-large-patch14"
_CLIP_G_HUB = "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"
_T5_HUB = "google/t5-v1_1-xxl"
_SDXL_HUB = "stabilityai/stable-diffusion-xl-base-1.0"
_SD3_HUB = "stabilityai/stable-diffusion-3-medium-diffusers"
_SECOND = ("text_encoder_2", "tokenizer_2")


def _stable_diffusion_3(name: str, length: int, *, embedded: bool) -> TextFacts:
    first = _clip(CLIP_L, layer="penultimate", projected=True)
    second = _clip(CLIP_G, layer="penultimate", projected=True, folders=_SECOND)
    return TextFacts(
        name=name,
        hub=_SD3_HUB,
        parts=(first, second, _t5(length, 3)),
        joined="stable diffusion 3",
        embedded=embedded,
    )


_ROWS = (
    TextFacts(name="clip-l-text", hub=_CLIP_L_HUB, parts=(_clip(CLIP_L),), masked=True),
    TextFacts(
        name="clip-l-penultimate-text",
        hub=_CLIP_L_HUB,
        parts=(_clip(CLIP_L, layer="penultimate", projected=True),),
        masked=True,
    ),
    TextFacts(
        name="clip-g-text",
        hub=_CLIP_G_HUB,
        parts=(_clip(CLIP_G, layer="penultimate", projected=True),),
        masked=True,
    ),
    TextFacts(name="t5-xxl-text", hub=_T5_HUB, parts=(_t5(256),), masked=True),
    TextFacts(name="t5-xxl-512-text", hub=_T5_HUB, parts=(_t5(512),), masked=True),
    TextFacts(
        name="sdxl-text",
        hub=_SDXL_HUB,
        parts=(
            _clip(CLIP_L, layer="penultimate"),
            _clip(CLIP_G, layer="penultimate", projected=True, folders=_SECOND),
        ),
        joined="side by side",
        zeros=True,
    ),
    _stable_diffusion_3("sd3-text", 256, embedded=False),
    _stable_diffusion_3("sd3-512-text", 512, embedded=False),
    _stable_diffusion_3("sd3-context", 256, embedded=True),
    _stable_diffusion_3("sd3-512-context", 512, embedded=True),
    TextFacts(
        name="demo-text",
        hub="shipped",
        parts=(TextPart(family="clip", length=TEXT_LENGTH, config=TEXT_OPTIONS),),
        masked=True,
        shipped=TEXT_FOLDER,
    ),
)
TEXT_ENCODERS: Final[Mapping[str, TextFacts]] = {row.name: row for row in _ROWS}
"""The text encoders: one row each. The length of T5 is a part of what its columns are, hence of the name."""
