"""Every recipe, its commands parsed, its training checked on a cache as its own command would write it."""

from __future__ import annotations

import io
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import typer
from PIL import Image
from recipes_page import recipes_page
from repa.cli import app
from repa.commands.preprocess import PreprocessFlags, make_config
from repa.commands.recipes import RecipesFlags, command_lines, described, recipes, setting_lines
from repa.data.errors import RepaError
from repa.data.format.columns import AUTOENCODER
from repa.data.format.manifest import LATENTS_NOTE, VIEWS
from repa.data.testing import synthetic_cache, synthetic_captions
from repa.pipeline.encoders import find_teacher
from repa.pipeline.plan import make_plan
from repa.pipeline.text.encoder import text_sizes
from repa.pipeline.text.registry import find_text_encoder
from repa.recipes import RECIPES, find_recipe
from repa.recipes.shared import OF_REPA
from repa.trainer.config import TrainConfig, build
from repa.trainer.input.datamodule import columns_of_phase
from repa.trainer.methods import METHODS
from repa.trainer.run.checks import check
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Callable

    from repa.data.format.columns import ColumnSpec
    from repa.recipes.base import Encoding

COMMAND: Any = typer.main.get_command(app)
PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


def parsed(line: str) -> dict[str, Any]:
    """Return the parameters of a command line, which are refused if one is unknown or of another type."""
    command, words = COMMAND, shlex.split(line)[1:]
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    return command.make_context(line, words).params


