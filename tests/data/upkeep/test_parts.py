"""Classes and labels of the whole that parts are joined to, known from the parts alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from repa.data.errors import CacheError
from repa.data.testing import synthetic_cache
from repa.data.upkeep.parts import Part, joined_images


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parts") / "cache"
    synthetic_cache(path, num_rows=4)
    return path


def part(
    cache: Path, name: str, kind: str, classes: tuple[str, ...], keys: list[str], labels: list[int]
) -> Part:
    found = Part.open(cache)
    manifest = replace(found.manifest, source_kind=kind, source_fingerprint=name, class_names=classes)
    return Part(path=Path(name), manifest=manifest, keys=keys, labels=np.array(labels, dtype=np.int32))


def test_classes_of_folders_are_those_of_the_folder_of_both(cache: Path) -> None:
    whole = joined_images(
        [
            part(cache, "b", "folder", ("cat", "emu"), ["cat/9", "emu/1"], [0, 1]),
            part(cache, "a", "folder", ("bee", "emu"), ["bee/3", "emu/0"], [0, 1]),
        ]
    )
    assert whole.class_names == ("bee", "cat", "emu")
    assert list(whole.keys) == ["bee/3", "cat/9", "emu/0", "emu/1"]
    assert whole.labels.tolist() == [0, 1, 2, 2]


@pytest.mark.parametrize("kind", ["tars", "hf"])
def test_numbers_of_classes_stay_what_they_are(cache: Path, kind: str) -> None:
    """Of tars whose classes have no names, one part without the last ones: 2 is not what follows 10."""
    few, many = (tuple(map(str, range(count))) for count in (3, 12))
    parts = [
        part(cache, "a", kind, few, ["k5", "k1"], [2, 0]),
        part(cache, "b", kind, many, ["k3", "k2"], [11, 2]),
    ]
    for given in (parts, parts[::-1]):
        whole = joined_images(given)
        assert whole.class_names == many
        label = dict(zip(whole.keys, whole.labels.tolist(), strict=True))
        assert label == {"k5": 2, "k1": 0, "k3": 11, "k2": 2}
    # the parts of what has an order of its own follow one another
    assert list(joined_images(parts).keys) == ["k5", "k1", "k3", "k2"]


def test_classes_of_one_name_stay_apart(cache: Path) -> None:
    """ImageNet has two of the name crane."""
    names = ("crane", "emu", "crane")
    parts = [part(cache, "a", "tars", names, ["a"], [2]), part(cache, "b", "tars", names, ["b"], [0])]
    assert joined_images(parts).labels.tolist() == [2, 0]
    assert joined_images(parts).class_names == names


def test_classes_that_are_numbered_differently_are_refused(cache: Path) -> None:
    parts = [
        part(cache, "a", "tars", ("cat", "emu"), ["a"], [1]),
        part(cache, "b", "tars", ("emu", "cat"), ["b"], [1]),
    ]
    with pytest.raises(
        CacheError, match=r"(a and b|b and a) number their classes differently, .*--class-names"
    ):
        joined_images(parts)
