"""Runs on a teacher's patch tokens in place of the autoencoder's latents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from every_method import shrink, small_config, write_cache
from hypothesis import given
from hypothesis import strategies as st
from repa.data.errors import RepaError
from repa.data.format.columns import ColumnSpec
from repa.data.format.int8 import quantise
from repa.data.reading.reader import CacheReader
from repa.data.testing import SYNTHETIC_COLUMNS, expected_row, synthetic_cache
from repa.trainer.config import TrainConfig
from repa.trainer.input import statistics
from repa.trainer.input.statistics import token_statistics
from repa.trainer.methods.registry import METHODS
from repa.trainer.run import assembly
from repa.trainer.run.assembly import assemble
from repa.trainer.run.checks import check
from repa.trainer.run.identity import identity_of
from repa.trainer.run.initial import read_initial
from repa.trainer.run.lightning_trainer import make_trainer
from repa.trainer.sampling.generate import generate, known_latents, model_of_run
from repa.trainer.sampling.settings import SamplerConfig
from repa.trainer.step.latents import TokenLatents

Settings = Callable[..., TrainConfig]

TOKENS = "demo/patch"
INT8 = {
    **SYNTHETIC_COLUMNS,
    TOKENS: ColumnSpec(shape=(4, 16), dtype="int8"),
    f"{TOKENS}-scale": ColumnSpec(shape=(16,), dtype="float32"),
}


@pytest.fixture(scope="module")
def two_views(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `cache`, in two views and with int8 tokens."""
    path = tmp_path_factory.mktemp("tokens") / "cache"
    synthetic_cache(path, num_rows=24, columns=INT8, views=("original", "mirrored"))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("tokens") / "whole")


@pytest.fixture
def on_tokens(settings: Settings) -> Settings:
    def make(**changes: Any) -> TrainConfig:
        values = {"model": "SiT-T/1", "method": "none", "latents": TOKENS, **changes}
        return settings(**values)

    return make


def stored(cache: Path, rows: np.ndarray, columns: tuple[str, ...] = (TOKENS,)) -> dict[str, torch.Tensor]:
    with CacheReader(cache, columns) as reader:
        specs = reader.manifest.columns
        out = {name: np.empty((len(rows), *specs[name].shape), specs[name].numpy_dtype) for name in columns}
        reader.read_rows(rows, columns, out)
    return {name: torch.from_numpy(values) for name, values in out.items()}


def test_tokens_are_standardised_at_each_position_and_channel(cache: Path) -> None:
    rows = np.array([row for row in range(40) if row != 5])
    with CacheReader(cache, (TOKENS,)) as reader:
        mean, std = token_statistics(reader, (TOKENS,), (2, 2), rows)
    spec = SYNTHETIC_COLUMNS[TOKENS]
    values = np.stack([expected_row(TOKENS, row, spec) for row in rows]).astype(np.float64)
    for position in range(4):
        for channel in range(16):
            own = values[:, position, channel]
            place = channel, position // 2, position % 2
            assert float(mean[place]) == pytest.approx(own.mean(), abs=1e-6)
            assert float(std[place]) == pytest.approx(own.std(), rel=1e-6)
    latents = TokenLatents((TOKENS,), mean, std)
    columns = stored(cache, rows)
    x0 = latents.x0(columns)
    assert x0.shape == latents.shape(columns) == (39, 16, 2, 2)
    assert float(x0.double().mean(0).abs().max()) < 1e-6
    assert float((x0.double().std(0, correction=0) - 1).abs().max()) < 1e-6
    again = latents.unscaled(x0).flatten(2).mT
    assert float((again - columns[TOKENS].float()).abs().max()) < 1e-5


def test_both_views_and_the_scales_of_int8_count(two_views: Path) -> None:
    names = (TOKENS, f"{TOKENS}-scale")
    rows = np.arange(24)
    with CacheReader(two_views, names) as reader:
        mean, std = token_statistics(reader, names, (2, 2), rows)
    values = np.stack(
        [
            expected_row(TOKENS, row, INT8[TOKENS], view=view).astype(np.float64)
            * expected_row(names[1], row, INT8[names[1]], view=view)
            for row in rows
            for view in (0, 1)
        ]
    )
    assert float(mean[3, 1, 0]) == pytest.approx(values[:, 2, 3].mean(), abs=1e-6)
    assert float(std[3, 1, 0]) == pytest.approx(values[:, 2, 3].std(), rel=1e-5)
    first = TokenLatents(names, mean, std).x0(stored(two_views, rows, names))
    expected = (values[14, 2, 3] - float(mean[3, 1, 0])) / float(std[3, 1, 0])
    assert float(first[7, 3, 1, 0]) == pytest.approx(expected, rel=1e-4)


