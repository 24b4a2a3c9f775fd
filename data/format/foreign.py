"""What a cache says of latents that another program wrote, and how that is said to people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..edge import parse, printable
from ..units import counted, human_bytes
from .columns import AUTOENCODER
from .manifest import FOREIGN_NOTE
from .notes import ForeignNote

if TYPE_CHECKING:
    from .manifest import Manifest, Provenance

_SHOWN_DIGITS = 12


def foreign_note(manifest: Manifest) -> ForeignNote | None:
    """Return what a cache notes of latents that another program wrote, None where `repa` encoded them."""
    provenance = manifest.sources.get(AUTOENCODER)
    raw = None if provenance is None else provenance.notes.get(FOREIGN_NOTE)
    return None if raw is None else parse(ForeignNote, raw, where="the manifest")


def autoencoder_of(provenance: Provenance) -> str | None:
    """Return what an autoencoder is found by, None of imported latents whose autoencoder nobody has named."""
    location = provenance.notes.get("location")
    if location is not None:
        return str(location)
    return None if FOREIGN_NOTE in provenance.notes else provenance.model


def foreign_lines(manifest: Manifest) -> list[str]:
    """Return a line that says what is foreign in a cache, none where nothing is."""
    note = foreign_note(manifest)
    if note is None:
        return []
    what = "the posterior's mean and deviation"
    if note.latents == "sampled":
        what = "one draw of each image and view, not a posterior: every epoch sees the same draw"
    mirrored = {
        "no": "",
        "second view": ", and the mirrored image's",
        "at random": ", of images that were mirrored at random, so no teacher can be added",
    }[note.mirrored]
    named = autoencoder_of(manifest.sources[AUTOENCODER])
    by = "an autoencoder that nobody has named (--vae of the import does, for previews)"
    if named is not None:
        by = f"{named}, as was said at the import"
    return [
        f"{AUTOENCODER} is foreign: imported from {counted(note.files, 'file', ',')} "
        f"({human_bytes(note.bytes)}) of the layout {printable(note.layout)}, sha256 "
        f"{note.sha256[:_SHOWN_DIGITS]}…: {what}{mirrored}; by {printable(by)}, whose weights were not seen"
    ]
