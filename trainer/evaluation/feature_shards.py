"""Features on disk, a shard for each batch of images, each whole and with its checksum or not there.

A shard holds the features of images ``first`` to ``first + BATCH`` and the hash of each image. It is a
safetensors file, whose metadata names the set it is of and holds the sha256 of its tensors, so its bytes
depend on nothing but the images and the network: not on who computed it, nor when.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ...data.errors import RepaError
from ...data.storage.files import make_folder, os_errors, write_file
from .networks import BATCH

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

IMAGE = "image"
"""Name of the hashes among a shard's tensors, uint8 ``[B, 16]``."""
_DIGEST_BYTES = 16
_REMEDY = "the same command computes what is missing or damaged"


@dataclass(frozen=True, kw_only=True)
class FeatureShards:
    """The features that a network gives of a set of images.

    Attributes:
        folder: where the shards lie.
        root: folder above it that is there.
        identity: says which images and which network.
        count: number of images.
        widths: name → D of the features.
    """

    folder: Path
    root: Path
    identity: str
    count: int
    widths: Mapping[str, int]

    @property
    def batches(self) -> range:
        """First image of each shard."""
        return range(0, self.count, BATCH)

    def missing(self) -> list[int]:
        """Return the first image of each shard that is not there or damaged, ascending."""
        return [first for first in self.batches if self._read(first) is None]

    def absent(self) -> int:
        """Count the shards without a file, whatever is in those that have one."""
        return sum(not self._file(first).exists() for first in self.batches)

    def write(
        self, first: int, images: NDArray[np.uint8], features: Mapping[str, NDArray[np.float32]]
    ) -> None:
        """Write a shard.

        Args:
            first: number of its first image.
            images: uint8 ``[B, R, R, 3]``.
            features: name → float32 ``[B, D]``.

        Raises:
            RepaError: the disk refuses.
        """
        arrays: dict[str, NDArray[np.generic]] = {
            **{name: np.ascontiguousarray(features[name], np.float32) for name in self.widths},
            IMAGE: image_hashes(images),
        }
        file = self._file(first)
        with os_errors("write", file):
            make_folder(self.folder, self.root)
            write_file(file, save(dict(arrays), self._metadata(arrays)), self.root)

    def read(self) -> dict[str, NDArray[np.generic]]:
        """Return the features of all images, name → ``[N, D]``, in their order, and the hashes.

        Raises:
            RepaError: a shard is not there or damaged.
        """
        parts = []
        for first in self.batches:
            part = self._read(first)
            if part is None:
                raise RepaError(f"{self._file(first)} is not there, or damaged", _REMEDY)
            parts.append(part)
        return {name: np.concatenate([part[name] for part in parts]) for name in (*self.widths, IMAGE)}

    def _read(self, first: int) -> dict[str, NDArray[np.generic]] | None:
        """Return the arrays of a shard, None if it is not there or not what it should be."""
        try:
            with safe_open(self._file(first), framework="np") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        # bytes that are no number of a dtype that NumPy knows, a header that is no JSON, …
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None
        rows = min(BATCH, self.count - first)
        expected = {**{name: (rows, width) for name, width in self.widths.items()}, IMAGE: (rows, 16)}
        fits = {name: values.shape for name, values in arrays.items()} == expected
        whole = fits and metadata == self._metadata(arrays)
        return arrays if whole else None

    def _metadata(self, arrays: Mapping[str, NDArray[np.generic]]) -> dict[str, str]:
        # one entry, for safetensors writes several in any order
        return {"repa": json.dumps({"of": self.identity, "sha256": _checksum(arrays)})}

    def _file(self, first: int) -> Path:
        return self.folder / f"{first:08d}.safetensors"


def _checksum(arrays: Mapping[str, NDArray[np.generic]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name}\t{arrays[name].dtype}\t{arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def image_hashes(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the hash of each image, uint8 ``[N, 16]``.

    Args:
        images: uint8 ``[N, R, R, 3]``.
    """
    hashes = [hashlib.sha256(image.tobytes()).digest()[:_DIGEST_BYTES] for image in images]
    return np.frombuffer(b"".join(hashes), np.uint8).reshape(len(images), _DIGEST_BYTES)


def repeated(hashes: NDArray[np.generic]) -> tuple[int, int] | None:
    """Return the numbers of the first two images that are the same, None if all differ.

    Args:
        hashes: uint8 ``[N, 16]``, of each image.
    """
    seen: dict[bytes, int] = {}
    for number, row in enumerate(hashes):
        before = seen.setdefault(row.tobytes(), number)
        if before != number:
            return before, number
    return None
