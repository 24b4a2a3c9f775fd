"""The page of the recipes, ``docs/recipes.md``, as the code says it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from repa.recipes import RECIPES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from repa.recipes.base import Recipe

_MOST_NAMES = 12

_HEAD = """# Recipes

A recipe is a published setting by name, with the numbers that it is to reproduce. Each is a function in
[`recipes/`](../recipes) that returns a configuration. We have trained none of them to the end: that needs
ImageNet and many GPU days.

```bash
repa recipes                       # all of them
repa recipes repa-xl-2             # one: its settings, its numbers, where it differs, the commands to run
repa preprocess --data imagenet --cache caches/imagenet-256 --encoder dinov2-b
repa train --recipe repa-xl-2 --cache caches/imagenet-256
repa train --recipe repa-xl-2 --lr 2e-4 --set method.depth=6    # changed, and it says so
```

Flags and `--set` go before `--config`, that before the recipe, and that before the defaults. The run's folder
is `runs/<recipe>` unless `--run` names another. `config.yaml` and `run.json` note the recipe, and the command
prints what you changed of it. A run goes on without the flag, and a run of one recipe does not go on with
another. A configuration file may name one too: its other lines go before `recipe: repa-xl-2`.

To add one, write a function that returns the configuration into a file of [`recipes/`](../recipes), under
`@recipe(…)` with its source and numbers. The tests check the training and the commands, and hold this page to
it: `pytest tests/recipes --update-docs`.

## All recipes

`repa recipes NAME` gives the protocol of each number, and the commands from the images to the number. FID is
of 50,000 samples by 250 stochastic steps without guidance, but where ᵍ says that there is guidance, or the
recipe says something else. ˣ is of samples whose making is not published in full. `–` means that no number is
published, or that we know none.

| recipe | reproduces | FID at step | cache |
|---|---|---|---|
"""

_OTHERWISE = """
## Where they differ from what is published

"""

_NOTES = """
## What else must be known

"""


def recipes_page() -> str:
    """Return the page."""
    rows = "\n".join(map(_row, RECIPES.values()))
    deviations = _grouped({each.name: each.deviations for each in RECIPES.values()})
    notes = _grouped({each.name: each.notes for each in RECIPES.values()})
    return f"{_HEAD}{rows}\n{_OTHERWISE}{deviations}\n{_NOTES}{notes}\n"


def _row(recipe: Recipe) -> str:
    figures = ", ".join(_figures(recipe)) or "–"
    paper = f"[{recipe.paper}](https://arxiv.org/abs/{recipe.paper})"
    return f"| `{recipe.name}` | {recipe.reproduces} ({paper}) | {figures} | `{recipe.encoding.cache}` |"


def _figures(recipe: Recipe) -> Iterator[str]:
    for each in recipe.figures:
        mark = "ˣ" if each.sampling is None else "ᵍ" if each.sampling.guidance != 1 else ""
        yield f"{each.fid:g}{mark} at {each.step // 1000:,} K"


def _grouped(said: dict[str, tuple[str, ...]]) -> str:
    """List each sentence once, with the recipes that it is of."""
    found: dict[str, list[str]] = {}
    for name, sentences in said.items():
        for each in sentences:
            found.setdefault(each, []).append(f"`{name}`")
    return "\n".join(f"- {sentence} ({_named(names)})" for sentence, names in found.items())


def _named(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= _MOST_NAMES else f"{len(names)} of {len(RECIPES)} recipes"
