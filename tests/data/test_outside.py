"""Code from outside, found by name: whose names are whose, and what is said when it cannot be had."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest
from repa.data import outside
from repa.data.errors import RepaError
from repa.data.outside import entry_names, find_outside

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that offers two things under one name, in two groups."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(outside, "_imported", {})
    (tmp_path / "offered_things.py").write_text("class Alpha: pass\nclass Beta: pass\n")
    folder = tmp_path / "things-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: things\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(
        "[a.group]\nsame = offered_things:Alpha\n[b.group]\nsame = offered_things:Beta\n"
    )
    return tmp_path


def find(name: str, group: str = "a.group", **options: Any) -> Any:
    return find_outside(name, group=group, flag="--thing", what="thing", example="module:Thing", **options)


def test_one_name_in_two_groups(installed: Path) -> None:
    """A method and an image source may be called the same."""
    assert entry_names("a.group") == ["same"]
    for _ in range(2):
        assert find("same", "a.group").__name__ == "Alpha"
        assert find("same", "b.group").__name__ == "Beta"


def test_what_was_imported_for_one_group_is_not_trusted_for_another(installed: Path) -> None:
    name = "offered_things:Alpha"
    assert find(name, may_import=True).__name__ == "Alpha"
    assert find(name).__name__ == "Alpha"
    with pytest.raises(RepaError) as caught:
        find(name, "b.group")
    assert caught.value.field == "--thing"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("class Alpha: pass", "Alpah"),
        ("value = 1", "Alpha"),
        ("raise ValueError('\\033[31m[bold]red\\n\\n')", "Alpha"),
        ("raise KeyboardInterrupt", None),
    ],
)
def test_what_cannot_be_had_is_said_in_one_printable_line(
    installed: Path, text: str, name: str | None
) -> None:
    module = f"broken_{abs(hash(text)) % 10**6}"
    (installed / f"{module}.py").write_text(text + "\n")
    if name is None:
        # Ctrl-C is not the module's fault
        with pytest.raises(KeyboardInterrupt):
            find(f"{module}:Alpha", may_import=True)
        return
    with pytest.raises(RepaError) as caught:
        find(f"{module}:{name}", may_import=True)
    assert caught.value.field == "--thing"
    assert caught.value.remedy
    assert str(caught.value).isprintable()
