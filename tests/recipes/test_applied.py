"""A recipe below a configuration file, and that below flags; what a run notes of it, and how it goes on."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from repa.commands.train import TrainFlags, _settings, train
from repa.data.errors import RepaError
from repa.data.testing import synthetic_cache
from repa.recipes import RECIPES
from repa.recipes.applied import changed, with_recipe
from repa.trainer.config import build
from repa.trainer.models.sit import SIT_SIZES, SiTSize
from repa.trainer.run.starts import read_starts
from repa.trainer.settings_file import load_yaml
from rich.console import Console

TINY = (
    *("model=SiT-T/2", "method.encoders=demo", "method.depth=1", "method.projector_width=16"),
    *("batch_size=8", "preview_every=0", "log_every=1", "precision=32-true"),
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with one cache, and a network of two blocks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SIT_SIZES, "T", SiTSize(depth=2, width=48, heads=3))
    synthetic_cache(tmp_path / "caches" / "one", num_rows=24)
    return tmp_path


def written(folder: Path, text: str) -> Path:
    file = folder / "own.yaml"
    file.write_text(text)
    return file


def settings(**flags: Any) -> tuple[Any, Path]:
    return _settings(TrainFlags(**flags))


def test_it_goes_below_the_file_and_that_below_flags(here: Path) -> None:
    config, folder = settings(recipe="haste-xl-2")
    assert (config, folder) == (RECIPES["haste-xl-2"].config(), Path("runs/haste-xl-2"))
    assert changed(config) == {}

    file = written(here, "lr: 2e-4\nmax_steps: 9\nmethod: {depth: 7, stop: 5}\n")
    config, _ = settings(recipe="haste-xl-2", config=file, max_steps=11, assignments=["method.stop=6"])
    assert (config.lr, config.max_steps) == (2e-4, 11)
    method: Any = config.method
    assert (method.depth, method.stop, method.student_blocks) == (7, 6, (5, 6, 7, 8))
    assert changed(config) == {
        "lr": (1e-4, 2e-4),
        "max_steps": (2_500_000, 11),
        "method.depth": (8, 7),
        "method.stop": (250_000, 6),
    }


def test_another_method_takes_nothing_of_the_recipes(here: Path) -> None:
    for flags in ({"method": "repa"}, {"config": written(here, "method: repa\n")}):
        config, _ = settings(recipe="irepa-xl-2-released", **flags)
        assert (config.method_name, config.method_preset, config.model) == ("repa", "", "SiT-XL/2")
        assert config.method == build(flags={"method": "repa"}).method


def test_another_preset_goes_before_that_of_the_recipe(here: Path) -> None:
    for flags in (
        {"assignments": ["method.preset=released"]},
        {"config": written(here, "method: {preset: released}\n")},
    ):
        config, _ = settings(recipe="sra-xl-2-512", **flags)
        method: Any = config.method
        assert (method.distance, method.weight, method.decay_epochs) == ("cosine-token", 0.5, 0)
        assert (config.method_preset, method.student_block, method.decay_after) == ("released", 8, 99)


def test_a_file_may_name_one(here: Path) -> None:
    file = written(here, "recipe: repa-l-2\nbatch_size: 512\n")
    config, folder = settings(config=file)
    assert (config.model, config.batch_size, config.recipe) == ("SiT-L/2", 512, "repa-l-2")
    assert folder == Path("runs/repa-l-2")
    assert settings(config=file, recipe="repa-b-2")[0].model == "SiT-B/2"
    with pytest.raises(RepaError) as caught:
        settings(config=written(here, "recipe: repa-m-2\n"))
    assert caught.value.field == "--recipe"


def test_what_is_no_section_is_refused_as_without_a_recipe() -> None:
    with pytest.raises(RepaError) as caught:
        build(with_recipe("repa-b-2", {"method": 3}))
    assert caught.value.field == "method"


def test_nothing_but_the_flag_gives_it() -> None:
    with pytest.raises(RepaError) as caught:
        build(assignments=["recipe=repa-b-2"])
    assert caught.value.field == "recipe"


def run(**flags: Any) -> str:
    out = io.StringIO()
    train(TrainFlags(**{"assignments": TINY, "max_steps": 1, **flags}), console=Console(file=out, width=300))
    return out.getvalue()


def test_a_run_notes_it_and_goes_on_without_the_flag(here: Path) -> None:
    said = run(recipe="repa-b-2")
    assert "recipe: repa-b-2" in said
    assert "model SiT-B/2 → SiT-T/2" in said
    folder = here / "runs" / "repa-b-2"
    assert load_yaml(folder / "config.yaml")["recipe"] == "repa-b-2"

    run(recipe="repa-b-2", max_steps=2)
    said = run(run=folder, max_steps=3, assignments=())
    assert "recipe: repa-b-2" in said
    assert [each["recipe"] for each in read_starts(folder)] == ["repa-b-2"] * 3
    assert [each["first_step"] for each in read_starts(folder)] == [0, 1, 2]

    for flags in (
        {"recipe": "repa-l-2", "run": folder},
        {"recipe": "repa-l-2", "run": folder, "assignments": ()},
    ):
        with pytest.raises(RepaError) as caught:
            run(**flags)
        assert caught.value.field == "recipe"


def test_a_run_of_a_recipe_that_is_gone_goes_on(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(RECIPES, "earlier", RECIPES["repa-b-2"])  # type: ignore[arg-type]
        run(recipe="earlier")
    folder = here / "runs" / "earlier"
    said = run(run=folder, max_steps=2, assignments=())
    assert "recipe:" not in said
    assert load_yaml(folder / "config.yaml")["recipe"] == "earlier"
    assert read_starts(folder)[-1]["first_step"] == 1


def test_one_of_several_processes_says_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "recipe: repa-b-2," in run(recipe="repa-b-2", dry_run=True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert "recipe: repa-b-2," not in run(recipe="repa-b-2", dry_run=True)


def test_an_unknown_one_is_refused_before_anything_is_made(here: Path) -> None:
    with pytest.raises(RepaError) as caught:
        run(recipe="repa-x")
    assert caught.value.field == "--recipe"
    assert not (here / "runs").exists()


def test_a_run_from_before_there_were_recipes_goes_on(here: Path) -> None:
    run(run=here / "old")
    file = here / "old" / "config.yaml"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if not line.startswith("recipe:")))
    run(run=here / "old", max_steps=2, assignments=())
    assert read_starts(here / "old")[-1]["first_step"] == 1
