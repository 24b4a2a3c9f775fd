"""Foreign latents as a cache, stopped and gone on with, mended, and told from others."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import repa
from foreign_layouts import COUNT, write_fast_dit, write_lightningdit, write_mar, write_repa
from repa.data.errors import CacheError, RepaError
from repa.data.format.columns import AUTOENCODER, MOMENTS
from repa.data.format.foreign import foreign_lines, foreign_note
from repa.data.format.layout import KEYS_FILE, LABEL_CHUNK, shard_file
from repa.data.format.manifest import Manifest
from repa.data.format.opening import open_manifest
from repa.data.reading.reader import CacheReader
from repa.data.tars.export import Transfer
from repa.data.testing import folder_contents
from repa.data.upkeep.verify import verify_cache
from repa.pipeline.foreign.base import ForeignOptions
from repa.pipeline.foreign.open import open_foreign
from repa.pipeline.foreign.write import ImportSettings, import_latents
from repa.pipeline.run import StoppedError


def silent(done: int, total: int) -> None:
    """Show no progress."""
    assert 0 < done <= total


def import_to(cache: Path, layout: str, root: Path, **settings: Any) -> Transfer:
    latents = open_foreign(layout, root, ForeignOptions())
    values = {"shard_rows": 5, "resolution": 64, **settings}
    return import_latents(latents, cache, ImportSettings(**values), silent, silent)


def stored(cache: Path) -> np.ndarray:
    """Return all rows ``[N, V, 2C, h, w]``."""
    with CacheReader(cache, (MOMENTS,)) as reader:
        spec, views = reader.manifest.columns[MOMENTS], len(reader.manifest.views)
        rows = np.arange(reader.manifest.num_rows)
        out = np.empty((views, len(rows), *spec.shape), spec.numpy_dtype)
        for view in range(views):
            reader.read_rows(rows, (MOMENTS,), {MOMENTS: out[view]}, views=np.full_like(rows, view))
        return out.swapaxes(0, 1)


@pytest.mark.parametrize(
    ("layout", "write", "views"),
    [
        ("repa", write_repa, 1),
        ("mar", write_mar, 2),
        ("fast-dit", write_fast_dit, 1),
        ("lightningdit", write_lightningdit, 2),
    ],
)
def test_a_cache_holds_what_the_layout_does(layout: str, write: Any, views: int, tmp_path: Path) -> None:
    write(tmp_path / "latents")
    done = import_to(tmp_path / "cache", layout, tmp_path / "latents")
    assert (done.shards, done.kept, done.images, done.bytes) == (3, 0, COUNT, COUNT * views * 2048)
    assert verify_cache(tmp_path / "cache") == []
    latents = open_foreign(layout, tmp_path / "latents", ForeignOptions())
    assert np.array_equal(stored(tmp_path / "cache"), np.stack([latents.read(row) for row in range(COUNT)]))
    manifest = open_manifest(tmp_path / "cache")
    known = manifest.sources[AUTOENCODER]
    assert (known.weights_sha256, known.batch_size, known.compute_dtype) == ("", 0, "unknown")
    assert known.notes["latent_statistics"]["images"] == COUNT
    assert manifest.source_kind == f"{layout} import"
    note = foreign_note(manifest)
    assert note is not None
    files = [tmp_path / "latents" / name for name in latents.files]
    if layout == "repa":
        files = [tmp_path / "latents" / "vae-sd" / name for name in latents.files]
    said = "".join(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {name}\n"
        for path, name in zip(files, latents.files, strict=True)
    )
    assert note.sha256 == hashlib.sha256(said.encode()).hexdigest()
    assert (note.files, note.bytes) == (len(files), sum(path.stat().st_size for path in files))
    [said] = foreign_lines(manifest)
    assert said in repr(repa.open(tmp_path / "cache"))


def test_an_import_that_is_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_repa(tmp_path / "latents")
    import_to(tmp_path / "whole", "repa", tmp_path / "latents")
    latents = open_foreign("repa", tmp_path / "latents", ForeignOptions())
    settings = ImportSettings(shard_rows=5, resolution=64)

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(StoppedError):
        import_latents(latents, tmp_path / "cache", settings, stop, silent)
    assert not (tmp_path / "cache").exists(), "nothing is written before all is looked at"
    with pytest.raises(StoppedError):
        import_latents(latents, tmp_path / "cache", settings, silent, stop)
    # and one that was killed in the middle of a shard
    with monkeypatch.context() as patch:
        patch.setattr(type(latents), "read", lambda self, row: (_ for _ in ()).throw(OSError(5, "unplugged")))
        with pytest.raises(OSError, match="unplugged"):
            import_latents(latents, tmp_path / "cache", settings, silent, silent)
    done = import_latents(latents, tmp_path / "cache", settings, silent, silent)
    assert (done.kept, done.images) == (2, COUNT - 10)
    assert folder_contents(tmp_path / "cache") == folder_contents(tmp_path / "whole")


def test_other_files_are_not_put_into_the_same_cache(tmp_path: Path) -> None:
    moments = write_repa(tmp_path / "latents")
    import_to(tmp_path / "cache", "repa", tmp_path / "latents")
    before = folder_contents(tmp_path / "cache")
    np.save(tmp_path / "latents" / "vae-sd" / "00000" / "img-mean-std-00000001.npy", moments[0])
    with pytest.raises(CacheError):
        import_to(tmp_path / "cache", "repa", tmp_path / "latents")
    write_repa(tmp_path / "again")
    for other in ({"vae": "another"}, {"resolution": 128}, {"shard_rows": 4}):
        with pytest.raises(CacheError):
            import_to(tmp_path / "cache", "repa", tmp_path / "again", **other)
    assert folder_contents(tmp_path / "cache") == before


def test_a_damaged_cache_is_mended_by_importing_again(tmp_path: Path) -> None:
    write_mar(tmp_path / "latents")
    cache = tmp_path / "cache"
    import_to(cache, "mar", tmp_path / "latents")
    whole = folder_contents(cache)
    spec = open_manifest(cache).columns[MOMENTS]
    file = shard_file(cache, MOMENTS, spec, 1)
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(bytes(data))
    shard_file(cache, MOMENTS, spec, 2).unlink()
    (cache / KEYS_FILE).write_bytes((cache / KEYS_FILE).read_bytes()[:-3])
    (cache / LABEL_CHUNK).write_bytes(b"")
    done = import_to(cache, "mar", tmp_path / "latents")
    assert (done.kept, done.images) == (2, COUNT - 10), "the shard that is missing; the other is not seen yet"
    done = import_to(cache, "mar", tmp_path / "latents")
    assert (done.kept, done.images) == (2, 5)
    assert folder_contents(cache) == whole


def test_the_side_of_the_images_is_a_multiple_of_the_latents(tmp_path: Path) -> None:
    write_repa(tmp_path / "latents")
    for wrong in (60, 0, -64, 1 << 20):
        with pytest.raises(RepaError) as caught:
            import_to(tmp_path / "cache", "repa", tmp_path / "latents", resolution=wrong)
        assert caught.value.field == "--resolution"
    assert not (tmp_path / "cache").exists()
    import_to(tmp_path / "cache", "repa", tmp_path / "latents", resolution=None)
    assert open_manifest(tmp_path / "cache").resolution == 64


def test_the_default_side_is_that_of_the_layouts_autoencoder(tmp_path: Path) -> None:
    write_mar(tmp_path / "mar")
    import_to(tmp_path / "cache", "mar", tmp_path / "mar", resolution=None)
    assert open_manifest(tmp_path / "cache").resolution == 128, "of f16"
    write_lightningdit(tmp_path / "lightningdit")
    import_to(tmp_path / "other", "lightningdit", tmp_path / "lightningdit", resolution=None)
    assert open_manifest(tmp_path / "other").resolution == 64, "four channels are Stable Diffusion's"


def test_nobody_else_may_leave_open_how_columns_were_computed(tmp_path: Path) -> None:
    write_repa(tmp_path / "latents")
    import_to(tmp_path / "cache", "repa", tmp_path / "latents")
    values = open_manifest(tmp_path / "cache").to_json()
    assert Manifest.from_json(values, where="here").num_rows == COUNT
    del values["sources"][AUTOENCODER]["notes"]["foreign"]
    with pytest.raises(CacheError) as caught:
        Manifest.from_json(values, where="here")
    assert caught.value.field == f"sources.{AUTOENCODER}.batch_size"


def test_links_are_followed_to_files_and_no_further(tmp_path: Path) -> None:
    write_mar(tmp_path / "latents")
    shutil.copytree(tmp_path / "latents", tmp_path / "linked")
    first = tmp_path / "linked" / "class0" / "0.png.npz"
    first.unlink()
    first.symlink_to(tmp_path / "latents" / "class0" / "0.png.npz")
    assert import_to(tmp_path / "cache", "mar", tmp_path / "linked").images == COUNT
    shutil.rmtree(tmp_path / "linked" / "class1")
    (tmp_path / "linked" / "class1").symlink_to(tmp_path / "latents" / "class1")
    with pytest.raises(RepaError):
        import_to(tmp_path / "cache", "mar", tmp_path / "linked")
