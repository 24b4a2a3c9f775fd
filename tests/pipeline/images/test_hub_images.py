"""A Hugging Face data set on the disk as a source, and one-line errors for those that will not do."""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from repa.data.errors import RepaError
from repa.pipeline.images.base import UndecodableImage
from repa.pipeline.images.names import cache_for
from repa.pipeline.images.open import open_source
from repa.pipeline.images.workers import decode_rows
from store_on_disk import data_of_a_cache

datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()

NAMES = ["cat", "dog", "eel"]


def png(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 255 - shade, 7)).save(stream, "PNG")
    return stream.getvalue()


def data_set(count: int = 7, **columns: Any) -> Any:
    features = datasets.Features(
        {"id": datasets.Value("int64"), "image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
    )
    values = {
        "id": list(range(count)),
        "image": [{"bytes": png(row), "path": None} for row in range(count)],
        "label": [row % 3 for row in range(count)],
    }
    return datasets.Dataset.from_dict({**values, **columns}, features=features)


def test_rows_labels_and_classes(tmp_path: Path) -> None:
    data_set().save_to_disk(tmp_path / "set")
    source = open_source(f"hf:{tmp_path / 'set'}")
    assert source.kind == "hf"
    assert list(source.keys) == [f"{row:08d}" for row in range(7)]
    assert source.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert source.labels.dtype == np.int32
    assert source.class_names == tuple(NAMES)
    assert [source.load(row).getpixel((0, 0))[0] for row in (6, 0, 3)] == [6, 0, 3]
    limited = open_source(f"hf:{tmp_path / 'set'}", limit=3)
    assert list(limited.keys) == ["00000000", "00000002", "00000004"]
    assert [limited.load(row).getpixel((0, 0))[0] for row in range(3)] == [0, 2, 4]
    assert cache_for(f"hf:{tmp_path / 'set'}", 256).name == "set-256"


def test_it_travels_to_other_processes(tmp_path: Path) -> None:
    data_set().save_to_disk(tmp_path / "set")
    source = open_source(f"hf:{tmp_path / 'set'}")
    assert pickle.loads(pickle.dumps(source)).load(5).tobytes() == source.load(5).tobytes()
    with decode_rows(source, [5, 1], 8, workers=1) as decoded:
        assert [row for row, _ in decoded] == [5, 1]


def test_fingerprint_is_of_content_sizes_and_labels(tmp_path: Path) -> None:
    found = set()
    images = [{"bytes": png(row), "path": None} for row in range(7)]
    images[3] = {"bytes": png(3) + b"\0", "path": None}
    variants = (data_set(), data_set(image=images), data_set(label=[0, 1, 2, 0, 1, 2, 1]), data_set(6))
    for number, each in enumerate(variants):
        each.save_to_disk(tmp_path / str(number))
        found.add(open_source(f"hf:{tmp_path / str(number)}").fingerprint)
    assert len(found) == 4
    # the same rows behind a table of indices
    shuffled = data_set().select([6, 5, 4, 3, 2, 1, 0]).select([6, 5, 4, 3, 2, 1, 0])
    shuffled.save_to_disk(tmp_path / "again")
    assert open_source(f"hf:{tmp_path / 'again'}").fingerprint in found


def test_splits(tmp_path: Path) -> None:
    both = datasets.DatasetDict({"train": data_set(4), "test": data_set(2)})
    both.save_to_disk(tmp_path / "set")
    place = f"hf:{tmp_path / 'set'}"
    assert list(open_source(place).keys) == [f"train/{row:08d}" for row in range(4)]
    assert list(open_source(f"{place}:test").keys) == ["test/00000000", "test/00000001"]
    with pytest.raises(RepaError, match="no split val but train, test"):
        open_source(f"{place}:val")
    with pytest.raises(RepaError, match="hf: names no data set"):
        open_source("hf:")
    data_set().save_to_disk(tmp_path / "one")
    with pytest.raises(RepaError, match="has no splits"):
        open_source(f"hf:{tmp_path / 'one'}:train")


def test_files_beside_the_set_and_broken_images(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(9))
    images = [{"bytes": None, "path": str(tmp_path / "a.png")}, {"bytes": b"junk", "path": None}]
    data_set(2, image=images).save_to_disk(tmp_path / "set")
    # save_to_disk embeds files; a set in memory refers to them
    source = open_source(f"hf:{tmp_path / 'set'}")
    assert source.load(0).getpixel((0, 0))[0] == 9
    with pytest.raises(UndecodableImage, match="not a JPEG"):
        source.load(1)


def test_what_will_not_do_is_one_line(tmp_path: Path) -> None:
    def refused(what: str, data: Any) -> None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        data.save_to_disk(folder)
        with pytest.raises(RepaError, match=what) as caught:
            open_source(f"hf:{folder}")
        assert "\n" not in str(caught.value)

    twice = data_set().features.copy()
    twice["id"] = datasets.ClassLabel(names=list("0123456"))
    refused("no image features among id, label", data_set().remove_columns("image"))
    refused("no label features among id, image", data_set().remove_columns("label"))
    refused("2 label features", data_set().cast(twice))
    refused("the split has no labels", data_set(label=[0, 1, -1, 0, 0, 0, 0]))
    refused("has 1 row without a label", data_set(label=[0, 1, None, 0, 0, 0, 0]))
    refused("row 2 of .* has no image", data_set(3, image=[{"bytes": png(0), "path": None}] * 2 + [None]))


def test_sets_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, *, split: str) -> Any:
        asked.append((name, split))
        if name == "nobody/has-this":
            raise ConnectionError("Couldn't reach the hub\n(offline)")
        return data_set(3)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(open_source("hf:some/set").keys) == [f"train/0000000{row}" for row in range(3)]
    assert open_source("hf:some/set:validation").keys[0] == "validation/00000000"
    assert asked == [("some/set", "train"), ("some/set", "validation")]
    with pytest.raises(RepaError, match="data set nobody/has-this cannot be opened") as caught:
        open_source("hf:nobody/has-this")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RepaError, match=r"pip install 'repa\[hf\]'"):
        open_source("hf:some/set")


