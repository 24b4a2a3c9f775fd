"""Every method of the registry as a user meets it: planned, refused, paired, resumed, accumulated, compiled.

A method is under these tests from the moment that it stands in the registry.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from every_method import OWN, STEPS, STOP, shrink, small_config, twin_settings, write_cache
from live_targets import Teacher
from repa.cli import app
from repa.commands.sample import SampleFlags, sample
from repa.commands.train import TrainFlags, train
from repa.data.errors import RepaError
from repa.trainer import compiling
from repa.trainer.config import TrainConfig
from repa.trainer.input.datamodule import columns_of_phase
from repa.trainer.input.online import is_target
from repa.trainer.methods import METHODS
from repa.trainer.methods.aligning import PLAIN, Aligning
from repa.trainer.methods.named_presets import unusable_presets
from repa.trainer.run.assembly import assemble
from repa.trainer.run.checked import ProblemsError
from repa.trainer.run.checks import check
from repa.trainer.run.identity import identity_of
from repa.trainer.run.lightning_trainer import make_trainer
from repa.trainer.run.metrics import read_metrics
from repa.trainer.step.checkpoints import checkpoints_of
from repa.trainer.step.module import TrainingModule
from rich.console import Console
from typer.main import get_command
from warmed import Warmed

Fit = Callable[..., Any]

NAMES = sorted(METHODS)
ALIGNING = [name for name in NAMES if issubclass(METHODS[name], Aligning)]
PRESETS = [(name, preset) for name in NAMES for preset in ("none", *METHODS[name].named_presets)]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with everything that a method reads."""
    return write_cache(tmp_path_factory.mktemp("every") / "whole")


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache without a teacher."""
    return write_cache(tmp_path_factory.mktemp("every") / "latents", teacher=False)


def metrics_of(run: Path) -> list[dict[str, float]]:
    return read_metrics(run / "metrics.csv")


def state_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(checkpoints_of(run)[step], weights_only=True)["state_dict"]
    return state


def assert_equal_but_for_rounding(first: Path, second: Path) -> None:
    """Compare what every step logged, of which the later rows tell of the weights too."""
    rows = metrics_of(first)
    for one, two in zip(rows, metrics_of(second), strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-6)
    last = int(rows[-1]["step"])
    assert state_of(first, last).keys() == state_of(second, last).keys()


def assert_close_checkpoints(first: Path, second: Path, step: int) -> None:
    """Compare weights and moments, by the same names and numbers."""
    one, two = (torch.load(checkpoints_of(run)[step], weights_only=True) for run in (first, second))
    for kept in ("state_dict", "optimizer_states"):
        torch.testing.assert_close(one[kept], two[kept], rtol=1e-4, atol=1e-6)


def build_run(config: TrainConfig) -> tuple[TrainingModule, Any]:
    checked = check(config)
    assert checked.problems == []
    return assemble(config, checked, identity_of(checked, config))


def test_the_flag_names_them() -> None:
    command = get_command(app).commands["train"]  # type: ignore[attr-defined]
    (said,) = [each.help for each in command.params if each.name == "method"]
    assert all(f"'{name}'" in said for name in NAMES)


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_a_dry_run_names_phases_and_columns(name: str, preset: str, whole: Path, tmp_path: Path) -> None:
    config = small_config(name, whole, method__preset=preset, activation_checkpointing=2)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    printed = io.StringIO()
    flags = TrainFlags(config=tmp_path / "config.yaml", run=tmp_path / "run", dry_run=True)
    train(flags, console=Console(file=printed, width=300))
    method = check(config).method
    assert method is not None
    phases = method.phases()
    if "stop" in vars(config.method):
        assert len(phases) > 1
    table = printed.getvalue()[printed.getvalue().index("run folder") :]
    depth = check(config).backbone.facts.depth  # type: ignore[union-attr]
    assert f"{depth // 2} of {depth} blocks" in table
    for phase in phases:
        assert f" {phase.name} " in table
        for column in columns_of_phase(method, phase, ()):
            assert f" {column} " in table
    assert not (tmp_path / "run").exists()
    assert unusable_presets(METHODS[name]) == ""


@pytest.mark.parametrize("name", NAMES)
def test_what_the_cache_lacks_is_refused_with_the_command_that_adds_it(
    name: str, whole: Path, latents: Path, run_fit: Fit, tmp_path: Path
) -> None:
    method = check(small_config(name, whole)).method
    assert method is not None
    reads = {column for phase in method.phases() for column in method.columns(phase)}
    config = small_config(name, latents)
    if not reads:
        assert check(config).problems == []
        return
    with pytest.raises(ProblemsError) as caught:
        run_fit(config)
    assert not (tmp_path / "run").exists()
    for problem in caught.value.problems:
        assert problem.field
        assert "`repa preprocess --encoder" in problem.remedy


@pytest.mark.parametrize("name", ALIGNING)
def test_an_alignment_that_ends_before_it_begins_is_refused(name: str, whole: Path) -> None:
    (problem,) = check(small_config(name, whole, method__stop=0)).problems
    assert problem.field == "method.stop"
    with pytest.raises(RepaError) as caught:
        small_config(name, whole, method__stop="soon")
    assert caught.value.field == "method.stop"


def seen_in_steps(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], dict[str, Any]]:
    """Return what the steps of a run see, and the weights its backbone begins with."""
    module, data = build_run(config)
    weights = {key: value.clone() for key, value in module.backbone.named_parameters() if value.requires_grad}
    steps: list[Any] = []
    losses = module.method.losses
    monkeypatch.setattr(module.method, "losses", lambda step: (steps.append(step), losses(step))[1])
    data.trainer = make_trainer(config)
    stream = data.train_dataloader()
    rows = []
    for _ in range(STEPS):
        batch = next(stream)
        rows.append(batch.rows.tolist())
        module.terms(batch)
    data.teardown("fit")
    return [
        (row, step.x0, step.noise, step.t, step.condition) for row, step in zip(rows, steps, strict=True)
    ], weights


@pytest.mark.parametrize("name", [each for each in NAMES if each != "none"])
def test_it_sees_the_same_as_none_and_begins_with_the_same_weights(
    name: str, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows, latents, noise, dropped labels and, by the same law, times are equal to the bit.

    So runs can be compared.
    """
    config = small_config(name, whole)
    method = check(config).method
    assert method is not None
    steps, weights = seen_in_steps(config, monkeypatch)
    twin = twin_settings(config)
    plain, begun = seen_in_steps(small_config("none", whole, **twin), monkeypatch)
    for index, (one, other) in enumerate(zip(steps, plain, strict=True)):
        assert one[0] == other[0]
        own_law = "times" not in twin and method.time_law(method.phase_at(index)) is not None
        compared = [1, 2, 4] if own_law else [1, 2, 3, 4]
        assert all(torch.equal(one[place], other[place]) for place in compared)
    assert begun.keys() <= weights.keys()
    assert all(torch.equal(weights[key], value) for key, value in begun.items())


