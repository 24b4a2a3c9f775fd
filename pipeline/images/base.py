"""What an image source is: images in a fixed order, with labels; row i is image i of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image


class UndecodableImage(Exception):  # noqa: N818 — the row stays, nothing failed
    """An image whose content is broken; its row stays, marked invalid.

    Attributes:
        reason: one short line, the same on every machine: it becomes part of the commit record.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ImageSource(Protocol):
    """Images in a fixed order, with labels. Must pickle: decoding happens in other processes.

    Attributes:
        name: for people: a folder's path, a pattern of tars, ``hf:…`` or ``demo``.
        kind: ``folder``, ``tars``, ``hf`` or ``demo``.
        keys: image key of every row, unique, ascending for a folder.
        labels: int32 ``[N]``, position of the class in ``class_names``.
        class_names: label → name.
        fingerprint: ``sha256:…``; equal for equal keys, labels and, as far as can be told cheaply, contents.
        skipped: (path, why) of every file that was passed over.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def kind(self) -> str: ...  # noqa: D102
    @property
    def keys(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def labels(self) -> NDArray[np.int32]: ...  # noqa: D102
    @property
    def class_names(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def fingerprint(self) -> str: ...  # noqa: D102
    @property
    def skipped(self) -> Sequence[tuple[str, str]]: ...  # noqa: D102

    def __len__(self) -> int: ...

    def load(self, index: int, /) -> Image.Image:
        """Image of row ``index`` as RGB.

        Raises:
            UndecodableImage: the content is broken.
            RepaError: the file cannot be read.
        """
        ...
