"""What is damaged is encoded again to the bytes that were committed; random rows are what images give."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from repa.commands.cache.reencoding import verify_by_reencoding
from repa.commands.cache.repair import repair
from repa.commands.preprocess import PreprocessFlags, preprocess
from repa.data.errors import CacheError, RepaError
from repa.data.format.columns import ColumnSpec, source_of
from repa.data.format.layout import calibration_file, commit_file, shard_file
from repa.data.format.opening import open_manifest
from repa.data.testing import folder_contents
from repa.data.upkeep.verify import verify_cache
from repa.data.writing.writer import SourceWriter
from repa.pipeline.replay.recorded import Given, recorded_config
from repa.pipeline.replay.reencode import reencode
from rich.console import Console
from safetensors.torch import load_file, save_file

SIDE, CLASSES, EACH, SHARD_ROWS = 16, 3, 4, 4


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve PNG files of noise in three class folders, one of them broken."""
    folder = tmp_path_factory.mktemp("repair") / "pictures"
    generator = np.random.default_rng(0)
    for label in range(CLASSES):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(EACH):
            pixels = generator.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{number}.png")
    (folder / "class1" / "2.png").write_bytes(b"no picture")
    return folder


def encode(pictures: Path, cache: Path, **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "data": str(pictures),
        "cache": cache,
        "encoders": ["demo"],
        "vae": "demo",
        "resolution": SIDE,
        "batch_size": 3,
        "shard_rows": SHARD_ROWS,
    }
    preprocess(PreprocessFlags(**{**settings, **changes}), console=quiet())
    return cache


# float16 tokens, then attention of two blocks cut to a rank in int8 and compressed: two commands, two forms
@pytest.fixture(scope="module")
def whole(pictures: Path) -> Path:
    cache = encode(pictures, pictures.parent / "whole")
    return encode(pictures, cache, attention="3,4", attention_rank=8)


@pytest.fixture
def cache(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "cache"))


def mend(cache: Path, pictures: Path, **changes: Any) -> str:
    output = io.StringIO()
    given: dict[str, Any] = {"data": str(pictures), "console": Console(file=output, width=300)}
    repair(cache=cache, **{**given, **changes})
    return output.getvalue()


def flip(file: Path, offset: int = 3) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= 4
    file.write_bytes(content)


def data_file(cache: Path, column: str, shard: int) -> Path:
    return shard_file(cache, column, open_manifest(cache).columns[column], shard)


def damage_rows(cache: Path) -> None:
    for column in ("sd-vae/moments", "demo/patch", "demo/k"):
        flip(data_file(cache, column, 1))


def damage_index(cache: Path) -> None:
    flip(data_file(cache, "demo/cls", 2), -1)
    flip(data_file(cache, "demo/q-scale", 0), -5)


def lose_files(cache: Path) -> None:
    data_file(cache, "demo/patch", 0).unlink()
    commit_file(cache, "sd-vae", 2).unlink()
    (cache / "demo" / "q" / "zarr.json").unlink()


def damage_tables(cache: Path) -> None:
    flip(cache / "keys.txt")
    flip(cache / "label" / "c" / "0")
    flip(cache / "sd-vae" / "moments" / "zarr.json", 40)


def damage_records(cache: Path) -> None:
    for shard in range(3):
        flip(commit_file(cache, "demo+attention", shard), 20)


def damage_calibration(cache: Path) -> None:
    flip(calibration_file(cache, "demo+attention"), -3)


def lose_calibration(cache: Path) -> None:
    calibration_file(cache, "demo+attention").unlink()
    flip(data_file(cache, "demo/q", 1))


@pytest.mark.parametrize(
    "damage",
    [
        damage_rows,
        damage_index,
        lose_files,
        damage_tables,
        damage_records,
        damage_calibration,
        lose_calibration,
    ],
)
def test_repaired_it_is_byte_for_byte_the_cache_that_was(
    damage: Callable[[Path], None], cache: Path, whole: Path, pictures: Path
) -> None:
    damage(cache)
    assert verify_cache(cache)
    said = mend(cache, pictures)
    assert folder_contents(cache) == folder_contents(whole)
    assert "not the bytes that were committed" not in said
    assert said.rstrip().endswith(f"{cache}: all is as committed")


def test_only_the_bad_shards_are_written(cache: Path, pictures: Path) -> None:
    times = {file: file.stat().st_mtime_ns for file in cache.rglob("*") if file.is_file()}
    flip(data_file(cache, "demo/patch", 1))
    said = mend(cache, pictures)
    assert "1 shard of demo to encode (1 row known to be bad)" in said
    assert "demo: 1 encoded again, 1 byte for byte as committed" in said
    written = {
        file for file in cache.rglob("*") if file.is_file() and times.get(file) != file.stat().st_mtime_ns
    }
    own = {data_file(cache, column, 1) for column in ("demo/patch", "demo/cls")}
    assert written == {*own, commit_file(cache, "demo", 1)}


