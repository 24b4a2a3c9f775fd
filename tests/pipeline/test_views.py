"""A cache of two views: the mirrored view is what a cache of mirrored images holds, bit for bit."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import zarr
from PIL import Image
from repa.commands.cache.merge import merge
from repa.commands.cache.repair import repair
from repa.commands.parity.flags import ParityFlags
from repa.commands.parity.run import parity
from repa.commands.preprocess import PreprocessFlags, make_config, preprocess
from repa.data.errors import CacheError, RepaError
from repa.data.format.columns import LABEL, MOMENTS
from repa.data.format.layout import calibration_file, commit_file, shard_file
from repa.data.format.opening import open_manifest
from repa.data.tars.export import export_cache, export_pattern, import_cache
from repa.data.testing import folder_contents, synthetic_cache
from repa.data.upkeep.drop import drop_source
from repa.data.upkeep.verify import verify_cache
from repa.data.writing.writer import SourceWriter
from repa.pipeline.images.pixels import center_crop_adm
from repa.pipeline.images.views import in_view
from repa.pipeline.plan import make_plan
from repa.pipeline.replay.fidelity import check_fidelity
from repa.pipeline.replay.live import LiveTeachers
from repa.pipeline.replay.recorded import Given
from repa.pipeline.replay.reencode import reencode
from rich.console import Console

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIDE, BROKEN = 16, 4
VIEWS = ("original", "mirrored")
FORMS: dict[str, dict[str, Any]] = {
    "exact": {"feature_dtype": "float32", "attention": "4,6"},
    "int8": {"feature_dtype": "int8", "attention": "4,6"},
    "factored": {"attention": "4,6", "attention_bytes": 1000},
}


SMALL = [
    "method.depth=2",
    "method.projector_width=8",
    "method.teacher_blocks=[4,6]",
    "method.student_blocks=[2,3]",
]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def written(data: Path, cache: Path, **changes: Any) -> Path:
    """A cache in shards of 4 images and batches of 3, so that each shard has a smaller batch."""
    flags: dict[str, Any] = {
        "data": str(data),
        "cache": cache,
        "encoders": ["demo"],
        "vae": "demo",
        "resolution": SIDE,
        "batch_size": 3,
        "shard_rows": 4,
    }
    preprocess(PreprocessFlags(**{**flags, **changes}), console=quiet())
    return cache


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images whose crop has an odd margin, one of them broken; and ``mirrored``, their crops mirrored."""
    root = tmp_path_factory.mktemp("views")
    generator = np.random.default_rng(0)
    for name in ("images", "mirrored"):
        (root / name / "a").mkdir(parents=True)
    for number in range(10):
        image = Image.fromarray(generator.integers(0, 256, (SIDE + 2, SIDE + 7, 3), np.uint8))
        image.save(root / "images" / "a" / f"{number}.png")
        crop = center_crop_adm(image, SIDE)
        Image.fromarray(np.ascontiguousarray(crop[:, ::-1])).save(root / "mirrored" / "a" / f"{number}.png")
    for name in ("images", "mirrored"):
        (root / name / "a" / f"{BROKEN}.png").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def caches(folder: Path) -> dict[str, Path]:
    """Form → cache of both views."""
    return {form: written(folder / "images", folder / form, views="flip", **FORMS[form]) for form in FORMS}


@pytest.mark.parametrize("form", ["exact", "int8"])
def test_each_view_is_that_of_a_cache_of_its_own(form: str, folder: Path, caches: dict[str, Path]) -> None:
    both = zarr.open_group(caches[form], mode="r")
    alone = [
        zarr.open_group(written(folder / name, folder / f"{form} {name}", **FORMS[form]), mode="r")
        for name in ("images", "mirrored")
    ]
    names = [name for name in open_manifest(caches[form]).columns if name != LABEL]
    assert len(names) == {"exact": 5, "int8": 8}[form]
    for name in names:
        stored: NDArray[Any] = np.asarray(both[name])
        assert stored.shape[1] == 2
        for view, group in enumerate(alone):
            assert stored[:, view : view + 1].tobytes() == np.asarray(group[name]).tobytes(), name
        assert not np.array_equal(stored[0, 0], stored[0, 1])
    # a network does not commute with mirroring: the mirrored latent is another
    moments = np.asarray(both[MOMENTS])
    assert np.abs(moments[0, 1] - moments[0, 0, ..., ::-1]).max() > 1e-3


def test_mirroring_is_exact_and_its_own_inverse() -> None:
    pixels = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4)
    mirrored = in_view(pixels, "mirrored")
    assert mirrored[1, 2, 3].tolist() == pixels[1, 2, 3].tolist()[::-1]
    assert torch.equal(in_view(mirrored, "mirrored"), pixels)
    assert torch.equal(in_view(pixels, "original"), pixels)


