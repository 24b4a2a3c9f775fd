"""`repa recipes` lists the published settings that ``repa train --recipe`` takes, or shows one."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from ..recipes.base import Figure, Recipe


@dataclass(frozen=True, kw_only=True)
class RecipesFlags:
    """The flags of `repa recipes`."""

    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Show this one.", show_default="a list of all")
    ] = None
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False


def recipes(flags: RecipesFlags, *, console: Console | None = None) -> None:
    """List the recipes, or show one with its settings, its numbers and the commands to run.

    Args:
        flags: of the command.
        console: where to print; standard output by default.

    Raises:
        RepaError: there is no such recipe.
    """
    from ..recipes import RECIPES, find_recipe
    from .shared.terminal import PlainConsole

    console = console or PlainConsole()
    if flags.as_json:
        chosen = list(RECIPES.values()) if flags.name is None else [find_recipe(flags.name)]
        values = [described(each) for each in chosen]
        console.print_json(data=values if flags.name is None else values[0], ensure_ascii=False)
    elif flags.name is None:
        _list(list(RECIPES.values()), console)
    else:
        _show(find_recipe(flags.name), console)


def described(recipe: Recipe) -> dict[str, Any]:
    """Return all of a recipe as plain values, its commands as lines."""
    from ..trainer.typed import plain

    return {
        "name": recipe.name,
        "summary": recipe.summary,
        "paper": recipe.paper,
        "reproduces": recipe.reproduces,
        "settings": recipe.settings(),
        "figures": plain(recipe.figures),
        "deviations": list(recipe.deviations),
        "notes": list(recipe.notes),
        "commands": command_lines(recipe),
    }


def command_lines(recipe: Recipe) -> list[str]:
    """Return the commands that make cache, run and figures, in order."""
    words = (*recipe.encoding.commands(), recipe.train_words(), *recipe.evaluate_words())
    return [shlex.join(each) for each in words]


def figure_line(figure: Figure) -> str:
    """Return a published number with its protocol, in one line."""
    score = "" if figure.inception_score is None else f", IS {figure.inception_score:g}"
    said = [each for each in (figure.sampling and str(figure.sampling), figure.remark) if each]
    return f"FID {figure.fid:g}{score} at step {figure.step:,}: {'; '.join(said)}"


def setting_lines(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as ``--set`` writes them."""
    from ..trainer.resuming import flat

    lines = []
    for key, value in flat(settings).items():
        text = f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)
        # as YAML has them, which `--set` takes too
        lines.append(f"{key.removesuffix('.name')}={text.lower() if value in (None, True, False) else text}")
    return lines


def _list(found: list[Recipe], console: Console) -> None:
    from rich.table import Table

    table = Table()
    for heading in ("recipe", "method", "model", "FID", "steps"):
        number = heading in ("FID", "steps")
        # a narrow terminal cuts no name short, but breaks lines
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    for each in found:
        settings = each.settings()
        best = min(each.figures, key=lambda figure: figure.fid, default=None)
        table.add_row(
            each.name,
            settings["method"]["name"],
            settings["model"],
            "–" if best is None else f"{best.fid:g}",
            "–" if best is None else f"{best.step:,}",
        )
    console.print(table)
    console.print(
        "FID is the lowest that is published, of 50,000 samples but where the recipe says less. "
        "`repa recipes NAME` shows one, with its source.",
        soft_wrap=True,
        highlight=False,
    )


def _show(recipe: Recipe, console: Console) -> None:
    def say(line: str = "") -> None:
        console.print(line, soft_wrap=True, highlight=False)

    say(f"{recipe.name}: {recipe.summary}")
    say(f"  reproduces {recipe.reproduces}, https://arxiv.org/abs/{recipe.paper}")
    sections = (
        ("settings, beside the defaults, which are REPA's", setting_lines(recipe.settings())),
        ("published", [figure_line(each) for each in recipe.figures] or ["no number"]),
        ("where it differs from what is published", recipe.deviations),
        ("notes", recipe.notes),
        ("to run", command_lines(recipe)),
    )
    for heading, lines in sections:
        if lines:
            say()
            say(heading)
        for line in lines:
            say(f"  {line}")
