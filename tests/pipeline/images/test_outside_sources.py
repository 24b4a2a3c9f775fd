"""Image sources from outside: the documentation's example as printed, entry points, what is refused."""

from __future__ import annotations

import importlib
import pickle
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image
from repa.data import outside
from repa.data.errors import RepaError
from repa.pipeline.images.names import cache_for, split_outside
from repa.pipeline.images.open import open_source

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = Path(__file__).parents[3] / "docs" / "extending" / "source.md"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the module that the documentation prints, and a list of four images."""
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(example.strip().splitlines()) <= 40
    (tmp_path / "my_sources.py").write_text(example, encoding="utf-8")
    lines = []
    for number in range(4):
        Image.new("RGB", (20, 20), (number, 0, 0)).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,{'ab'[number % 2]}")
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(outside, "_imported", {})
    importlib.invalidate_caches()
    yield tmp_path
    sys.modules.pop("my_sources", None)


def test_the_example_of_the_documentation(place: Path) -> None:
    data = "my_sources:CsvImages?list.csv"
    source = open_source(data, may_import=True)
    assert source.keys == ["0.png", "1.png", "2.png", "3.png"]
    assert source.labels.tolist() == [0, 1, 0, 1]
    assert source.labels.dtype == np.int32
    assert (source.class_names, source.kind) == (("a", "b"), "csv")
    assert source.load(3).getpixel((0, 0)) == (3, 0, 0)
    limited = pickle.loads(pickle.dumps(open_source(data, may_import=True, limit=2)))
    assert limited.keys == ["0.png", "2.png"]
    assert limited.load(1).getpixel((0, 0)) == (2, 0, 0)
    assert limited.fingerprint != source.fingerprint
    assert open_source(data, may_import=True, labels="none").class_names == ("images",)
    assert cache_for(data, 256).name == "list.csv-256"
    # a folder of that name is the folder
    (place / "my_sources:CsvImages").mkdir()
    assert split_outside("my_sources:CsvImages") is None


def test_a_file_alone_imports_nothing(place: Path) -> None:
    with pytest.raises(RepaError) as caught:
        open_source("my_sources:CsvImages?list.csv")
    assert caught.value.field == "--data"
    assert "my_sources" not in sys.modules


@pytest.mark.parametrize(
    "data", ["my_sources:Nothing?x", "no_such_module_here:Source", "my_sources:csv?x", "csv:x"]
)
@pytest.mark.usefixtures("place")
def test_names_of_nothing(data: str) -> None:
    with pytest.raises(RepaError) as caught:
        open_source(data, may_import=True)
    assert caught.value.field == "--data"
    assert "\n" not in str(caught.value)


def test_an_installed_package_offers_a_source(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = place / "mine-1.2.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.2\n")
    (installed / "entry_points.txt").write_text("[repa.sources]\ncsv = my_sources:CsvImages\n")
    monkeypatch.syspath_prepend(str(place))
    source = open_source("csv:list.csv")
    assert len(source) == 4
    assert cache_for("csv:list.csv", 64).name == "list.csv-64"


@pytest.mark.parametrize(
    ("listing", "field"),
    [
        ("keys=[], sizes=[], labels=[]", "--data"),
        ("keys=['a', 'a'], sizes=[1, 1], labels=[0, 0]", "--data"),
        ("keys=['a', 'b'], sizes=[1, 1], labels=[0]", "--data"),
        ("keys=['a', 'b'], sizes=[1], labels=[0, 0]", "--data"),
        ("keys=['a', 'b'], sizes=[1, 1], labels=[0, -1]", "--data"),
        ("keys=['a', 'b'], sizes=[1, 1], labels=[0, 2], class_names=['x', 'y']", "--data"),
        ("keys=['a', 'b'], sizes=[1, 1]", "--labels"),
        ("keys=['a', 'b\\n'], sizes=[1, 1], labels=[0, 0]", ""),
    ],
)
def test_listings_that_contradict_themselves(place: Path, listing: str, field: str) -> None:
    (place / "my_sources.py").write_text(
        "from repa.pipeline.images.listed import ListedImages, Listing\n"
        "class Mine(ListedImages):\n"
        "    kind = 'mine'\n"
        f"    def list_images(self):\n        return Listing({listing})\n"
        "    def read(self, number):\n        return b''\n"
    )
    with pytest.raises(RepaError) as caught:
        open_source("my_sources:Mine?x", may_import=True)
    assert caught.value.field == field