@pytest.mark.parametrize("form", list(FORMS))
def test_verify_encodes_both_views_again_to_the_bit(form: str, folder: Path, caches: dict[str, Path]) -> None:
    assert verify_cache(caches[form]) == []
    found = reencode(caches[form], Given(data=str(folder / "images"), vae=None, weights={}), rows=5)
    assert {each.column for each in found} == {MOMENTS, "demo/patch", "demo/cls", "demo/q", "demo/k"}
    assert all((each.rows, each.identical, each.outside) == (5, 5, []) for each in found)


@pytest.mark.parametrize("form", ["int8", "factored"])
def test_calibrations_are_of_both_views(form: str, folder: Path, caches: dict[str, Path]) -> None:
    sources = open_manifest(caches[form]).sources
    notes = sources["demo+attention"].notes
    # nine images can be decoded: six to fit to and three held out, each in two views
    assert notes["fidelity"]["images"] == 6
    assert notes["calibration"]["images"] == (12 if form == "factored" else 0)
    if form == "int8":
        assert sources["demo"].notes["fidelity"]["images"] == 6
    found = check_fidelity(caches[form], data=str(folder / "images"), rows=9, weights={})
    assert found
    assert all(each.kept for each in found)


def test_a_mirrored_view_of_another_image_is_found(
    folder: Path, caches: dict[str, Path], tmp_path: Path
) -> None:
    """By nothing but encoding again: the bytes are well, and of another image."""
    cache = Path(shutil.copytree(caches["exact"], tmp_path / "cache"))
    manifest = open_manifest(cache)
    group = zarr.open_group(cache, mode="r")
    values = {name: np.asarray(group[name])[:4] for name in ("demo/patch", "demo/cls")}
    values["demo/patch"][2, 1] = values["demo/patch"][3, 1]
    with SourceWriter(cache, manifest, "demo", [0]) as writer, writer.shard(0) as shard:
        for name, rows in values.items():
            for row in range(4):
                shard.write(row, name, rows[row])
        shard.commit()
    assert verify_cache(cache) == []
    given = Given(data=str(folder / "images"), vae=None, weights={})
    found = {each.column: each for each in reencode(cache, given, rows=10)}
    assert found["demo/patch"].outside == [2]
    assert found["demo/cls"].outside == []