def test_killed_in_the_middle_it_goes_on(
    cache: Path, whole: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shard in (0, 2):
        flip(data_file(cache, "demo/patch", shard))

    class Killed(BaseException):
        pass

    import repa.pipeline.replay.repair as module

    def die(*arguments: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_columns", die)
        with pytest.raises(Killed):
            mend(cache, pictures)
    assert not commit_file(cache, "demo", 0).exists()
    assert commit_file(cache, "demo", 1).exists()
    said = mend(cache, pictures)
    assert "2 encoded again, 2 without a record to compare with" in said
    assert folder_contents(cache) == folder_contents(whole)


def test_nothing_to_repair(cache: Path, pictures: Path) -> None:
    before = folder_contents(cache)
    assert "all is as committed: nothing to repair" in mend(cache, pictures)
    assert folder_contents(cache) == before


def test_what_is_not_the_caches_stays_and_is_said(cache: Path, pictures: Path) -> None:
    (cache / "notes.txt").write_text("mine")
    data_file(cache, "demo/patch", 1).with_name(".0.partial").write_bytes(b"left")
    with pytest.raises(SystemExit, match="1"):
        mend(cache, pictures)
    assert [finding.path for finding in verify_cache(cache)] == [cache / "notes.txt"]


def other_weights(pictures: Path) -> Path:
    from repa.pipeline import demo

    file = next(Path(demo.__file__).parent.glob("*.safetensors"))
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1
    changed = pictures.parent / "changed.safetensors"
    save_file(tensors, changed)
    return changed


def test_other_weights_or_images_are_refused_before_anything_is_touched(
    cache: Path, pictures: Path, tmp_path: Path
) -> None:
    flip(data_file(cache, "demo/patch", 1))
    before = folder_contents(cache)
    weights = (f"demo={other_weights(pictures)}",)
    with pytest.raises(
        CacheError, match=r"the demo at hand is not the one that wrote demo of cache .* sha256"
    ) as caught:
        mend(cache, pictures, weights=weights)
    assert "--weights demo=FILE" in str(caught.value)
    assert "\n" not in str(caught.value)
    images = Path(shutil.copytree(pictures, tmp_path / "others"))
    (images / "class0" / "0.png").write_bytes(b"another size")
    with pytest.raises(CacheError, match="of other classes or sizes in bytes; give that folder with --data"):
        mend(cache, images)
    assert folder_contents(cache) == before


def test_an_image_changed_since_is_noticed(cache: Path, pictures: Path, tmp_path: Path) -> None:
    images = Path(shutil.copytree(pictures, tmp_path / "changed"))
    for number in (0, 1, 2, 3):
        flip(images / "class1" / f"{number}.png", 60 if number != 2 else 0)
    flip(data_file(cache, "demo/patch", 1))
    said = mend(cache, images)
    assert "not the bytes that were committed: shard 1" in said


def test_a_damaged_manifest_is_beyond_repair(cache: Path, pictures: Path) -> None:
    for name in ("zarr.json", "zarr.json.copy"):
        text = (cache / name).read_text()
        (cache / name).write_text(text.replace("adm-center", "adm-centre"))
    with pytest.raises(CacheError, match="does not match its checksum; restore it, or write"):
        mend(cache, pictures)


def test_the_command_is_read_from_the_manifest(pictures: Path, tmp_path: Path) -> None:
    given = Given(data=str(pictures), vae=None, weights={})
    cache = encode(
        pictures,
        tmp_path / "c",
        feature_dtype="int8",
        compress="zstd",
        apply_exif=True,
        attention="2",
        attention_kl=1.0,
    )
    manifest = open_manifest(cache)
    tokens = recorded_config(cache, manifest, "demo", given)
    assert (tokens.feature_dtype, tokens.compress, tokens.batch_size, tokens.apply_exif) == (
        "int8",
        "zstd",
        3,
        True,
    )
    assert (tokens.attention, tokens.vae, tokens.shard_rows) == ({}, "demo", SHARD_ROWS)
    attention = recorded_config(cache, manifest, "demo+attention", given)
    assert (attention.attention, attention.attention_kl, attention.attention_rank) == (
        {"demo": (2,)},
        1.0,
        None,
    )
    flip(data_file(cache, "demo/q", 0))
    flip(data_file(cache, "demo/patch-scale", 0))
    copy = folder_contents(
        Path(
            shutil.copytree(
                encode(
                    pictures,
                    tmp_path / "d",
                    feature_dtype="int8",
                    compress="zstd",
                    apply_exif=True,
                    attention="2",
                    attention_kl=1.0,
                ),
                tmp_path / "e",
            )
        )
    )
    mend(cache, pictures)
    assert folder_contents(cache) == copy


@pytest.mark.parametrize("changes", [{}, {"feature_dtype": "float32"}, {"feature_dtype": "int8"}])
def test_random_rows_are_what_the_images_give_bit_for_bit(
    changes: dict[str, Any], pictures: Path, tmp_path: Path
) -> None:
    cache = encode(pictures, tmp_path / "cache", attention="3,4", **changes)
    given = Given(data=str(pictures), vae=None, weights={})
    found = reencode(cache, given, rows=5, seed=1)
    assert [each.column for each in found] == ["sd-vae/moments", "demo/patch", "demo/cls", "demo/q", "demo/k"]
    for each in found:
        assert (each.rows, each.identical, each.outside) == (5, 5, [])
        # a rounded number lies up to half a step from what it was rounded from
        rounded = open_manifest(cache).columns[each.column].dtype != "float32"
        assert (0.1 < each.largest <= 1) if rounded else each.largest == 0
    everything = reencode(cache, given, rows=100)
    assert {each.rows for each in everything} == {CLASSES * EACH - 1}


def rewrite(cache: Path, column: str, change: Callable[[np.ndarray[Any, Any]], None]) -> None:
    """Change row 5 of a column, with checksums that are right: what only encoding again can find."""
    from repa.data.reading.reader import CacheReader

    manifest = open_manifest(cache)
    specs: dict[str, ColumnSpec] = manifest.source_columns(source_of(column))
    rows = np.array([4, 5, 7])
    values = {name: np.empty((3, *spec.shape), spec.numpy_dtype) for name, spec in specs.items()}
    with CacheReader(cache, tuple(specs)) as reader:
        reader.read_rows(rows, tuple(specs), values)
    change(values[column][1])
    with SourceWriter(cache, manifest, source_of(column), [1]) as writer, writer.shard(1) as shard:
        shard.mark_invalid(6, "not a JPEG, PNG or WebP image")
        for position, row in enumerate(rows.tolist()):
            for name in specs:
                shard.write(row, name, values[name][position][None])
        shard.commit()


@pytest.mark.parametrize(
    ("column", "kept", "broken"),
    [
        # the next float16; as many as leave its rounding
        ("demo/patch", lambda row: None, lambda row: row.__setitem__((0, 0), row[0, 0] + np.float16(1))),
        ("sd-vae/moments", lambda row: row.__iadd__(1e-6), lambda row: row.__iadd__(0.5)),
        ("demo/q", lambda row: None, lambda row: row.__setitem__((0, 0, 0, 0), row[0, 0, 0, 0] ^ 64)),
    ],
)
def test_a_row_that_is_not_of_its_image_is_found(
    column: str, kept: Any, broken: Any, cache: Path, pictures: Path
) -> None:
    given = Given(data=str(pictures), vae=None, weights={})
    rewrite(cache, column, kept)
    assert verify_cache(cache) == []
    assert all(each.kept for each in reencode(cache, given, rows=100))
    rewrite(cache, column, broken)
    assert verify_cache(cache) == []
    found = reencode(cache, given, rows=100)
    assert {each.column: each.outside for each in found if not each.kept} == {column: [5]}
    assert {each.identical for each in found if each.column == column} == {CLASSES * EACH - 2}
    output = io.StringIO()
    with pytest.raises(SystemExit, match="1"):
        verify_by_reencoding(
            cache=cache, rows=100, data=str(pictures), console=Console(file=output, width=300)
        )
    assert f"{column} of image class1/1.png (row 5) is not what is computed of it now" in output.getvalue()


def test_reencode_prints_a_line_a_column_and_refuses_nothing_to_do(cache: Path, pictures: Path) -> None:
    output = io.StringIO()
    verify_by_reencoding(cache=cache, rows=2, data=str(pictures), console=Console(file=output, width=300))
    lines = output.getvalue().splitlines()
    for column in ("sd-vae/moments", "demo/patch", "demo/cls", "demo/q", "demo/k"):
        assert any(
            re.match(rf"{column} +2 +2 +[01]\.\d\d of what is allowed +0.0001", line) for line in lines
        )
    assert lines[-1].endswith("what is stored is what the images give, within its rounding")
    with pytest.raises(RepaError, match="--reencode 0 compares nothing"):
        verify_by_reencoding(cache=cache, rows=0, data=str(pictures))


def test_flags_that_contradict_one_another(cache: Path) -> None:
    from repa.cli import run_command

    for words, message in (
        (("--fidelity", "--reencode", "3"), "exclude one another"),
        (("--reencode", "3", "--rows", "4"), "--rows is of --fidelity"),
        (("--data", "x"), "add --fidelity"),
    ):
        with pytest.raises(RepaError, match=message):
            run_command(("cache", "verify", str(cache), *words))