@pytest.mark.parametrize("name", NAMES)
def test_with_its_teacher_live_it_is_the_run_from_the_cache(
    name: str,
    whole: Path,
    undisturbed: Callable[..., Path],
    run_fit: Fit,
    same_run: Callable[[Path, Path, int], None],
    tmp_path: Path,
) -> None:
    """To the bit, and none is called in a phase that reads no target."""
    config = small_config(name, whole, targets="online")
    teacher = Teacher(whole)
    method = check(small_config(name, whole)).method
    assert method is not None
    reading = [any(map(is_target, method.columns(method.phase_at(step)))) for step in range(STEPS)]
    if not any(reading):
        with pytest.raises(ProblemsError) as caught:
            run_fit(config, live=teacher)
        assert [problem.field for problem in caught.value.problems] == ["--targets"]
        return
    run_fit(config, live=teacher)
    same_run(undisturbed(small_config(name, whole)), tmp_path / "run", STEPS)
    assert len(teacher.asked) == sum(reading)


@pytest.mark.parametrize("name", NAMES)
def test_killed_and_resumed_at_every_boundary_of_phases(
    name: str,
    whole: Path,
    undisturbed: Callable[..., Path],
    run_fit: Fit,
    killed_fit: Callable[..., None],
    same_run: Callable[[Path, Path, int], None],
    tmp_path: Path,
) -> None:
    config = small_config(name, whole)
    method = check(config).method
    assert method is not None
    boundaries = [phase.start for phase in method.phases()[1:]] or [STOP]
    for boundary in boundaries:
        folder = f"killed-{boundary}"
        killed_fit(config, folder, moment=boundary + 1)
        outcome, _ = run_fit(config, folder)
        assert outcome.resumed_from == boundary
        same_run(undisturbed(config), tmp_path / folder, STEPS)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_computed_again_change_no_bit_and_may_be_others_after_a_resume(
    name: str,
    whole: Path,
    undisturbed: Callable[..., Path],
    run_fit: Fit,
    killed_fit: Callable[..., None],
    same_run: Callable[[Path, Path, int], None],
    tmp_path: Path,
) -> None:
    killed_fit(small_config(name, whole, activation_checkpointing=1), "run", moment=STOP + 1)
    outcome, _ = run_fit(small_config(name, whole, activation_checkpointing=2))
    assert outcome.resumed_from == STOP
    same_run(undisturbed(small_config(name, whole)), tmp_path / "run", STEPS)


