"""Methods from outside the package: which may be imported, what is refused, what a run records."""

from __future__ import annotations

import hashlib
import itertools
import sys
from typing import TYPE_CHECKING

import pytest
from repa.data.errors import RepaError
from repa.trainer.config import build
from repa.trainer.methods.outside import FLAG, find_method, method_names, origin_of
from repa.trainer.methods.repa import Repa

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Write = Callable[[str], str]

HEAD = """
from dataclasses import dataclass
from repa.trainer.methods.base import Method, MethodConfig, Term
"""
GOOD = (
    HEAD
    + """
@dataclass(frozen=True, kw_only=True)
class MineConfig(MethodConfig):
    strength: float = 0.25

class Mine(Method):
    config_class = MineConfig
    def losses(self, step):
        return {}
"""
)
_numbers = itertools.count()


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a module that can be imported; returns its name, which no other test has."""
    monkeypatch.syspath_prepend(tmp_path)

    def module(text: str) -> str:
        name = f"outside_{next(_numbers)}"
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return module


def test_a_class_named_on_the_command_line(write: Write, tmp_path: Path) -> None:
    name = f"{write(GOOD)}:Mine"
    config = build(None, {"method": name}, ["method.strength=0.5"])
    assert (config.method_name, config.method.strength) == (name, 0.5)  # type: ignore[attr-defined]
    assert config.default_run_name == "Mine-SiT-B-2"
    assert build(None, {}, [f"method={name}"]).method_name == name
    again = build(config.to_dict())
    assert again == config
    module = name.partition(":")[0]
    digest = hashlib.sha256((tmp_path / f"{module}.py").read_bytes()).hexdigest()
    assert origin_of(name) == {"class": name, "package": None, "file_sha256": digest}


def test_a_file_alone_imports_nothing(write: Write) -> None:
    """Neither a configuration nor a run's folder of somebody else runs code."""
    name = f"{write(GOOD)}:Mine"
    for base in ({"method": name}, {"method": {"name": name, "strength": 0.5}}):
        for flags in ({}, {"lr": 1e-3}, {"method": None}):
            with pytest.raises(RepaError) as caught:
                build(base, flags)
            assert caught.value.field == FLAG
            assert f"{FLAG} {name}" in caught.value.remedy
    assert name.partition(":")[0] not in sys.modules
    # the file's settings stay where the command line names the same method
    config = build({"method": {"name": name, "strength": 0.5}}, {"method": name})
    assert config.method.strength == 0.5  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "text",
    [
        "raise RuntimeError('no')",
        "import something_that_is_not_there",
        "import sys; sys.exit(3)",
        "def broken(:",
        "Mine = 5",
        "class Mine: pass",
        "other = 1",
        HEAD + "class Mine(Method): pass",
        GOOD.replace("frozen=True, ", ""),
        GOOD.replace("@dataclass(frozen=True, kw_only=True)", ""),
        GOOD.replace("(MethodConfig)", ""),
        GOOD.replace("strength: float = 0.25", "strength: float"),
        GOOD.replace("strength: float", "strength: 'Unknown'"),
        GOOD.replace("strength: float = 0.25", "name: str = 'a'"),
        GOOD.replace("strength: float = 0.25", "strength: float = 'a'"),
        GOOD.replace("strength: float = 0.25", "strength: Method = None"),
    ],
)
def test_what_is_no_method_is_refused_in_one_line(write: Write, text: str) -> None:
    with pytest.raises(RepaError) as caught:
        find_method(f"{write(text)}:Mine", may_import=True)
    assert caught.value.field == FLAG
    assert caught.value.remedy
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "repo",
        "repa.trainer.methods.repa.Repa",
        "no_module_of_that_name:Mine",
        ":",
        "a:",
        "a b:c",
        "/x:y",
        "\033[31m:x",
        "x" * 10_000,
    ],
)
def test_unknown_names(name: str) -> None:
    with pytest.raises(RepaError) as caught:
        find_method(name, may_import=True)
    assert caught.value.field == FLAG
    assert caught.value.remedy
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_an_installed_package_offers_a_method(write: Write, tmp_path: Path) -> None:
    """Its name is enough, even in a file: what is installed was chosen by the user."""
    module = write(GOOD)
    installed = tmp_path / "mine-1.2.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.2\n")
    points = installed / "entry_points.txt"
    points.write_text(
        f"[repa.methods]\n{module} = {module}:Mine\nrepa = {module}:Mine\nlost = {module}:Lost\n"
    )
    assert method_names()[:3] == ["none", "repa", "haste"]
    assert module in method_names()
    config = build({"method": {"name": module, "strength": 0.5}})
    assert build(config.to_dict()) == config
    assert origin_of(module)["package"] == "mine 1.2"
    # ours keep their names
    assert find_method("repa") is Repa
    with pytest.raises(RepaError, match="Lost"):
        find_method("lost")
    other = tmp_path / "other-1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (other / "entry_points.txt").write_text("[repa.methods]\nlost = somewhere:Else\n")
    with pytest.raises(RepaError, match="several"):
        find_method("lost")
