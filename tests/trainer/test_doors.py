"""A second backbone and a second objective, as docs/extending prints them: one file and one line each."""

from __future__ import annotations

import importlib.util
import re
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from repa.commands.sample import SampleFlags, sample
from repa.data.errors import RepaError
from repa.trainer.models import registry
from repa.trainer.models.capture import Capture, Captured
from repa.trainer.models.published import PublishedCheckpoint
from repa.trainer.models.registry import BACKBONES, Family
from repa.trainer.objectives.registry import OBJECTIVES, from_plain, make_objective, to_plain
from repa.trainer.run.checks import check
from repa.trainer.run.metrics import read_metrics
from repa.trainer.sampling.generate import model_of_file, model_of_run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import ModuleType

    from repa.trainer.config import TrainConfig

    Settings = Callable[..., TrainConfig]


def printed_module(page: str, folder: Path, root: Path) -> ModuleType:
    """The first block of Python on a page, as a module."""
    text = (root / "docs" / "extending" / f"{page}.md").read_text(encoding="utf-8")
    file = folder / f"printed_{page}.py"
    file.write_text(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], encoding="utf-8")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def printed(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[dict[str, Any]]:
    folder, root = tmp_path_factory.mktemp("printed"), request.config.rootpath
    modules = {page: printed_module(page, folder, root) for page in ("backbone", "objective")}
    yield modules
    for module in modules.values():
        del sys.modules[module.__name__]


@pytest.fixture(autouse=True)
def _one_line_each(printed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, objective = printed["backbone"], printed["objective"]
    monkeypatch.setitem(BACKBONES, "UNet", Family(config=backbone.UNetConfig, build=backbone.UNet))
    monkeypatch.setitem(OBJECTIVES, "clean", objective.Clean)


NEW = {
    "model": "UNet-12",
    "method__depth": 2,
    "objective": "clean",
    "objective__limit": 3.0,
    "holdout": 8,
    "eval_every": 2,
}


class Pixels:
    name = "pixels"
    weights_sha256 = "0"

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return (128 + 20 * latent[:, :3]).clamp(0, 255).to(torch.uint8)


def test_they_train_resume_and_sample(
    settings: Settings,
    undisturbed: Callable[..., Path],
    killed_fit: Callable[..., None],
    run_fit: Callable[..., Any],
    same_run: Callable[[Path, Path, int], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = settings(
        **NEW, max_steps=6, checkpoint_every=2, gradient_angle_every=3, preview_every=6, preview_steps=2
    )
    whole = undisturbed(config, decoder=Pixels())
    killed_fit(config, "killed", moment=5, decoder=Pixels())
    outcome, _ = run_fit(config, "killed", decoder=Pixels())
    assert (outcome.resumed_from, outcome.finished) == (4, True)
    same_run(whole, tmp_path / "killed", 6)
    rows = read_metrics(whole / "metrics.csv")
    assert {"clean", "repa", "repa_weight", "held_out", "held_out_ema", "gradient_angle"} <= set().union(
        *rows
    )
    assert "velocity" not in set().union(*rows)
    assert rows[-1]["loss"] == pytest.approx(rows[-1]["clean"] + 0.5 * rows[-1]["repa"], rel=1e-6)
    assert (whole / "samples" / "step-00000006.png").exists()

    monkeypatch.setattr("repa.commands.shared.prepared.decoder_of", lambda *_: Pixels())
    images = []
    for run in (whole, tmp_path / "killed"):
        out = tmp_path / f"out-{run.name}-{len(images)}"
        sample(SampleFlags(run=run, num=3, steps=4, solver="sde", guidance=1.5, npz=True, out=out))
        with np.load(out / "samples.npz") as arrays:
            images.append(arrays["arr_0"])
    assert images[0].shape == (3, 4, 4, 3)
    assert np.array_equal(images[0], images[1])
    model = model_of_run(whole)
    assert type(model.backbone).__name__ == "UNet"
    assert (type(model.objective).__name__, model.objective.config.limit) == ("Clean", 3.0)


def test_a_vector_beside_the_latent_is_refused_by_both(settings: Settings) -> None:
    problems = check(settings(**{**NEW, "method": "reg"})).problems
    assert {problem.field for problem in problems} == {"--model", "objective"}


def test_the_facts_of_each_block_are_checked(settings: Settings) -> None:
    """The teacher's tokens lie on 2×2, as those of block 2, and not of block 1."""
    assert check(settings(**NEW)).problems == []
    (problem,) = check(settings(**{**NEW, "method__depth": 1})).problems
    assert "2×2" in problem.what
    assert "4×4" in problem.what
    checked = check(settings(**NEW))
    assert checked.method is not None
    assert checked.method.projectors[0][0].in_features == 24


def test_haste_needs_attention(haste: Settings) -> None:
    problems = check(haste(model="UNet-12", method__depth=2)).problems
    assert any("heads" in problem.what for problem in problems)


def test_what_a_backbone_refuses(settings: Settings) -> None:
    for changes, field in (({"model": "UNet-0"}, "--model"), ({"qk_norm": True}, "qk_norm")):
        config = settings(**{**NEW, **changes})
        with pytest.raises(RepaError) as caught:
            registry.config_of(
                config.model, input_size=4, in_channels=4, num_classes=3, qk_norm=config.qk_norm
            )
        assert caught.value.field == field
        assert check(config).problems
    with pytest.raises(RepaError):
        registry.config_of("UNet-8", input_size=5, in_channels=4, num_classes=3)


def test_the_objective_of_a_family(settings: Settings, printed: dict[str, Any]) -> None:
    backbone = printed["backbone"]
    plain = settings(model="UNet-12", method__depth=2)
    assert to_plain(plain.objective)["name"] == "flow"
    BACKBONES["UNet"] = Family(config=backbone.UNetConfig, build=backbone.UNet, objective="clean")
    assert to_plain(settings(model="UNet-12", method__depth=2).objective)["name"] == "clean"
    chosen = settings(model="UNet-12", method__depth=2, objective="flow")
    assert to_plain(chosen.objective)["name"] == "flow"


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_the_right_answer_costs_nothing_and_moves_along_the_path(path: str) -> None:
    objective = from_plain({"name": "clean", "path": path, "limit": 2.0})
    x0, noise = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64).unbind()
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    noised = objective.noised(x0, noise, t)
    assert not objective.losses(Captured(prediction=x0), noised)["clean"].any()
    torch.testing.assert_close(objective.velocity(x0, noised.x_t, t), objective.path.velocity(x0, noise, t))
    off = objective.losses(Captured(prediction=x0 + 1), noised)["clean"]
    ratios = (objective.path.alpha(t) / objective.path.sigma(t)).square().clamp(max=2.0)
    torch.testing.assert_close(off, ratios)
    with pytest.raises(ValueError, match="stopped"):
        objective.losses(Captured(prediction=None), noised)


def test_checkpoints_name_family_and_objective(settings: Settings) -> None:
    config = settings(**NEW)
    found = registry.config_of("UNet-12", input_size=4, in_channels=4, num_classes=3)
    assert registry.from_plain(registry.to_plain(found)) == found
    objective = from_plain(to_plain(config.objective))
    assert objective.config == make_objective(config.objective).config == config.objective
    for values in ({"family": "DiT"}, {"family": "UNet", "input_size": 4}, {"family": "UNet", "depth": 2}):
        with pytest.raises(RepaError):
            registry.from_plain(values)
    for values in ({}, {"name": "edm"}, {"name": "clean", "limit": "high"}, {"name": "flow", "limit": 1.0}):
        with pytest.raises(RepaError):
            from_plain(values)


def test_an_early_stop_returns_no_prediction() -> None:
    config = registry.config_of("UNet-12", input_size=4, in_channels=4, num_classes=3)
    model = registry.build(config)
    x, t, y = torch.randn(2, 4, 4, 4), torch.rand(2), torch.tensor([0, 1])
    stopped = model(x, t, y, Capture(hidden=(2,), stop_after=2))
    assert stopped.prediction is None
    assert (stopped.hidden[2].shape, stopped.grids) == ((2, 4, 24), {2: (2, 2)})
    assert torch.equal(stopped.hidden[2], model(x, t, y, Capture(hidden=(2,))).hidden[2])


def test_tables_that_no_state_dict_holds(printed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As of rotary positions: a loaded network has them, and its checkpoint does not."""

    class WithTable(printed["backbone"].UNet):
        def __init__(self, config: Any, conditioner: Any = None) -> None:
            super().__init__(config, conditioner)
            self.register_buffer("table", torch.arange(3.0), persistent=False)

    monkeypatch.setitem(BACKBONES, "UNet", Family(config=printed["backbone"].UNetConfig, build=WithTable))
    config = registry.config_of("UNet-12", input_size=4, in_channels=4, num_classes=3)
    model = registry.build(config)
    loaded = registry.load(config, model.state_dict())
    assert loaded.table.tolist() == [0.0, 1.0, 2.0]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    with pytest.raises(RepaError):
        registry.load(config, {"table": torch.zeros(3)})


def test_published_checkpoints_of_whichever_family(
    printed: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    backbone = printed["backbone"]
    config = registry.config_of("UNet-12", input_size=4, in_channels=4, num_classes=3)
    weights = registry.build(config).state_dict()

    def read(path: Path, *, weights: str, certain: bool) -> PublishedCheckpoint:
        state = torch.load(path, weights_only=True)
        if "output.weight" not in state:
            raise RepaError(f"{path} holds no UNet", "give one")
        return PublishedCheckpoint(
            config=config,
            network=backbone.UNet,
            backbone=state,
            projectors={},
            weights=weights,
            objective={"limit": "2.0"},
            steps=7,
        )

    torch.save(weights, tmp_path / "unet.pt")
    with pytest.raises(RepaError) as caught:
        model_of_file(tmp_path / "unet.pt")
    assert "UNet" not in caught.value.what

    family = Family(config=backbone.UNetConfig, build=backbone.UNet, objective="clean", published=read)
    monkeypatch.setitem(BACKBONES, "UNet", family)
    model = model_of_file(tmp_path / "unet.pt")
    assert (model.steps, model.objective.config.limit) == (7, 2.0)
    assert torch.equal(model.backbone.state_dict()["output.weight"], weights["output.weight"])

    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(RepaError) as caught:
        model_of_file(tmp_path / "other.pt")
    assert "SiT" in caught.value.what
    assert "UNet" in caught.value.what
