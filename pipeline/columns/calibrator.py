"""The calibrator of storage forms, which fits or measures once for all processes."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ...data.format.columns import attention_source
from ...data.format.manifest import ORIGINAL_VIEW
from ...data.writing.calibrations import ensure_calibration
from ..images.views import pixels_in_views
from ..lanes.lanes import open_lanes
from .calibration import Calibration, ChosenImages, choose_images, pick_images
from .choice import choose_form
from .deviation import DEVIATION_IMAGES
from .factored import FactoredForm, Form, factored_form
from .fitting import Passes, token_fidelity
from .forms import TokenForm, attention_form

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from ...data.format.manifest import Provenance
    from ...data.storage.bucket import CachePath
    from ..encoders.base import Encoder
    from ..images.base import ImageSource
    from .fitting import Pixels
    from .specs import AttentionSettings


class Calibrator:
    """Fits and measures on images of the set that is to be encoded, each in all views of the cache.

    Of all processes that write a cache one does it and the others wait for its file; a later run reads it.

    Args:
        cache: folder of the cache.
        images: the set, as they are.
        resolution: side of the crop in pixels.
        views: of the cache.
        batch_size: images of a forward pass.
        device: ``cpu`` or ``cuda:<index>``.
        threads: CPU: batches computed at a time.
    """

    def __init__(
        self,
        cache: CachePath,
        images: ImageSource,
        *,
        resolution: int,
        views: tuple[str, ...],
        batch_size: int,
        device: str,
        threads: int,
    ) -> None:
        self._cache = cache
        self._images = images
        self._resolution = resolution
        self._views = views
        self._batch_size = batch_size
        self._device = device
        self._threads = threads

    def attention(
        self, encoder: Encoder, provenance: Provenance, settings: AttentionSettings
    ) -> tuple[Form, dict[str, Any]]:
        """Settle the form of an encoder's attention and the notes of its source.

        Args:
            encoder: the teacher.
            provenance: of its tokens.
            settings: what is asked for.

        Raises:
            RepaError: no form meets what is asked for; fewer than two images; values that are not finite.
            CacheError: committed shards were written with another calibration.
        """

        def compute() -> Calibration:
            with self._passes() as passes:
                form, fidelity = choose_form(encoder, settings, self._chosen, passes)
            fitted = isinstance(form, FactoredForm) or form.projections is not None
            return Calibration(
                settings=wanted,
                images=len(self._chosen.fit) if fitted else 0,
                fidelity=fidelity,
                projections=None if isinstance(form, FactoredForm) else form.projections,
                factors=(form.layout, form.basis) if isinstance(form, FactoredForm) else None,
            )

        wanted = self._settings(provenance, **settings.asked)
        made, note = self._ensure(attention_source(encoder.name), wanted, compute)
        form = self._at_hand(encoder, settings, made)
        own = {
            "depth": encoder.depth,
            "logit_scale": encoder.logit_scale,
            "tolerance": settings.tolerance,
        }
        if settings.bytes is not None:
            own["bytes"] = settings.bytes
        return form, {**form.notes, **own, "calibration": note, "fidelity": made.fidelity}

    def _at_hand(self, encoder: Encoder, settings: AttentionSettings, made: Calibration) -> Form:
        """Return the form with its tensors where they are used, once and not for every batch."""
        if made.factors is not None:
            layout, basis = made.factors
            return factored_form(encoder, settings, layout, basis.to(self._device))
        if made.projections is None:
            return attention_form(encoder, settings, None)
        to_query, to_key = (each.to(self._device) for each in made.projections)
        return attention_form(encoder, settings, (to_query, to_key))

    def tokens(self, encoder: Encoder, provenance: Provenance, form: TokenForm) -> dict[str, Any]:
        """Measure what a form that rounds changes, as notes of an encoder's source beside ``provenance``.

        Raises:
            RepaError: fewer than two images; values that are not finite.
            CacheError: committed shards were written with another calibration.
        """

        def compute() -> Calibration:
            with self._passes() as passes:
                fidelity = token_fidelity(encoder, form, self._chosen.held_out, passes)
            return Calibration(settings=wanted, images=0, fidelity=fidelity)

        wanted = self._settings(provenance, dtype=form.dtype)
        made, note = self._ensure(encoder.name, wanted, compute)
        return {"calibration": note, "fidelity": made.fidelity}

    def deviations(
        self, measure: Callable[[Pixels, Passes], Mapping[str, Mapping[str, Any]]]
    ) -> Mapping[str, Mapping[str, Any]]:
        """Measure what a compute dtype other than float32 changes.

        No file is kept of it: each of the processes that begin a source measures on its own device, and what
        the first has found stands in the manifest.

        Args:
            measure: images and how to run them → source → note.

        Returns:
            Source → note; nothing of a set of which no image can be decoded.

        Raises:
            RepaError: values that are not finite.
        """
        if not self._deviation_images:
            return {}
        with self._passes() as passes:
            return measure(self._deviation_images, passes)

    def _ensure(
        self, source: str, wanted: Mapping[str, Any], compute: Callable[[], Calibration]
    ) -> tuple[Calibration, dict[str, Any]]:
        def usable(data: bytes) -> bool:
            try:
                return Calibration.decode(data).settings == wanted
            except ValueError:
                return False

        data = ensure_calibration(self._cache, source, lambda: compute().encode(), usable=usable)
        made = Calibration.decode(data)
        return made, {"images": made.images, "sha256": hashlib.sha256(data).hexdigest()}

    def _settings(self, provenance: Provenance, **form: Any) -> dict[str, Any]:
        """Collect everything that the numbers depend on, as plain JSON values."""
        # not of a cache of the original view, whose calibrations were made before there were others
        views = {} if self._views == (ORIGINAL_VIEW,) else {"views": list(self._views)}
        return {
            "teacher": provenance.identity(),
            "resolution": self._resolution,
            "images": self._images.fingerprint,
            **views,
            **form,
        }

    @cached_property
    def _chosen(self) -> ChosenImages:
        # chosen before there are views: no picture that is measured on mirrors one that is fitted to
        chosen = choose_images(self._images, self._resolution)
        fit, held_out = (pixels_in_views(each, self._views) for each in (chosen.fit, chosen.held_out))
        return ChosenImages(fit=fit, held_out=held_out)

    @cached_property
    def _deviation_images(self) -> Pixels:
        return pixels_in_views(pick_images(self._images, self._resolution, DEVIATION_IMAGES), self._views)

    @contextmanager
    def _passes(self) -> Iterator[Passes]:
        with open_lanes(self._device, self._threads) as lanes:
            yield Passes(lanes, self._batch_size)
