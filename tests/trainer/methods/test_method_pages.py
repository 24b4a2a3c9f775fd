"""The pages of the methods and README's table of them, held to the registry and to what the methods read."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from repa.data.format.columns import AUTOENCODER, MOMENTS, ColumnSpec
from repa.trainer.config import build
from repa.trainer.input.datamodule import columns_of_phase
from repa.trainer.methods import METHODS
from repa.trainer.methods.base import Method
from repa.trainer.models.registry import config_of
from repa.trainer.softrepa.settings import SoftConfig

ROOT = Path(__file__).parents[3]
COMMANDS = ("softrepa",)
"""Methods with commands of their own, whose network is a model of others."""
PAGES = ROOT / "docs" / "methods"
SPECS = {
    MOMENTS: ColumnSpec(shape=(8, 32, 32), dtype="float32"),
    "dinov2-b/patch": ColumnSpec(shape=(256, 768), dtype="float16"),
    "dinov2-b/cls": ColumnSpec(shape=(768,), dtype="float16"),
    "dinov2-b/q": ColumnSpec(shape=(3, 12, 256, 64), dtype="float16"),
    "dinov2-b/k": ColumnSpec(shape=(3, 12, 256, 64), dtype="float16"),
}
GRIDS = {AUTOENCODER: (32, 32), "dinov2-b": (16, 16), "dinov2-b+attention": (16, 16)}
NOTES = {"dinov2-b+attention": {"blocks": [8, 10, 12], "depth": 12, "logit_scale": 0.125}}


def as_typed(name: str) -> tuple[Method, str]:
    """The method and its model, where nothing is set, on a cache of 256² images and DINOv2-B."""
    config = build(flags={"method": name})
    facts = config_of(config.model, input_size=32, in_channels=4, num_classes=1000).facts
    with torch.device("meta"):
        return METHODS[name](config.method, facts, SPECS, GRIDS, NOTES), config.model


def rows_of(file: Path) -> dict[str, list[str]]:
    """Method → the other cells of its line, of the tables whose lines begin with a link to its page."""
    found = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        match = re.fullmatch(r"\| \[`([\w-]+)`\]\(([^)]+)\) \|(.+)\|", line)
        if match:
            assert (file.parent / match[2]).resolve() == PAGES / f"{match[1]}.md"
            found[match[1]] = [cell.strip() for cell in match[3].split("|")]
    return found


def test_every_method_has_a_page_and_is_in_both_tables() -> None:
    for file in (ROOT / "README.md", PAGES / "README.md"):
        assert rows_of(file).keys() == {*METHODS, *COMMANDS}, file
    assert {page.stem for page in PAGES.glob("*.md")} == {"README", *METHODS, *COMMANDS}


@pytest.mark.parametrize("name", METHODS)
def test_a_page_names_the_command_source_and_every_setting_that_exists(name: str) -> None:
    text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    assert re.search(rf"^repa train .*--method {name}\b", text, re.MULTILINE)
    assert re.search(r"arxiv.org/abs/\d{4}\.\d{5}", text)
    known = {item.name for item in fields(METHODS[name].config_class)}
    if METHODS[name].named_presets:
        known.add("preset")
        assert all(f"`{each}`" in text or f"preset={each}" in text for each in METHODS[name].named_presets)
    assert set(re.findall(r"method\.(\w+)", text)) <= known


@pytest.mark.parametrize("name", METHODS)
def test_readme_says_what_a_method_reads(name: str) -> None:
    method, model = as_typed(name)
    assert method.problems() == []
    reads, sizes = [], []
    conditioner = method.make_conditioner(1000)
    condition = () if conditioner is None else conditioner.columns
    for phase in method.phases():
        columns = columns_of_phase(method, phase, condition)
        reads += [column for column in columns if column != MOMENTS]
        sizes.append(sum(SPECS[column].row_bytes for column in columns))
    kinds, size, phases, backbone, _ = rows_of(ROOT / "README.md")[name]
    assert re.findall(r"`(\w+)`", kinds) == [each.rpartition("/")[2] for each in dict.fromkeys(reads)]
    assert size == " → ".join(f"{each:,}" for each in sizes)
    assert phases == " → ".join(phase.name for phase in method.phases())
    assert backbone == model.rpartition("-")[0]


def test_the_page_of_a_method_with_commands_of_its_own_names_settings_that_exist() -> None:
    text = (PAGES / "softrepa.md").read_text(encoding="utf-8")
    assert re.search(r"^repa softrepa train ", text, re.MULTILINE)
    assert re.search(r"arxiv.org/abs/\d{4}\.\d{5}", text)
    known = {item.name for item in fields(SoftConfig)}
    assert set(re.findall(r"`(\w+)=[\w,]+`", text)) <= known
    for setting in re.findall(r"^\| ((?:`\w+`(?:, )?)+)", text, re.MULTILINE):
        assert set(re.findall(r"`(\w+)`", setting)) <= known
