"""Presets by name: what they set, what goes before them, what a configuration keeps, what is refused."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from repa.commands.train import TrainFlags, train
from repa.data.errors import RepaError
from repa.trainer.config import TrainConfig, build
from repa.trainer.methods import METHODS
from repa.trainer.methods.base import Method, MethodConfig, Step, Term
from repa.trainer.methods.named_presets import KEY, unusable_presets
from repa.trainer.settings_file import load_yaml
from repa.trainer.settings_list import list_settings
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ScaledConfig(MethodConfig):
    """Settings of a method for these tests.

    Attributes:
        weight: a number.
        blocks: some blocks.
        mode: a word.
    """

    weight: float = 0.5
    blocks: tuple[int, ...] = ()
    mode: str = "plain"


class Scaled(Method):
    config_class = ScaledConfig
    named_presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "released": {"weight": 1.0, "blocks": (3, 8)},
        "channel": {"mode": "channel"},
    }

    def losses(self, step: Step) -> dict[str, Term]:
        return {}


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "scaled", Scaled)  # type: ignore[arg-type]


def made(*assignments: str, base: Mapping[str, Any] | None = None) -> TrainConfig:
    return build(base, {"method": "scaled"}, assignments)


def values(config: TrainConfig) -> tuple[Any, ...]:
    method: Any = config.method
    return config.method_preset, method.weight, method.blocks, method.mode


def test_a_preset_sets_what_the_user_does_not() -> None:
    assert values(made()) == ("", 0.5, (), "plain")
    assert values(made("method.preset=paper")) == ("paper", 0.5, (), "plain")
    assert values(made("method.preset=released")) == ("released", 1.0, (3, 8), "plain")
    # in either order, and a default that is asked for is not the preset's
    for words in (("method.preset=released", "method.weight=0.5"), ("method.weight=0.5", KEY + "=released")):
        assert values(made(*words)) == ("released", 0.5, (3, 8), "plain")
    assert values(made("method.preset=none")) == ("", 0.5, (), "plain")


def test_a_configuration_keeps_name_and_values() -> None:
    config = made("method.preset=released", "method.mode=x")
    written = config.to_dict()["method"]
    assert list(written) == ["name", "preset", "weight", "blocks", "mode"]
    assert written == {"name": "scaled", "preset": "released", "weight": 1.0, "blocks": [3, 8], "mode": "x"}
    assert build(config.to_dict()) == config
    assert "preset" not in made().to_dict()["method"]


def test_a_file_goes_before_its_preset_and_the_command_line_before_the_file() -> None:
    file = {"method": {"name": "scaled", "preset": "released", "weight": 2.0, "mode": "y"}}
    assert values(build(file)) == ("released", 2.0, (3, 8), "y")
    # the same command that wrote it, again
    assert values(made("method.preset=released", base=file)) == ("released", 2.0, (3, 8), "y")
    assert values(made("method.weight=3", base=file)) == ("released", 3.0, (3, 8), "y")
    # another one takes the place of the file's, in all that either sets
    assert values(made("method.preset=channel", base=file)) == ("channel", 0.5, (), "channel")
    assert values(made("method.preset=none", base=file)) == ("", 0.5, (), "y")
    assert values(made(KEY + "=channel", "method.weight=2", base=file)) == ("channel", 2.0, (), "channel")
    # and another method's means nothing
    assert values(made(base={"method": {"name": "repa", "preset": "x"}})) == ("", 0.5, (), "plain")


@pytest.mark.parametrize("wrong", ["relesed", "", ["released"], 3])
def test_an_unknown_name_is_refused_with_the_list(wrong: Any) -> None:
    base = {"method": {"name": "scaled", "preset": wrong}}
    if wrong == "":
        assert build(base).method_preset == ""
        return
    with pytest.raises(RepaError) as caught:
        build(base)
    assert caught.value.field == KEY
    assert all(name in caught.value.remedy for name in Scaled.named_presets)
    with pytest.raises(RepaError) as caught:
        build(None, {"method": "none"}, ["method.preset=paper"])
    assert caught.value.field == KEY


def test_shown_by_help_and_by_dry_run(tmp_path: Path) -> None:
    (shown,) = [each for each in list_settings() if each.key == KEY and each.section == "method scaled"]
    assert all(name in shown.type for name in Scaled.named_presets)
    assert "weight=1.0" in shown.help
    assert not [each for each in list_settings() if each.key == KEY and each.section == "method none"]
    printed = io.StringIO()
    flags = TrainFlags(
        method="scaled", assignments=["method.preset=released"], dry_run=True, cache=str(tmp_path)
    )
    with pytest.raises(RepaError):
        train(flags, console=Console(file=printed, width=200))  # there is no cache
    (tmp_path / "shown.yaml").write_text(printed.getvalue().partition("\n\n")[0])
    assert load_yaml(tmp_path / "shown.yaml")["method"]["preset"] == "released"


def test_the_backbone_is_the_methods_where_nobody_names_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert made().model == "SiT-B/2"
    monkeypatch.setattr(Scaled, "default_model", "SiT-XL/2")
    assert made().model == "SiT-XL/2"
    assert made("model=SiT-S/2").model == "SiT-S/2"
    assert made(base={"model": "SiT-L/2"}).model == "SiT-L/2"
    assert build(made().to_dict()) == made()
    assert build().model == "SiT-B/2"


@pytest.mark.parametrize(
    "presets", [3, {"a": {"width": 1}}, {"a": {"weight": "heavy"}}, {"none": {}}, {1: {}}, {"a": None}]
)
def test_presets_that_cannot_be_used(presets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scaled, "named_presets", presets)
    assert unusable_presets(Scaled)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_presets_of_every_method_can_be_used(name: str) -> None:
    assert unusable_presets(METHODS[name]) == ""
