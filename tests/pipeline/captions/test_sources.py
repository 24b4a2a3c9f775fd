"""Captions of COCO, tables, tars and data sets, each matched to its image."""

from __future__ import annotations

import io
import json
import tarfile
from typing import TYPE_CHECKING

import pytest
from captioned_images import CAPTIONS, save_coco, save_images
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from repa.data.errors import RepaError
from repa.data.format.captions import number_captions
from repa.pipeline.captions.base import ImageCaptions, matched_captions
from repa.pipeline.captions.files import captions_in_file
from repa.pipeline.captions.open import open_captions
from repa.pipeline.captions.samples import captions_in_data_set, captions_in_tars
from repa.pipeline.config import PreprocessConfig
from repa.pipeline.images.open import open_source

if TYPE_CHECKING:
    from pathlib import Path

KEYS = [f"train/picture_{row:03d}.png" for row in range(len(CAPTIONS))]
EXPECTED = [[each.strip() for each in own] for own in CAPTIONS]


def in_file(path: Path, column: str | None = None, per_image: int | None = None) -> ImageCaptions:
    return captions_in_file(path, KEYS, column=column, per_image=per_image)


def test_captions_of_coco_are_matched_by_file_name(tmp_path: Path) -> None:
    save_coco(tmp_path / "captions.json")
    found = in_file(tmp_path / "captions.json")
    assert found.of_images == EXPECTED
    assert (found.count, found.without, found.strangers, found.left_out) == (9, 1, 1, 0)
    cut = in_file(tmp_path / "captions.json", per_image=2)
    assert cut.of_images == [own[:2] for own in EXPECTED]
    assert cut.left_out == 1
    with pytest.raises(RepaError) as caught:
        in_file(tmp_path / "captions.json", column="text")
    assert caught.value.field == "--caption-column"


