"""The models of a cache, autoencoder and teachers, each with the sources that one pass gives."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from ...data.format.columns import AUTOENCODER, MOMENTS, ColumnSpec, attention_source
from ...data.format.manifest import DEVIATION_NOTE, LOADED_NOTE
from ...data.format.opening import as_recorded
from .deviation import deviation_notes, latent_deviation, teacher_deviation
from .forms import TokenForm, token_form
from .specs import INT8

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    import torch

    from ...data.format.manifest import Provenance
    from ..encoders.base import Encoder
    from ..encoders.vae import Autoencoder
    from .calibrator import Calibrator
    from .factored import Form
    from .specs import AttentionSettings


@dataclass(frozen=True, kw_only=True)
class SourceDeclaration:
    """What a cache's manifest is told of one source of a model.

    Attributes:
        provenance: what the manifest keeps of it.
        columns: its columns, name → spec.
    """

    provenance: Provenance
    columns: Mapping[str, ColumnSpec]


class SourceModel(Protocol):
    """A network whose outputs are columns of one source or several.

    Attributes:
        name: of the network.
        sources: the sources it is to give.
        provenance: where its outputs come from, however they are stored.
        declarations: source → what it is; all of ``sources`` once `prepare` has been called.
    """

    name: str
    sources: tuple[str, ...]
    provenance: Provenance
    declarations: Mapping[str, SourceDeclaration]

    def prepare(self, calibrator: Calibrator) -> None:
        """Settle the storage forms that must be fitted or measured first.

        Raises:
            RepaError: see `Calibrator`.
        """
        ...

    def encode(self, images: torch.Tensor, sources: Collection[str]) -> dict[str, torch.Tensor]:
        """Compute columns ``[B, *shape]`` in storage dtype, from one forward pass.

        Args:
            images: uint8 ``[B, 3, R, R]``, on the device.
            sources: those of its sources that are wanted.
        """
        ...

    def encode_exactly(
        self, images: torch.Tensor, sources: Collection[str]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Compute the same columns, and the float32 numbers they were rounded from, but for those of scales.

        Args:
            images: uint8 ``[B, 3, R, R]``, on the device.
            sources: those of its sources that are wanted.
        """
        ...