def test_integer_labels_are_named_by_number(tmp_path: Path) -> None:
    data = data_set().cast_column("label", datasets.Value("int64"))
    data.save_to_disk(tmp_path / "set")
    assert open_source(f"hf:{tmp_path / 'set'}").class_names == ("0", "1", "2")


@pytest.mark.parametrize("label", [1 << 20, 2**32 + 1])
def test_a_number_that_is_no_class_is_refused(tmp_path: Path, label: int) -> None:
    """Names for all up to it would fill the memory, and 2³² + 1 in 32 bits would be class 1."""
    data = data_set().remove_columns("label").add_column("label", [0, 1, label, 0, 0, 0, 0])
    data.save_to_disk(tmp_path / "set")
    with pytest.raises(RepaError, match=rf"has the label {label}, which is no number of a class"):
        open_source(f"hf:{tmp_path / 'set'}")


def test_a_cache_of_it_has_the_columns_of_the_folders(
    tmp_path: Path, pictures: Path, complete_cache: Path, command: Callable[..., str]
) -> None:
    source = open_source(str(pictures))
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(source.class_names))}
    )
    images = [{"bytes": (pictures / key).read_bytes(), "path": None} for key in source.keys]
    data = datasets.Dataset.from_dict({"image": images, "label": source.labels.tolist()}, features=features)
    data.save_to_disk(tmp_path / "set")
    command(data=f"hf:{tmp_path / 'set'}", workers=2)
    made = data_of_a_cache(tmp_path / "cache")
    assert made == data_of_a_cache(complete_cache)
    assert any(isinstance(record, dict) for record in made.values())