def test_what_never_varies_is_centred_and_no_more(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = np.float32(1 / 3) * np.arange(1, 65, dtype=np.float32).reshape(4, 16)
    monkeypatch.setattr(
        statistics,
        "read_all_views",
        lambda reader, rows, names: {TOKENS: np.broadcast_to(row, (len(rows), 1, 4, 16)).copy()},
    )
    with CacheReader(cache, (TOKENS,)) as reader:
        mean, std = token_statistics(reader, (TOKENS,), (2, 2), np.arange(39))
    assert torch.equal(std, torch.ones(16, 2, 2))
    x0 = TokenLatents((TOKENS,), mean, std).x0({TOKENS: torch.from_numpy(row)[None]})
    assert torch.equal(x0, torch.zeros(1, 16, 2, 2))


@given(gain=st.floats(0.01, 100), ratio=st.floats(-10, 10), mirrored=st.booleans(), seed=st.integers(0, 9))
def test_gain_and_bias_of_the_final_norm_leave_the_latents(
    gain: float, ratio: float, mirrored: bool, seed: int
) -> None:
    """What RAE trains on, which has neither, is what this trains on."""
    a = -gain if mirrored else gain
    plain = torch.randn(20, 4, 3, generator=torch.Generator().manual_seed(seed))

    def standardised(tokens: torch.Tensor) -> torch.Tensor:
        picture = tokens.mT.reshape(20, 3, 2, 2)
        latents = TokenLatents((TOKENS,), picture.mean(0), picture.std(0, correction=0))
        return latents.x0({TOKENS: tokens})

    expected = standardised(plain) * (-1 if mirrored else 1)
    assert float((standardised(a * plain + a * ratio) - expected).abs().max()) < 2e-4


def test_train_stop_and_go_on(
    on_tokens: Settings,
    undisturbed: Callable[..., Path],
    killed_fit: Callable[..., None],
    run_fit: Any,
    same_run: Callable[[Path, Path, int], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = on_tokens(max_steps=6, checkpoint_every=2, holdout=8, eval_every=3, lr=1e-2, ema_decay=0.5)
    whole = undisturbed(config)
    killed_fit(config, "run", moment=5)

    def again(*_: Any) -> None:
        raise AssertionError("the checkpoint has the statistics")

    monkeypatch.setattr(assembly, "token_statistics", again)
    run_fit(config)
    same_run(whole, tmp_path / "run", 6)
    model = model_of_run(whole)
    assert model.scale is None
    assert model.tokens is not None
    assert (model.tokens.teacher, model.tokens.columns, model.tokens.grid) == ("demo", (TOKENS,), (2, 2))
    made = known_latents(model)
    assert isinstance(made, TokenLatents)
    rows = check(config).train_rows
    assert rows is not None
    seen = stored(Path(config.cache), rows)[TOKENS].float()
    assert torch.allclose(made.mean.flatten(1).mT, seen.mean(0), atol=1e-5)
    settings = SamplerConfig(solver="euler", steps=2)
    found = torch.cat(list(generate(model, torch.tensor([0, 1, 2]), settings, seed=0, batch_size=2)))
    assert found.shape == (3, 16, 2, 2)
    assert found.isfinite().all()


def test_weights_of_tokens_of_other_images_are_said(
    on_tokens: Settings, run_fit: Any, tmp_path: Path
) -> None:
    run_fit(on_tokens(max_steps=1), "first")
    said = {}
    for name, changes in {"same": {}, "other": {"holdout": 20}}.items():
        config = on_tokens(max_steps=1, init=str(tmp_path / "first"), **changes)
        checked = check(config)
        module, _ = assemble(config, checked, identity_of(checked, config))
        said[name] = read_initial(config.init, checked).load_into(module)
    assert said["same"] == ()
    (line,) = said["other"]
    assert "deviation" in line


def test_no_posterior_is_drawn_and_the_rest_is_as_of_latents(on_tokens: Settings) -> None:
    config = on_tokens()
    checked = check(config)
    module, data = assemble(config, checked, identity_of(checked, config))
    data.trainer = make_trainer(config)
    batch = next(iter(data.train_dataloader()))
    data.teardown("fit")
    assert set(batch.columns) == {TOKENS}
    terms = module.terms(batch)
    draws = module._draws
    assert draws is not None
    assert draws._draws is not None
    assert draws._draws.posterior is None
    noise = draws._draws.noise
    x0 = module.latents.x0(batch.columns, None)
    t = draws._draws.t
    x_t = (1 - t.view(-1, 1, 1, 1)) * x0 + t.view(-1, 1, 1, 1) * noise
    condition = module.backbone.y_embedder.condition(batch.label, draws._draws.dropped)
    prediction = module.backbone(x_t, t, condition).prediction
    expected = (prediction - noise + x0).square().mean().detach()
    assert float(terms["velocity"].value.detach()) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_tokens(name: str, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each makes a step on the tokens of a teacher, at a patch of 1."""
    shrink(monkeypatch)
    family = METHODS[name].default_model.rpartition("-")[0]
    config = small_config(name, whole, latents=TOKENS, model=f"{family}-T/1")
    checked = check(config)
    assert checked.problems == []
    module, data = assemble(config, checked, identity_of(checked, config))
    data.trainer = make_trainer(config)
    batch = next(iter(data.train_dataloader()))
    data.teardown("fit")
    assert "sd-vae/moments" not in batch.columns
    values = {key: term.value for key, term in module.terms(batch).items()}
    assert all(torch.isfinite(value).all() for value in values.values())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"latents": "demo/cls"}, "latents"),
    "no column": ({"latents": "tokens"}, "latents"),
    "of a teacher that is not there": ({"latents": "dinov2-b-reg/patch"}, "latents"),
    "a norm of latents": ({"latent_norm": "channel"}, "latent_norm"),
    "a factor": ({"latent_scale": 0.5}, "latent_scale"),
    "a shift that a solver does not take": (
        {"evaluate_every": 1, "evaluate_shift": 0.5, "evaluate_solver": "sde"},
        "evaluate_shift",
    ),
    "a decoder of tokens for latents": ({"latents": "sd-vae/moments", "decoder": "rae"}, "decoder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused(case: str, on_tokens: Settings) -> None:
    changes, field = REFUSED[case]
    problems = check(on_tokens(**changes)).problems
    assert [problem.field for problem in problems] == [field]
    assert all(problem.remedy for problem in problems)


def test_what_may_disappoint_is_said(on_tokens: Settings, two_views: Path) -> None:
    assert check(on_tokens()).warnings == []
    narrow = check(on_tokens(model="SiT-T/2")).warnings
    assert len(narrow) == 1
    own = check(on_tokens(method="repa", method__depth=1, method__projector_width=16)).warnings
    assert len(own) == 1
    coarse = check(on_tokens(cache=str(two_views))).warnings
    assert len(coarse) == 1
    assert len({*narrow, *own, *coarse}) == 3


def test_a_run_on_tokens_is_bound_to_them(on_tokens: Settings, run_fit: Any) -> None:
    run_fit(on_tokens(max_steps=1))
    with pytest.raises(RepaError) as caught:
        run_fit(on_tokens(max_steps=2, latents="sd-vae/moments", model="SiT-T/1"))
    assert caught.value.field == "latents"


def test_int8_rounds_a_latent_by_a_known_share(two_views: Path) -> None:
    """Half a step of the scale, over the deviation of the number."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(64, 4, 16, generator=generator)
    values, scale = quantise(tokens)
    picture = tokens.mT.reshape(64, 16, 2, 2)
    latents = TokenLatents(("a/patch", "a/patch-scale"), picture.mean(0), picture.std(0, correction=0))
    exact = TokenLatents(("a/patch",), latents.mean, latents.std).x0({"a/patch": tokens})
    rounded = latents.x0({"a/patch": values, "a/patch-scale": scale})
    bound = (scale[:, :, None, None] / 2) / latents.std
    assert bool(((exact - rounded).abs() <= bound * (1 + 1e-4) + 1e-6).all())