def test_tables_name_a_file_and_its_captions(tmp_path: Path) -> None:
    lines = tmp_path / "captions.jsonl"
    rows = [{"file_name": key, "text": own} for key, own in zip(KEYS, CAPTIONS, strict=True)]
    lines.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert in_file(lines).of_images == EXPECTED
    assert in_file(lines, column="text").of_images == EXPECTED
    table = tmp_path / "captions.csv"
    pairs = [(key, each) for key, own in zip(KEYS, CAPTIONS, strict=True) for each in own]
    table.write_text("image,caption\n" + "".join(f'{key},"{each}, it is"\n' for key, each in pairs))
    expected = [[f"{each}, it is" for each in own] for own in CAPTIONS]
    assert in_file(table).of_images == expected
    tabs = tmp_path / "captions.tsv"
    tabs.write_text(
        "words\tfilename\n" + "".join(f"{each}\t{key.rpartition('/')[2]}\n" for key, each in pairs)
    )
    assert in_file(tabs, column="words").of_images == EXPECTED


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", "{}"),
        (
            "a.json",
            '{"images": [{"id": 1, "file_name": "x"}], "annotations": [{"image_id": 2, "caption": "a"}]}',
        ),
        (
            "a.json",
            '{"images": [{"id": 1, "file_name": 3}], "annotations": [{"image_id": 1, "caption": "a"}]}',
        ),
        ("a.json", "no json"),
        ("a.jsonl", "[1]"),
        ("a.jsonl", '{"file_name": "picture_000.png", "text": 3}'),
        ("a.jsonl", '{"text": "a"}'),
        ("a.jsonl", '{"file_name": "picture_000.png", "words": "a"}'),
        ("a.jsonl", '{"file_name": "picture_000.png", "text": "\\ud800"}'),
        ("a.jsonl", '{"file_name": "of_another_set.png", "text": "a"}'),
        ("a.csv", "file,caption\npicture_000.png,one,two\n"),
    ],
)
def test_files_that_are_none_are_refused(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(RepaError) as caught:
        in_file(path)
    assert str(caught.value).count("\n") == 0
    assert caught.value.remedy


def test_a_file_name_of_several_images_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("file,caption\nx.png,one\n")
    with pytest.raises(RepaError) as caught:
        captions_in_file(path, ["a/x.png", "b/x.png"], column=None, per_image=None)
    assert caught.value.field == "--captions"
    path.write_text("file,caption\nb/x.png,one\n")
    found = captions_in_file(path, ["a/x.png", "b/x.png"], column=None, per_image=None)
    assert found.of_images == [[], ["one"]]


def test_captions_lie_beside_the_images_of_tars(tmp_path: Path) -> None:
    save_images(tmp_path / "images")
    path = tmp_path / "part-0.tar"
    with tarfile.open(path, "w") as tar:
        for row, own in enumerate(CAPTIONS):
            members = {"png": (tmp_path / "images" / f"picture_{row:03d}.png").read_bytes()}
            if row % 2:
                members["json"] = json.dumps({"caption": own, "other": "words"}).encode()
            elif own:
                members["txt"] = own[0].encode()
                members["json"] = json.dumps({"caption": "not this", "other": "words"}).encode()
            for field, data in members.items():
                info = tarfile.TarInfo(f"picture_{row:03d}.{field}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    images = open_source(str(path), labels="none")
    found = captions_in_tars(str(path), images.keys, column=None, per_image=None)
    assert found.of_images == [own if row % 2 else own[:1] for row, own in enumerate(EXPECTED)]
    other = captions_in_tars(str(path), images.keys, column="other", per_image=None)
    # the third has neither
    assert other.of_images == [["words"] if own else [] for own in EXPECTED]
    # where nothing else is said, they are those of the images
    config = PreprocessConfig(
        data=str(path), cache=tmp_path / "none", encoders=(), text_encoders=("clip-l-text",)
    )
    assert open_captions(config, images).of_images == found.of_images


def test_captions_are_a_column_of_a_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pictures = [Image.new("RGB", (8, 8), (row, 0, 0)) for row in range(len(CAPTIONS))]
    data = datasets.Dataset.from_dict(
        {"image": pictures, "label": [0] * len(CAPTIONS), "sentences": CAPTIONS},
        features=datasets.Features(
            {
                "image": datasets.Image(),
                "label": datasets.ClassLabel(names=["one"]),
                "sentences": datasets.Sequence(datasets.Value("string")),
            }
        ),
    )
    data.save_to_disk(str(tmp_path / "set"))
    place = f"hf:{tmp_path / 'set'}"
    images = open_source(place, limit=3)
    found = captions_in_data_set(place, images.keys, column=None, per_image=None)
    assert found.of_images == [EXPECTED[row] for row in (0, 2, 4)]
    with pytest.raises(RepaError) as caught:
        captions_in_data_set(place, images.keys, column="prompt", per_image=None)
    assert caught.value.field == "--caption-column"


def test_a_folder_needs_a_file(tmp_path: Path) -> None:
    save_images(tmp_path / "images")
    config = PreprocessConfig(
        data=str(tmp_path / "images"), cache=tmp_path / "none", encoders=(), text_encoders=("clip-l-text",)
    )
    with pytest.raises(RepaError) as caught:
        open_captions(config, open_source(config.data))
    assert caught.value.field == "--captions"


@given(st.lists(st.lists(st.sampled_from(["a", "b", " a", "c ", ""]), max_size=5), min_size=1, max_size=6))
def test_numbering_gives_back_what_was_matched(captions: list[list[str]]) -> None:
    keys = [str(row) for row in range(len(captions))]
    pairs = [(key, each) for key, own in zip(keys, captions, strict=True) for each in own]
    expected = [list(dict.fromkeys(each.strip() for each in own if each.strip())) for own in captions]
    settings = {"name": "x", "kind": "table", "per_image": None, "by_file_name": True}
    if not any(expected):
        with pytest.raises(RepaError):
            matched_captions(keys, pairs, **settings)  # type: ignore[arg-type]
        return
    found = matched_captions(keys, pairs, **settings)  # type: ignore[arg-type]
    assert found.of_images == expected
    texts, table = number_captions(found.of_images)
    assert len(set(texts)) == len(texts)
    assert texts[0] == ""
    again = [[texts[each] for each in own if each > 0] for own in table.tolist()]
    assert again == expected