@pytest.mark.parametrize("form", ["exact", "factored"])
def test_resumed_repaired_and_by_two_processes_it_is_the_same(
    form: str, folder: Path, caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Path(shutil.copytree(caches[form], tmp_path / "cache"))
    expected = folder_contents(caches[form])
    for source in ("sd-vae", "demo+attention"):
        commit_file(cache, source, 1).unlink()
    # what the cache has need not be said again
    written(folder / "images", cache, **FORMS[form])
    assert folder_contents(cache) == expected
    for column, shard in (("demo/q", 0), (MOMENTS, 2)):
        file = shard_file(cache, column, open_manifest(cache).columns[column], shard)
        content = bytearray(file.read_bytes())
        content[-40] ^= 4
        file.write_bytes(content)
    if form == "factored":
        calibration_file(cache, "demo+attention").write_bytes(b"no calibration")
    repair(cache=cache, data=str(folder / "images"), console=quiet())
    assert folder_contents(cache) == expected
    if form == "factored":
        for rank in (1, 0):
            for name, value in {
                "RANK": rank,
                "WORLD_SIZE": 2,
                "LOCAL_RANK": rank,
                "LOCAL_WORLD_SIZE": 2,
            }.items():
                monkeypatch.setenv(name, str(value))
            written(folder / "images", tmp_path / "two", views="flip", **FORMS[form])
        assert folder_contents(tmp_path / "two") == expected


def test_a_teacher_that_comes_later_is_written_in_both_views(
    folder: Path, caches: dict[str, Path], tmp_path: Path
) -> None:
    cache = written(folder / "images", tmp_path / "cache", views="flip", encoders=["none"])
    written(folder / "images", cache, **FORMS["exact"])
    assert open_manifest(cache).views == VIEWS
    assert folder_contents(cache) == folder_contents(caches["exact"])
    drop_source(cache, "demo+attention")
    written(folder / "images", cache, views="flip", **FORMS["exact"])
    assert folder_contents(cache) == folder_contents(caches["exact"])


def test_a_cache_keeps_its_views(folder: Path, caches: dict[str, Path], tmp_path: Path) -> None:
    one = written(folder / "images", tmp_path / "one")
    assert open_manifest(one).views == ("original",)
    for cache, views in ((one, "flip"), (caches["exact"], "original")):
        before = folder_contents(cache)
        with pytest.raises(CacheError):
            written(folder / "images", cache, views=views, encoders=["none"])
        assert folder_contents(cache) == before
    with pytest.raises(RepaError) as caught:
        make_config(PreprocessFlags(data="demo", views="mirrored"))
    assert caught.value.field == "--views"


def test_parts_of_two_views_join(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    for name in ("whole", "first", "second"):
        for label in ("a", "b") if name == "whole" else ("a",) if name == "first" else ("b",):
            (tmp_path / name / label).mkdir(parents=True)
    for number, label in enumerate("aaaabbb"):
        image = Image.fromarray(generator.integers(0, 256, (SIDE, SIDE, 3), np.uint8))
        for name in ("whole", "first" if label == "a" else "second"):
            image.save(tmp_path / name / label / f"{number}.png")
    caches = {
        name: written(tmp_path / name, tmp_path / f"{name} cache", views="flip")
        for name in ("whole", "first", "second")
    }
    one = written(tmp_path / "second", tmp_path / "one view")
    with pytest.raises(CacheError):
        merge(parts=[caches["first"], one], cache=tmp_path / "none", console=quiet())
    assert not (tmp_path / "none" / "zarr.json").exists()
    parts = [caches["first"], caches["second"]]
    merge(parts=parts, cache=tmp_path / "merged", data=str(tmp_path / "whole"), console=quiet())
    assert folder_contents(tmp_path / "merged") == folder_contents(caches["whole"])


def test_views_that_nobody_here_can_encode(folder: Path, tmp_path: Path) -> None:
    synthetic_cache(tmp_path / "cache", num_rows=4, views=("original", "turned"))
    for attempt in (
        lambda: written(folder / "images", tmp_path / "cache"),
        lambda: LiveTeachers(tmp_path / "cache", data=str(folder / "images"), encoders=("demo",)),
    ):
        with pytest.raises(CacheError) as caught:
            attempt()
        assert caught.value.field == "--views"


def test_through_tars_and_back_bit_for_bit(caches: dict[str, Path], tmp_path: Path) -> None:
    export_cache(caches["factored"], tmp_path / "tars")
    import_cache(export_pattern(tmp_path / "tars", 3), tmp_path / "cache")
    assert folder_contents(tmp_path / "cache") == folder_contents(caches["factored"])


def test_live_teachers_see_the_view_that_is_asked_for(folder: Path, caches: dict[str, Path]) -> None:
    live = LiveTeachers(caches["exact"], data=str(folder / "images"), encoders=("demo",), blocks=(4, 6))
    try:
        live.load(torch.device("cpu"))
        group = zarr.open_group(caches["exact"], mode="r")
        rows = np.array([9, 0, 0, 3, 2, 8, 1])
        views = np.array([1, 1, 0, 0, 1, 0, 1])
        names = ("demo/patch", "demo/q", "demo/k")
        targets = live(rows, names, views)
    finally:
        live.close()
    for name in names:
        assert np.array_equal(targets[name].numpy(), np.asarray(group[name])[rows, views]), name


def test_parity_tells_of_each_view(folder: Path, caches: dict[str, Path]) -> None:
    def compared(form: str) -> dict[str, Any]:
        return parity(
            ParityFlags(
                method="haste",
                model="SiT-T/1",
                cache=str(caches[form]),
                batches=1,
                batch_size=4,
                data=str(folder / "images"),
                assignments=SMALL,
            ),
            console=quiet(),
        )

    exact, rounded = compared("exact"), compared("int8")
    assert list(exact) == list(rounded) == list(VIEWS)
    for each in exact.values():
        assert all(term.largest == 0 for term in each.terms.values())
        assert [column.largest for column in each.columns.values()] == [0, 0, 0]
    losses = [each.terms["loss"].live[0] for each in exact.values()]
    assert losses[0] != losses[1]
    assert losses == [each.terms["loss"].live[0] for each in rounded.values()]
    assert all(0 < each.columns["demo/patch"].largest < 0.1 for each in rounded.values())


def test_the_plan_counts_both_views(folder: Path, tmp_path: Path) -> None:
    def planned(**changes: Any) -> Any:
        flags = PreprocessFlags(
            data=str(folder / "images"),
            cache=tmp_path / "cache",
            encoders=["demo"],
            vae="demo",
            resolution=SIDE,
            shard_rows=1024,
            **changes,
        )
        return make_plan(make_config(flags))

    one, two = planned(), planned(views="flip")
    assert (one.rows, two.rows) == (10, 10)
    columns = sum(len(source.columns) for source in one.sources)
    # the checksum of an index is one, however many rows and views it has
    assert two.bytes == 2 * one.bytes - 4 * columns
