"""Where labels come from: a dataset.json, folders, nothing; and what is said of sets that look otherwise."""

from __future__ import annotations

import json
from io import BytesIO
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from repa.data.errors import RepaError
from repa.pipeline.images.dataset_json import labels_of, parse_dataset_json
from repa.pipeline.images.open import open_source
from repa.pipeline.summary import passed_over

if TYPE_CHECKING:
    from pathlib import Path


def png() -> bytes:
    stream = BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    return stream.getvalue()


def write(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png())
    return root


NAMES = ("00000/img00000000.png", "00000/img00000001.png", "00001/img00001000.png")


def edm2(root: Path, labels: Any) -> Path:
    """A folder as dataset_tool writes it."""
    write(root, *NAMES)
    (root / "dataset.json").write_text(json.dumps({"labels": labels}))
    return root


def test_labels_of_a_dataset_json(tmp_path: Path) -> None:
    root = edm2(tmp_path, [[NAMES[2], 4], [NAMES[0], 7], [NAMES[1], 0]])
    source = open_source(str(root))
    assert list(source.keys) == list(NAMES)
    assert source.labels.tolist() == [7, 0, 4]
    assert source.class_names == tuple("01234567")
    assert (source.skipped, source.remarks, source.kind) == ([], (), "folder")
    assert open_source(str(root), limit=2).labels.tolist() == [7, 0]
    names = tmp_path / "names.txt"
    names.write_text("\n".join("abcdefgh"))
    assert open_source(str(root), class_names=names).class_names == tuple("abcdefgh")
    names.unlink()
    folders = open_source(str(root), labels="folders")
    assert (folders.labels.tolist(), folders.class_names) == ([0, 0, 1], ("00000", "00001"))
    nothing = open_source(str(root), labels="none")
    assert (nothing.labels.tolist(), nothing.class_names) == ([0, 0, 0], ("images",))
    assert len({source.fingerprint, folders.fingerprint, nothing.fingerprint}) == 3


def test_a_set_without_classes(tmp_path: Path) -> None:
    source = open_source(str(edm2(tmp_path, None)))
    assert (source.labels.tolist(), source.class_names) == ([0, 0, 0], ("images",))
    assert len(source.remarks) == 1


def test_another_tools_file_of_that_name_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path, "a/1.png", "b/2.png")
    before = open_source(str(tmp_path)).fingerprint
    for text in ('{"name": "mine"}', '{"about": {"labels": 3}}', "no JSON"):
        (tmp_path / "dataset.json").write_text(text)
        source = open_source(str(tmp_path))
        assert source.fingerprint == before
        assert [path for path, _ in source.skipped] == ["dataset.json"]
        with pytest.raises(RepaError) as caught:
            open_source(str(tmp_path), labels="dataset.json")
        assert caught.value.field == "--labels"


@pytest.mark.parametrize(
    "labels",
    [
        [[NAMES[0], 1]],  # two are missing
        [[name, -1] for name in NAMES],
        [[name, 2**31] for name in NAMES],
        [[name, 10**4000] for name in NAMES],
        [[name, 1.5] for name in NAMES],
        [[name, "1"] for name in NAMES],
        [[name, True] for name in NAMES],
        [[name, [0, 1]] for name in NAMES],
        [[name] for name in NAMES],
        dict.fromkeys(NAMES, 0),
        3,
    ],
)
def test_labels_that_are_none(tmp_path: Path, labels: Any) -> None:
    root = edm2(tmp_path, labels)
    with pytest.raises(RepaError) as caught:
        open_source(str(root))
    assert "--labels" in str(caught.value)
    assert len(str(caught.value)) < 500


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_any_content_is_labels_or_an_error(value: Any) -> None:
    raw = json.dumps({"labels": value}).encode()
    try:
        found = parse_dataset_json(raw, "x/dataset.json")
        labels = labels_of(found, [], "x/dataset.json")[0] if found else []
    except RepaError:
        return
    assert len(labels) == 0


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("train/a/1.png", "train/b/1.png", "val/a/1.png"), "train"),
        (("train2017/1.png", "val2017/1.png"), "train2017"),
        (("imagenet/a/1.png", "imagenet/b/1.png"), "imagenet"),
    ],
)
def test_folders_above_the_classes_are_said(tmp_path: Path, names: tuple[str, ...], said: str) -> None:
    (remark,) = open_source(str(write(tmp_path, *names))).remarks
    assert f"--data {tmp_path}/{said}" in remark


@pytest.mark.parametrize(
    "names", [("a/1.png", "b/1.png"), ("train/1.png", "cat/1.png"), ("a/x/1.png", "b/y/1.png"), ("1.png",)]
)
def test_usual_folders_are_left_in_peace(tmp_path: Path, names: tuple[str, ...]) -> None:
    assert open_source(str(write(tmp_path, *names))).remarks == ()


def test_no_labels_takes_whatever_lies_anywhere(tmp_path: Path) -> None:
    root = write(tmp_path, "1.png", "train/2.png", "train/deep/3.png")
    (root / "annotations").mkdir()
    (root / "annotations" / "captions.json").write_text("{}")
    with pytest.raises(RepaError) as caught:
        open_source(str(root))
    assert caught.value.field == "--labels"
    source = open_source(str(root), labels="none")
    assert list(source.keys) == ["1.png", "train/2.png", "train/deep/3.png"]
    assert source.labels.tolist() == [0, 0, 0]


def test_flags_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    root = str(write(tmp_path, "a/1.png"))
    for options, field in (
        ({"labels": "some"}, "--labels"),
        ({"labels": "dataset.json"}, "--labels"),
        ({"class_names": tmp_path / "names"}, "--class-names"),
    ):
        with pytest.raises(RepaError) as caught:
            open_source(root, **options)  # type: ignore[arg-type]
        assert caught.value.field == field
    with pytest.raises(RepaError) as caught:
        open_source("demo", labels="none")
    assert caught.value.field == "--labels"


def test_what_is_passed_over_is_counted_by_reason(tmp_path: Path) -> None:
    write(tmp_path, "a/1.png", "a/2.tif", "a/3.TIF", "a/4.bmp", "a/.hidden.png")
    lines = passed_over(open_source(str(tmp_path)).skipped)
    assert len(lines) == 2
    assert lines[0].startswith("1 file hidden")
    assert lines[1].startswith("3 files")
    assert "2 .tif, 1 .bmp; first a/2.tif" in lines[1]
    assert "convert" in lines[1]


def test_where_there_are_no_images_the_error_says_what_there_is(tmp_path: Path) -> None:
    for name, remedy in (("a/x.tar", "*.tar"), ("b/x.zip", "x.zip"), ("c/x.txt", "sub-folders")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(RepaError) as caught:
            open_source(str((tmp_path / name).parent))
        assert remedy in caught.value.remedy