class Pixels:
    name, weights_sha256 = "pixels", "0"

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return (128 + 20 * latent[:, :3]).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("name", NAMES)
def test_it_has_a_held_out_loss_and_samples(
    name: str,
    whole: Path,
    undisturbed: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = undisturbed(small_config(name, whole))
    assert [{"held_out", "held_out_ema"} <= row.keys() for row in metrics_of(run)] == [False, True] * 2
    monkeypatch.setattr("repa.commands.shared.prepared.decoder_of", lambda *_: Pixels())
    sample(SampleFlags(run=run, num=3, steps=2, guidance=1.5, npz=True, out=tmp_path / "out"))
    with np.load(tmp_path / "out" / "samples.npz") as arrays:
        images = arrays["arr_0"]
    assert images.shape == (3, 8, 8, 3)
    assert images.std() > 1


@pytest.mark.parametrize("name", ALIGNING)
def test_from_the_stop_on_nothing_of_it_is_left(
    name: str, whole: Path, undisturbed: Callable[..., Path]
) -> None:
    """No column, no term and no parameter of the alignment; what lasts is what the method itself says."""
    config = small_config(name, whole)
    module, _ = build_run(config)
    method = module.method
    assert isinstance(method, Aligning)
    before, after = method.phase_at(STOP - 1), method.phase_at(STOP)
    assert after.name == PLAIN
    aligned = set(method.aligned_columns())
    assert aligned <= set(method.columns(before))
    assert not aligned or aligned - set(method.columns(after))
    rows = metrics_of(undisturbed(config))
    terms = [{key.removesuffix("_weight") for key in row if key.endswith("_weight")} for row in rows]
    assert len(terms[0]) > len(terms[-1])
    assert [each == terms[-1] for each in terms] == [step >= STOP for step in range(STEPS)]
    at_stop, end = (state_of(undisturbed(config), step) for step in (STOP, STEPS))
    idle = [key for key in end if key.startswith(method.flags(after).idle)]
    assert all(torch.equal(end[key], at_stop[key]) for key in idle)
    start = module.state_dict()
    assert not idle or any(not torch.equal(at_stop[key], start[key]) for key in idle)
    moving = [key for key, value in module.named_parameters() if value.requires_grad and key not in idle]
    assert any(not torch.equal(end[key], at_stop[key]) for key in moving)


@pytest.mark.parametrize("name", NAMES)
def test_one_batch_of_eight_is_two_of_four(
    name: str, whole: Path, undisturbed: Callable[..., Path], run_fit: Fit, tmp_path: Path
) -> None:
    whole_batches = undisturbed(small_config(name, whole))
    run_fit(small_config(name, whole, accumulate=2))
    assert_equal_but_for_rounding(whole_batches, tmp_path / "run")


# tests of their own compile the others, or networks that are asked for the same
UNLIKE_OTHERS = ("reg", "urepa")


@pytest.mark.parametrize(
    "name",
    [name if name in UNLIKE_OTHERS else pytest.param(name, marks=pytest.mark.thorough) for name in NAMES],
)
def test_compiled_is_plain_within_rounding(
    name: str, whole: Path, run_fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the ``eager`` backend, which keeps what dynamo captures and waits for no compiler."""
    graphs = []
    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "BACKEND", lambda graph, _: (graphs.append(1), graph.forward)[1])
    config = small_config(name, whole, max_steps=2)
    run_fit(config, "plain")
    assert not graphs
    run_fit(small_config(name, whole, max_steps=2, compile="whole"), "compiled")
    assert graphs
    assert_equal_but_for_rounding(tmp_path / "plain", tmp_path / "compiled")


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
def test_compiled_for_this_machine_is_plain_within_rounding(
    name: str, whole: Path, undisturbed: Callable[..., Path], run_fit: Fit, tmp_path: Path
) -> None:
    torch._dynamo.reset()
    run_fit(small_config(name, whole, compile="blocks"))
    assert_equal_but_for_rounding(undisturbed(small_config(name, whole)), tmp_path / "run")


def few(name: str) -> dict[str, Any]:
    """Settings of two steps, of which the second is of another phase where that can be."""
    stops = name in ALIGNING and not OWN.get(name)
    # with weight decay, which must not reach what rests
    values = {"max_steps": 2, "holdout": 0, "weight_decay": 0.1, "checkpoint_every": 2}
    return values | ({"method__stop": 1} if stops else {})


TWO_RANKS = """
import io, sys
from pathlib import Path
from rich.console import Console
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from every_method import shrink
from repa.trainer.config import build
from repa.trainer.settings_file import load_yaml
from repa.trainer.run.fit import fit

if __name__ == "__main__":
    shrink()
    for file in sorted(Path(sys.argv[2]).glob("*.yaml")):
        fit(build(load_yaml(file)), file.with_suffix(""), console=Console(file=io.StringIO()))
"""


# whose weights are cut without `thorough`, as each such run takes as long as five others: another backbone
# with a projector, what rests in a phase, a vector beside the latent, and an average that teaches; those of
# HASTE are cut in `test_sharded_runs`
CUT = ("LightningDiT", "erw", "reg", "sra")


@pytest.mark.slow
@pytest.mark.parametrize(
    "all_cut",
    [pytest.param(False, id="some-cut"), pytest.param(True, id="all-cut", marks=pytest.mark.thorough)],
)
def test_two_ranks_are_one_that_accumulates(
    all_cut: bool, whole: Path, run_fit: Fit, tmp_path: Path, warmed: Warmed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All in one process group: micro-batch k with the draws of rank k gives what two ranks give.

    They give it with weights that are cut over both, too, to the last moment of the optimiser.
    """
    runs = tmp_path / "runs"
    runs.mkdir()
    asked = {name: (name, few(name)) for name in NAMES}
    asked["LightningDiT"] = ("repa", few("repa") | {"model": "LightningDiT-T/2"})
    asked["DiT"] = ("sra", few("sra") | {"model": "DiT-T/2"})
    devices = {"trainer__devices": 2, "trainer__accelerator": "cpu"}
    for name, (method, changes) in asked.items():
        two = small_config(method, whole, **changes, **devices)
        (runs / f"{name}.yaml").write_text(two.to_yaml())
        if all_cut or name in CUT:
            cut = small_config(method, whole, **changes, **devices, trainer__strategy="fsdp")
            (runs / f"{name}-cut.yaml").write_text(cut.to_yaml())
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    ended = warmed.run(script, Path(__file__).parents[1] / "support", runs, ranks=2)
    assert [each.returncode for each in ended] == [0, 0], ended

    draw, rank = TrainingModule.terms, [0]

    def terms_of_a_rank(self: TrainingModule, batch: Any, draws: Any = None) -> Any:
        from dataclasses import replace

        rank[0], self._draws = batch.micro, None
        config, self.config = self.config, replace(self.config, accumulate=1)
        try:
            return draw(self, replace(batch, micro=0), draws)
        finally:
            rank[0], self.config = 0, config

    monkeypatch.setattr(TrainingModule, "terms", terms_of_a_rank)
    monkeypatch.setattr(TrainingModule, "global_rank", property(lambda self: rank[0]))
    for name, (method, changes) in asked.items():
        run_fit(small_config(method, whole, **changes, accumulate=2), name)
        assert_equal_but_for_rounding(tmp_path / name, runs / name)
        if all_cut or name in CUT:
            assert_equal_but_for_rounding(runs / name, runs / f"{name}-cut")
            assert_close_checkpoints(runs / name, runs / f"{name}-cut", 2)