class AutoencoderModel:
    """The autoencoder's source ``sd-vae``, with ``sd-vae/moments`` in float32.

    Moments are posterior mean and standard deviation. See `SourceModel`.

    Args:
        autoencoder: the model.
        batch_size: images of a forward pass, for the manifest.
        resolution: side in pixels of the images.
        recorded: what the cache has of it already, by source.
    """

    name = AUTOENCODER
    sources: tuple[str, ...] = (AUTOENCODER,)

    def __init__(
        self,
        autoencoder: Autoencoder,
        batch_size: int,
        resolution: int,
        recorded: Mapping[str, Provenance] | None = None,
    ) -> None:
        self._autoencoder = autoencoder
        self._recorded = recorded or {}
        self.provenance = autoencoder.provenance(batch_size, resolution)
        shape = (2 * autoencoder.latent_channels, *autoencoder.grid(resolution))
        columns = {MOMENTS: ColumnSpec(shape=shape, dtype="float32")}
        self.declarations: Mapping[str, SourceDeclaration] = {
            AUTOENCODER: SourceDeclaration(provenance=self.provenance, columns=columns)
        }

    def prepare(self, calibrator: Calibrator) -> None:
        """Measure what another compute dtype than float32 changes, as moments are stored as they are."""

        def measure(sources: Sequence[str]) -> Mapping[str, Mapping[str, Any]]:
            del sources
            return calibrator.deviations(partial(latent_deviation, self._autoencoder))

        self.declarations = _with_deviations(self.declarations, self._recorded, measure)

    def encode(self, images: torch.Tensor, sources: Collection[str]) -> dict[str, torch.Tensor]:
        """Compute moments ``[B, 2C, h, w]`` of uint8 images ``[B, 3, R, R]``."""
        del sources
        return {MOMENTS: self._autoencoder.encode_moments(images)}

    def encode_exactly(
        self, images: torch.Tensor, sources: Collection[str]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Compute moments, which are stored as they are."""
        columns = self.encode(images, sources)
        return columns, columns


class EncoderModel:
    """A teacher's sources.

    ``<encoder>`` has its tokens, ``<encoder>+attention`` the queries and keys of blocks.

    See `SourceModel`.

    Args:
        encoder: the teacher.
        sources: either of the two, or both.
        batch_size: images of a forward pass, for the manifest.
        recorded: what the cache has of this teacher already, by source.
        dtype: ``float16``, ``float32`` or ``int8``, of its tokens.
        attention: how its attention is stored, if it is.
        compressor: of the columns, see `ColumnSpec`.
    """

    def __init__(
        self,
        encoder: Encoder,
        sources: Iterable[str],
        *,
        batch_size: int,
        dtype: str,
        recorded: Mapping[str, Provenance] | None = None,
        attention: AttentionSettings | None = None,
        compressor: str | None = None,
    ) -> None:
        self.name = encoder.name
        self.sources = tuple(sources)
        self._recorded = recorded or {}
        self.provenance = as_recorded(encoder.provenance(batch_size), self._recorded.values())
        self.declarations: Mapping[str, SourceDeclaration] = {}
        self._encoder = encoder
        self._settings = attention
        self._attention: Form | None = None
        self._tokens: TokenForm = token_form(encoder, dtype, compressor)
        if self.name in self.sources and dtype != INT8:
            self.declarations = {
                self.name: SourceDeclaration(provenance=self.provenance, columns=self._tokens.columns)
            }

    def prepare(self, calibrator: Calibrator) -> None:
        """Measure what int8 and the compute dtype change, and fit and measure the form of the attention."""
        for source in self.sources:
            if source in self.declarations:
                continue
            columns: Mapping[str, ColumnSpec]
            if source == self.name:
                columns = self._tokens.columns
                measured = calibrator.tokens(self._encoder, self.provenance, self._tokens)
                notes = {**self.provenance.notes, **measured}
            else:
                assert self._settings is not None, "an attention source has settings"
                form, notes = calibrator.attention(self._encoder, self.provenance, self._settings)
                self._attention, columns = form, form.columns
                if LOADED_NOTE in self.provenance.notes:
                    notes[LOADED_NOTE] = self.provenance.notes[LOADED_NOTE]
            declaration = SourceDeclaration(provenance=replace(self.provenance, notes=notes), columns=columns)
            self.declarations = {**self.declarations, source: declaration}
        blocks = self._settings.blocks if self._settings is not None else ()

        def measure(sources: Sequence[str]) -> Mapping[str, Mapping[str, Any]]:
            return calibrator.deviations(partial(teacher_deviation, self._encoder, sources, blocks))

        self.declarations = _with_deviations(self.declarations, self._recorded, measure)

    def encode(self, images: torch.Tensor, sources: Collection[str]) -> dict[str, torch.Tensor]:
        """Compute columns of the sources asked for, from one pass over uint8 images ``[B, 3, R, R]``."""
        columns: dict[str, torch.Tensor] = {}
        forms, features = self._run(images, sources)
        for form in forms:
            columns |= form.encode(features)
        return columns

    def encode_exactly(
        self, images: torch.Tensor, sources: Collection[str]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Compute columns of the sources asked for, and what they were rounded from."""
        columns: dict[str, torch.Tensor] = {}
        exact: dict[str, torch.Tensor] = {}
        forms, features = self._run(images, sources)
        for form in forms:
            columns |= form.encode(features)
            exact |= form.exact(features)
        return columns, exact

    def _run(
        self, images: torch.Tensor, sources: Collection[str]
    ) -> tuple[list[TokenForm | Form], dict[str, torch.Tensor]]:
        """Return the forms of the sources asked for, and what the teacher says that they store."""
        attention = self._attention if attention_source(self.name) in sources else None
        features = self._encoder.encode(images, attention.blocks if attention is not None else ())
        tokens = self._tokens if self.name in sources else None
        return [form for form in (tokens, attention) if form is not None], features


def _with_deviations(
    declarations: Mapping[str, SourceDeclaration],
    recorded: Mapping[str, Provenance],
    measure: Callable[[Sequence[str]], Mapping[str, Mapping[str, Any]]],
) -> Mapping[str, SourceDeclaration]:
    """Return declarations that note how far a compute dtype lies from float32, see `deviation_notes`."""
    wanted = {source: each.provenance for source, each in declarations.items()}
    found = dict(declarations)
    for source, note in deviation_notes(wanted, recorded, measure).items():
        notes = {**wanted[source].notes, DEVIATION_NOTE: note}
        found[source] = replace(found[source], provenance=replace(wanted[source], notes=notes))
    return found
