"""A command's flags are the fields of its dataclass: all of them, with their defaults and a help each."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import pytest
import typer
from repa.cli import app, run_command
from repa.commands.parity.flags import ParityFlags
from repa.commands.plan import PlanFlags
from repa.commands.preprocess import PreprocessFlags
from repa.commands.sample import SampleFlags
from repa.commands.shared.flags import square_side, takes_flags
from repa.commands.train import TrainFlags
from repa.data.errors import RepaError

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


@pytest.mark.parametrize(("text", "side"), [("512", 512), ("512x512", 512), ("64×64", 64), ("-1", -1)])
def test_a_resolution_is_one_side(text: str, side: int) -> None:
    assert square_side(text) == side


@pytest.mark.parametrize(
    "text", ["512x256", "256×512", "", "large", "512.5", "512x", "x512", "1e3", "9" * 40]
)
def test_what_is_no_side_of_a_square_is_refused(text: str) -> None:
    with pytest.raises(RepaError) as error:
        square_side(text)
    assert error.value.field == "--resolution"
    assert error.value.remedy
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("command", ["preprocess", "plan", "bench"])
def test_the_command_line_refuses_it(command: str) -> None:
    with pytest.raises(RepaError) as error:
        run_command((command, "--resolution", "512x256"))
    assert error.value.field == "--resolution"
