"""The captions that ``--captions`` names, those that lie with the images, or those of the cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...data.errors import RepaError
from ...data.format.captions import EMPTY, captions_path, has_captions, read_captions, read_table
from ...data.format.opening import open_manifest
from ...data.tars.names import names_tars
from ..demo.captions import captions_of
from ..demo.shapes import DemoImages
from ..images.names import HUGGING_FACE
from .base import FLAG, ImageCaptions, check_per_image, matched_captions
from .files import captions_in_file
from .samples import captions_in_data_set, captions_in_tars

if TYPE_CHECKING:
    from ..config import PreprocessConfig
    from ..images.base import ImageSource


def open_captions(config: PreprocessConfig, images: ImageSource) -> ImageCaptions:
    """Return the captions of the images.

    Args:
        config: the command.
        images: of the cache, or to be.

    Raises:
        RepaError: there are none, or they cannot be read or matched.
        CacheError: the cache has captions that are damaged.
    """
    check_per_image(config.captions_per_image)
    place = config.captions
    if place is None and config.caption_column is None and has_captions(config.cache):
        return _of_cache(config)
    if place is None and isinstance(images, DemoImages):
        return _of_demo(config, images)
    if place is None:
        place = config.data
        if not (names_tars(place) or place.startswith(HUGGING_FACE)):
            raise RepaError(
                f"nothing says the captions of {config.data}",
                f"give {FLAG} the captions file of COCO, or a table of file names and captions",
                field=FLAG,
            )
    column, per_image = config.caption_column, config.captions_per_image
    if names_tars(place):
        return captions_in_tars(place, images.keys, column=column, per_image=per_image)
    if place.startswith(HUGGING_FACE):
        return captions_in_data_set(place, images.keys, column=column, per_image=per_image)
    return captions_in_file(Path(place), images.keys, column=column, per_image=per_image)


def _of_demo(config: PreprocessConfig, images: DemoImages) -> ImageCaptions:
    if config.caption_column is not None:
        raise RepaError(
            "the captions of the demo's images are in no column", "leave it out", field="--caption-column"
        )
    pairs = zip(images.keys, captions_of(images), strict=True)
    return matched_captions(
        images.keys,
        ((key, caption) for key, own in pairs for caption in own),
        name=images.name,
        kind=images.kind,
        per_image=config.captions_per_image,
        by_file_name=False,
    )


def _of_cache(config: PreprocessConfig) -> ImageCaptions:
    if config.captions_per_image is not None:
        raise RepaError(
            f"the captions of {config.cache} are chosen already",
            f"leave --captions-per-image out, or give {FLAG} too",
            field="--captions-per-image",
        )
    images = open_manifest(config.cache)
    where = captions_path(config.cache)
    texts = read_captions(config.cache)
    table = read_table(config.cache, images, open_manifest(where))
    return ImageCaptions(
        name=str(where),
        kind="cache",
        of_images=[[texts[row] for row in rows if row > EMPTY] for rows in table.tolist()],
    )
