"""Where the files of text encoders lie, in a folder or on the hub."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ...data.edge import read_json
from ...data.errors import RepaError
from ..encoders.weights import hub_file

if TYPE_CHECKING:
    from pathlib import Path

    from .facts import TextFacts

CONFIG: Final = "config.json"
WEIGHTS: Final = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_CONTEXT_WEIGHTS: Final = ("diffusion_pytorch_model.safetensors",)
_CONTEXT_FOLDER: Final = "transformer"
_TOKENIZERS: Final = ("tokenizer.json", "vocab.json", "spiece.model")
_BESIDE: Final = ("merges.txt", "special_tokens_map.json", "added_tokens.json")


class PartFiles(NamedTuple):
    """Folders of a network and of its tokenizer."""

    network: Path
    tokenizer: Path


class TextFiles(NamedTuple):
    """Files of a text encoder.

    Attributes:
        parts: of each of its networks.
        context: file with the weights of the context embedder; None where there is none.
    """

    parts: tuple[PartFiles, ...]
    context: Path | None


def remedy_for(facts: TextFacts) -> str:
    """Say how the files of a text encoder are given."""
    if facts.shipped is not None:
        return (
            f"install repa again, or give `--weights {facts.name}=FOLDER` the folder that "
            "repa.pipeline.demo.train_text wrote"
        )
    inside = "" if len(facts.parts) == 1 else f" with {', '.join(part.folders[0] for part in facts.parts)}"
    return (
        f"bring https://huggingface.co/{facts.hub} in a folder{inside} and give "
        f"`--weights {facts.name}=FOLDER`, or try things out with `repa preprocess --random-weights`"
    )


def files_of(facts: TextFacts, folder: Path | None) -> TextFiles:
    """Find the files of a text encoder.

    Args:
        facts: of the encoder.
        folder: where they lie, see `files_in`; None: the shipped ones, else the hub's.

    Raises:
        RepaError: there is a file missing.
    """
    place = folder or facts.shipped
    return files_on_hub(facts) if place is None else files_in(facts, place)


def files_in(facts: TextFacts, folder: Path) -> TextFiles:
    """Find the files of a text encoder in a folder of the hub's layout.

    Args:
        facts: of the encoder.
        folder: of its one network and tokenizer, or of a pipeline of diffusers with sub-folders.

    Raises:
        RepaError: the folder is none, or lacks a network or a tokenizer.
    """
    if not folder.is_dir():
        raise RepaError(
            f"the weights of text encoder {facts.name}, {folder}, are no folder",
            remedy_for(facts),
            field="--weights",
        )
    parts = []
    for part in facts.parts:
        network, tokenizer = (folder / name for name in part.folders)
        if len(facts.parts) == 1 and (folder / CONFIG).is_file():
            network = folder
            tokenizer = tokenizer if tokenizer.is_dir() else folder
        for place, names in ((network, (CONFIG,)), (network, WEIGHTS), (tokenizer, _TOKENIZERS)):
            if not any((place / name).is_file() for name in names):
                raise RepaError(
                    f"{place} has no {' or '.join(names)}, which text encoder {facts.name} needs",
                    remedy_for(facts),
                    field="--weights",
                )
        parts.append(PartFiles(network, tokenizer))
    context = None
    if facts.embedded:
        context = folder / _CONTEXT_FOLDER / _CONTEXT_WEIGHTS[0]
        if not context.is_file():
            raise RepaError(
                f"{context} does not exist, which holds the context embedder of {facts.name}",
                remedy_for(facts),
                field="--weights",
            )
    return TextFiles(tuple(parts), context)


def files_on_hub(facts: TextFacts) -> TextFiles:
    """Find the files of a text encoder among those of the hub, the local copies first.

    Raises:
        RepaError: some are neither here nor reachable.
    """
    remedy = remedy_for(facts)
    parts = []
    for part in facts.parts:
        # a repository of one network has no sub-folders
        inside = [f"{name}/" if len(facts.parts) > 1 else "" for name in part.folders]
        network = hub_file(facts.hub, [f"{inside[0]}{CONFIG}"], remedy=remedy).parent
        weights = hub_file(facts.hub, [f"{inside[0]}{name}" for name in WEIGHTS], remedy=remedy)
        if weights.name.endswith(".index.json"):
            index = read_json(weights.read_bytes(), str(weights), remedy=remedy, error=RepaError)
            for name in sorted(set(index["weight_map"].values())):
                hub_file(facts.hub, [f"{inside[0]}{name}"], remedy=remedy)
        tokenizer = hub_file(facts.hub, [f"{inside[1]}tokenizer_config.json"], remedy=remedy).parent
        found = hub_file(facts.hub, [f"{inside[1]}{name}" for name in _TOKENIZERS], remedy=remedy)
        for name in _BESIDE if found.name != "tokenizer.json" else ():
            with suppress(RepaError):
                hub_file(facts.hub, [f"{inside[1]}{name}"], remedy=remedy)
        parts.append(PartFiles(network, tokenizer))
    context = None
    if facts.embedded:
        names = [f"{_CONTEXT_FOLDER}/{name}" for name in _CONTEXT_WEIGHTS]
        context = hub_file(facts.hub, names, remedy=remedy)
    return TextFiles(tuple(parts), context)


def read_config(facts: TextFacts, folder: Path) -> dict[str, Any]:
    """Read the configuration of a network, that of the text where it has several.

    Raises:
        RepaError: it cannot be read, or is none.
    """
    file = folder / CONFIG
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise RepaError(
            f"{file} cannot be read ({error.strerror or error})", remedy_for(facts), field="--weights"
        ) from error
    values = read_json(raw, str(file), remedy=remedy_for(facts), error=RepaError)
    inner = values.get("text_config") if isinstance(values, dict) else None
    found = {**values, **inner} if isinstance(inner, dict) else values
    if not isinstance(found, dict):
        raise RepaError(f"{file} describes no model", remedy_for(facts), field="--weights")
    if isinstance(inner, dict) and "projection_dim" in values:
        found["projection_dim"] = values["projection_dim"]
    return found
