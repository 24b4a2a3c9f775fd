"""From captions to token numbers, by a tokenizer of transformers or, for drawn weights, by bytes."""

from __future__ import annotations

import json
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ...data.errors import RepaError
from ...data.format.canonical import canonical_sha256
from ..encoders.weights import one_line

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from .facts import TextFacts, TextPart

_FIRST_BYTE = 3  # numbers below are for padding, beginning and end


class Tokenizer(Protocol):
    """Captions as token numbers.

    Attributes:
        sha256: of all that decides the numbers.
    """

    sha256: str

    def __call__(self, texts: Sequence[str], length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return numbers and the mask of those that are no padding, each int64 ``[B, S]``."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as tokens, for networks whose weights are drawn and which no tokenizer belongs to.

    Args:
        part: the network; its configuration says how it marks beginning and end.
    """

    def __init__(self, part: TextPart) -> None:
        self._begin = part.config.get("bos_token_id")
        self._end = int(part.config.get("eos_token_id", 1))
        self.sha256 = canonical_sha256(
            {"tokenizer": "bytes", "first": _FIRST_BYTE, "begin": self._begin, "end": self._end}
        )

    def __call__(self, texts: Sequence[str], length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return numbers and mask, see `Tokenizer`."""
        numbers = np.full((len(texts), length), self._end if self._begin is not None else 0, np.int64)
        mask = np.zeros_like(numbers)
        head = [] if self._begin is None else [int(self._begin)]
        for row, text in enumerate(texts):
            data = [_FIRST_BYTE + value for value in text.encode()][: length - 1 - len(head)]
            own = [*head, *data, self._end]
            numbers[row, : len(own)], mask[row, : len(own)] = own, 1
        return numbers, mask


class PublishedTokenizer:
    """A tokenizer of transformers, which pads and cuts to the length.

    Args:
        facts: of the encoder, for the errors.
        folder: of the tokenizer's files.

    Raises:
        RepaError: transformers is not installed, or the files are no tokenizer's.
    """

    def __init__(self, facts: TextFacts, folder: Path) -> None:
        from .files import remedy_for

        auto: Any = transformers().AutoTokenizer
        try:
            self._tokenizer = auto.from_pretrained(folder, local_files_only=True)
        # of broken files, unknown classes and missing packages, by the library's version
        except Exception as error:
            raise RepaError(
                f"{folder} holds no tokenizer of text encoder {facts.name} ({one_line(error)})",
                remedy_for(facts),
                field="--weights",
            ) from error
        if self._tokenizer.pad_token_id is None:
            raise RepaError(
                f"the tokenizer in {folder} has no token for padding",
                "give the one that is published with the network",
                field="--weights",
            )
        self.sha256 = self._sha256()

    def __call__(self, texts: Sequence[str], length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return numbers and mask, see `Tokenizer`."""
        found = self._tokenizer(
            list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="np"
        )
        return found["input_ids"].astype(np.int64), found["attention_mask"].astype(np.int64)

    def _sha256(self) -> str:
        """Hash what decides the numbers, whatever files it was read from."""
        own = self._tokenizer
        backend = getattr(own, "backend_tokenizer", None)
        values = {"vocabulary": own.get_vocab()} if backend is None else json.loads(backend.to_str())
        # set by every call
        values = {name: value for name, value in values.items() if name not in ("padding", "truncation")}
        ids = {name: getattr(own, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "unk")}
        return canonical_sha256({"tokenizer": values, "special": ids, "side": own.padding_side})


def transformers() -> Any:
    """Import transformers.

    Raises:
        RepaError: it is not installed.
    """
    try:
        return import_module("transformers")
    except ImportError as error:
        raise RepaError(
            f"text encoders need transformers, which is not installed ({error})",
            "pip install -e '.[text]'",
            field="--text-encoder",
        ) from error