@pytest.fixture(scope="module")
def cache_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Encoding], Path]:
    """Caches that declare the columns which the command of an encoding would write, without a row of them."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "images" / "a").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "images" / "a" / "0.png")
    made: dict[Encoding, Path] = {}

    def columns_of(encoding: Encoding) -> dict[str, ColumnSpec]:
        asked = parsed(shlex.join(replace(encoding, imported="", captions="").commands()[0]))
        flags = PreprocessFlags(**{**asked, "data": str(folder / "images"), "cache": folder / "none"})
        with pytest.MonkeyPatch.context() as patch:
            # of an autoencoder on the hub the shape is the recipe's word
            side = encoding.resolution // encoding.stride
            shape = (encoding.channels, side, side)
            patch.setattr("repa.pipeline.encoders.vae.latent_shape", lambda *_, **__: shape)
            plan = make_plan(make_config(flags))
        return {name: spec for source in plan.sources for name, spec in source.columns.items()}

    def make(encoding: Encoding) -> Path:
        if encoding not in made:
            path = folder / str(len(made))
            channels = encoding.channels
            statistics = {"mean": [0.0] * channels, "std": [1.0] * channels, "images": 1}
            notes: dict[str, dict[str, Any]] = {AUTOENCODER: {LATENTS_NOTE: statistics}}
            if encoding.attention:
                flags = PreprocessFlags(encoders=list(encoding.encoders), attention=encoding.attention)
                blocks = make_config(flags).attention
                for name in encoding.encoders:
                    depth = find_teacher(name).depth
                    notes[f"{name}+attention"] = {"blocks": list(blocks[name]), "depth": depth}
            synthetic_cache(
                path,
                num_rows=1,
                columns=columns_of(encoding),
                num_classes=1000,
                resolution=encoding.resolution,
                views=VIEWS[encoding.views],
                notes=notes,
                invalid={0: "of no need"},
            )
            if encoding.captions:
                sizes = text_sizes(find_text_encoder(encoding.text_encoder), None)
                synthetic_captions(path, columns=sizes.columns(encoding.text_encoder, "float16"))
            made[encoding] = path
        return made[encoding]

    return make


@pytest.mark.parametrize("name", RECIPES)
def test_it_would_train_on_the_cache_that_its_command_writes(
    name: str, cache_of: Callable[[Encoding], Path]
) -> None:
    recipe = RECIPES[name]
    config = replace(recipe.config(), cache=str(cache_of(recipe.encoding)), precision="32-true")
    with torch.device("meta"):
        checked = check(config)
    # a cache of no rows has none to train on
    assert [each for each in checked.problems if each.field != "--batch-size"] == []
    assert checked.backbone is not None
    assert checked.method is not None
    method, condition = checked.method, checked.condition_columns
    columns = {each for phase in method.phases() for each in columns_of_phase(method, phase, condition)}
    assert checked.manifest is not None
    assert columns <= checked.manifest.columns.keys()
    # and none of its teachers, or its text encoder, encodes for nothing
    encoded = {AUTOENCODER, *recipe.encoding.encoders, *filter(None, [recipe.encoding.text_encoder])}
    assert {column.partition("/")[0] for column in columns} >= encoded


@pytest.mark.parametrize("name", RECIPES)
def test_its_commands_parse_and_its_figures_have_checkpoints(name: str) -> None:
    recipe = RECIPES[name]
    config = recipe.config()
    figures = [each for each in recipe.figures if each.sampling is not None]
    commands = [parsed(line) for line in command_lines(recipe)]
    encode, (train, *evaluate) = commands[: -len(figures) - 1], commands[-len(figures) - 1 :]
    assert [Path(each["cache"]) for each in encode] == [Path(train["cache"])] * len(encode)
    assert train["recipe"] == name
    assert config.default_run_name == config.recipe == name
    assert [each["step"] or config.max_steps for each in evaluate] == [each.step for each in figures]
    assert all(each["run"] == Path("runs") / name for each in evaluate)
    for each in recipe.figures:
        assert each.step == config.max_steps or each.step % config.keep_every == 0
        assert each.sampling is not None or each.remark
    assert max((each.step for each in recipe.figures), default=config.max_steps) == config.max_steps


@pytest.mark.parametrize("name", RECIPES)
def test_the_settings_it_shows_are_all_of_it(name: str) -> None:
    recipe = RECIPES[name]
    assert build(assignments=setting_lines(recipe.settings())) == recipe.make()


@pytest.mark.parametrize("name", RECIPES)
def test_it_says_what_it_is(name: str) -> None:
    recipe = RECIPES[name]
    assert name == recipe.name
    assert recipe.summary.startswith("Train ")
    assert recipe.reproduces
    assert recipe.paper[4] == "."
    for sentence in (*recipe.deviations, *recipe.notes, recipe.summary):
        assert sentence.endswith(".")
    assert recipe.figures or recipe.notes, "no number, and nothing says why"


def test_every_method_and_named_preset_has_one() -> None:
    configs = [each.config() for each in RECIPES.values()]
    found = {(each.method_name, each.method_preset) for each in configs}
    assert {name for name, _ in found} == set(METHODS)
    presets = {(name, preset) for name, method in METHODS.items() for preset in method.named_presets}
    assert presets <= found


def test_what_most_papers_share_is_this_programs_default() -> None:
    """A list of settings that leaves them out can be read."""
    default = TrainConfig().to_dict()
    for key, value in OF_REPA.items():
        section, _, setting = key.partition(".")
        there = default[section][setting] if setting else default[section]
        assert there == (list(value) if isinstance(value, tuple) else value), key


def test_an_unknown_name_is_refused_with_those_nearest() -> None:
    with pytest.raises(RepaError) as caught:
        find_recipe("haste-xxl-2")
    assert caught.value.field == "--recipe"
    assert "haste-xl-2" in caught.value.remedy


def printed(**flags: Any) -> str:
    out = io.StringIO()
    recipes(RecipesFlags(**flags), console=Console(file=out, width=80))
    return out.getvalue()


def test_the_command_lists_all_or_shows_one() -> None:
    listed = printed()
    assert all(f" {name} " in listed for name in RECIPES)
    shown = printed(name="haste-xl-2")
    assert "method.teacher_blocks=[9,10,11,12]" in shown
    assert all(line in shown for line in command_lines(RECIPES["haste-xl-2"]))
    assert all(line in shown for line in RECIPES["haste-xl-2"].deviations)
    assert "no number" in printed(name="haste-l-2")


def test_the_command_prints_json() -> None:
    assert json.loads(printed(as_json=True)) == [described(each) for each in RECIPES.values()]
    one = json.loads(printed(as_json=True, name="repa-xl-2"))
    assert {"step": 400_000, "fid": 7.9}.items() <= one["figures"][1].items()
    assert one["settings"]["method"]["depth"] == 8


def test_the_page_is_as_the_code_says_it(pytestconfig: pytest.Config) -> None:
    """``pytest tests/recipes --update-docs`` writes it anew."""
    if pytestconfig.getoption("--update-docs"):
        PAGE.write_text(recipes_page(), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == recipes_page()
