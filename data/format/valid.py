"""The array ``valid``, which says which rows have data to readers that know nothing of commit records.

``bool [N]`` in the cache's group, one chunk a shard, each a byte per row and a crc32c. A row is true when
some source has committed its shard and none has marked it invalid; before that it is false, which is also
what a missing chunk reads as. It says what the records say: it is written again with every record that
changes it, and a cache's own reader asks the records.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from crc32c import crc32c

from ..storage.local import CHECKSUM_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .manifest import Manifest


def encode_valid(manifest: Manifest, shard: int, invalid: Iterable[int]) -> bytes:
    """Return the chunk of a shard that some source has committed.

    Args:
        manifest: of the cache.
        shard: index of the shard.
        invalid: rows of it without data, by any source.
    """
    rows = manifest.shard_range(shard)
    values = np.zeros(manifest.shard_rows, dtype=np.uint8)
    values[: len(rows)] = 1
    values[[row - rows.start for row in invalid]] = 0
    data = values.tobytes()
    return data + crc32c(data).to_bytes(CHECKSUM_BYTES, "little")
