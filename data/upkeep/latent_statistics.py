"""Mean and standard deviation of each channel of a cache's latents, measured once all are written.

With them latents of any autoencoder become those of mean 0 and deviation 1, whatever its configuration says.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..format.columns import AUTOENCODER, MOMENTS
from ..format.manifest import LATENTS_NOTE
from ..format.opening import open_manifest
from ..format.survey import committed_shards
from ..reading.all_views import read_all_views
from ..reading.reader import CacheReader
from ..writing.store import cache_lock, write_manifest

if TYPE_CHECKING:
    from ..storage.bucket import CachePath

MOST_IMAGES = 10_000
"""Images that are measured, evenly spaced; with the positions of a latent they give it to 0.1 %."""

_CHUNK = 256


def settle_latent_statistics(path: CachePath) -> bool:
    """Measure the latents of a cache and note it in the manifest, once all of them are written.

    Latents of all views count, as all are trained on. Every process gets the same numbers, so any may do it,
    and again.

    Args:
        path: folder of the cache.

    Returns:
        Whether it was done; not where it was before, or where latents are missing or a channel is constant.

    Raises:
        CacheError: a row is damaged.
        RepaError: the operating system refuses.
    """
    manifest = open_manifest(path)
    provenance = manifest.sources.get(AUTOENCODER)
    if provenance is None or MOMENTS not in manifest.columns or LATENTS_NOTE in provenance.notes:
        return False
    if len(committed_shards(path, manifest, AUTOENCODER)) < manifest.num_shards:
        return False
    found = _measure(path)
    if found is None:
        return False
    with cache_lock(path) as group:
        manifest = open_manifest(path)
        # another process was first; killed while it writes the same again, this one would leave a part of it
        if LATENTS_NOTE in manifest.sources[AUTOENCODER].notes:
            return False
        noted = replace(
            manifest.sources[AUTOENCODER],
            notes={**manifest.sources[AUTOENCODER].notes, LATENTS_NOTE: found},
        )
        noting = replace(manifest, sources={**manifest.sources, AUTOENCODER: noted})
        write_manifest(path, noting, group)
    return True


def _measure(path: CachePath) -> dict[str, Any] | None:
    """Return the note, or None without images or where a channel is constant."""
    with CacheReader(path, (MOMENTS,), direct="off") as reader:
        rows = reader.valid_rows
        if not len(rows):
            return None
        count = min(len(rows), MOST_IMAGES)
        rows = rows[np.linspace(0, len(rows) - 1, count).astype(np.int64)]
        spec, views = reader.manifest.columns[MOMENTS], len(reader.manifest.views)
        half = spec.shape[0] // 2
        origin, sums, squares, variances = (np.zeros(half) for _ in range(4))
        for first in range(0, count, _CHUNK):
            (found,) = read_all_views(reader, rows[first : first + _CHUNK], (MOMENTS,)).values()
            moments = found.reshape(-1, *spec.shape)
            mean, std = moments[:, :half].astype(np.float64), moments[:, half:].astype(np.float64)
            # squares are of what lies near 0, so that a mean far from it costs no digits
            origin = origin if first else mean.mean(axis=(0, 2, 3))
            mean -= origin[:, None, None]
            sums += mean.sum(axis=(0, 2, 3))
            squares += np.square(mean).sum(axis=(0, 2, 3))
            variances += np.square(std).sum(axis=(0, 2, 3))
    numbers = count * views * spec.shape[1] * spec.shape[2]
    shift = sums / numbers
    # the variance of a draw is that of the means and the mean of the posterior's
    variance = squares / numbers - np.square(shift) + variances / numbers
    if not (np.isfinite(variance).all() and (variance > 0).all()):
        return None
    return {"images": count, "mean": (origin + shift).tolist(), "std": np.sqrt(variance).tolist()}
