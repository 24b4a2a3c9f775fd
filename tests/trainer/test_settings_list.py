"""What `repa train --help-settings` lists: everything that can be set, and nothing else."""

from __future__ import annotations

import io

import pytest
from repa.commands.train import TrainFlags, train
from repa.trainer.config import build
from repa.trainer.resuming import ON_RESUME
from repa.trainer.settings_list import list_settings
from rich.console import Console


def test_every_setting_is_listed_with_a_line_of_help() -> None:
    listed = list_settings()
    of_run = {each.key.partition(".")[0] for each in listed if each.section == "train"}
    assert of_run == ON_RESUME.keys()
    assert len({(each.section, each.key) for each in listed}) == len(listed)
    for each in listed:
        assert each.help, each.key
        assert "\n" not in each.help
    sections = dict.fromkeys(each.section for each in listed)
    assert {"objective flow", "method repa", "method haste"} <= sections.keys()


@pytest.mark.parametrize("section", ["train", "objective flow", "method repa", "method haste"])
def test_defaults_are_what_set_would_take(section: str) -> None:
    kind, _, name = section.partition(" ")
    chosen = [f"{kind}={name}"] if name else []
    listed = [each for each in list_settings() if each.section == section and each.default]
    given = [f"{each.key}={each.default}" for each in listed if each.key != "objective"]
    assert build(assignments=[*chosen, *given]) == build(assignments=chosen)


def test_the_flag_prints_them_and_does_nothing_else() -> None:
    printed = io.StringIO()
    train(TrainFlags(help_settings=True), console=Console(file=printed, width=300))
    lines = printed.getvalue().splitlines()
    assert any(line.strip().startswith("lr (number above 0, default 0.0001)") for line in lines)
    assert any(line.strip().startswith("method.projector_width (integer from 1") for line in lines)
