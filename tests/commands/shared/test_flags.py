"""A command's flags are the fields of its dataclass: all of them, with their defaults and a help each."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import pytest
import typer
from repa.cli import app
from repa.commands.parity import ParityFlags
from repa.commands.plan import PlanFlags
from repa.commands.preprocess import PreprocessFlags
from repa.commands.sample import SampleFlags
from repa.commands.shared.flags import takes_flags
from repa.commands.train import TrainFlags

FLAGS = {
    "preprocess": PreprocessFlags,
    "plan": PlanFlags,
    "train": TrainFlags,
    "parity": ParityFlags,
    "sample": SampleFlags,
}


@pytest.mark.parametrize("command", FLAGS)
def test_every_field_is_an_option_with_help(command: str) -> None:
    group: Any = typer.main.get_command(app)
    options = {each.name: each for each in group.commands[command].params}
    fields = dataclasses.fields(FLAGS[command])
    assert [each.name for each in fields] == list(options)
    for each in fields:
        assert options[each.name].help, each.name
        assert options[each.name].default == each.default


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parent:
    name: Annotated[str, typer.Option("--called", help="A name.")] = "nobody"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Child(Parent):
    times: Annotated[list[int] | None, typer.Option("--time", help="May repeat.")] = None


def test_what_is_typed_arrives_as_one_object() -> None:
    seen: list[Child] = []
    app = typer.Typer()

    @app.command()
    @takes_flags(Child)
    def run(flags: Child) -> None:
        """What it does."""
        seen.append(flags)

    app(["--time", "3", "--called", "me", "--time", "5"], standalone_mode=False)
    app([], standalone_mode=False)
    assert [seen[0].name, list(seen[0].times or ())] == ["me", [3, 5]]
    assert seen[1] == Child()
    assert typer.main.get_command(app).help == "What it does."
