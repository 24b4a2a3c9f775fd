"""A run's folder, its checkpoints, what is refused, previews, and two ranks."""

from __future__ import annotations

import errno
import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from repa.data.errors import CacheError, CorruptRowError, RepaError
from repa.data.testing import synthetic_cache
from repa.trainer.config import build
from repa.trainer.run.assembly import assemble
from repa.trainer.run.checked import ProblemsError
from repa.trainer.run.checks import check
from repa.trainer.run.fit import fit
from repa.trainer.run.identity import identity_of
from repa.trainer.run.launch import is_leader
from repa.trainer.run.metrics import read_metrics
from repa.trainer.settings_file import load_yaml
from repa.trainer.step.checkpoints import checkpoints_of, load_checkpoint
from repa.trainer.step.draws import StepDraws
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Callable

    from repa.trainer.config import TrainConfig
    from warmed import Warmed

    Settings = Callable[..., TrainConfig]
    Fit = Callable[..., Any]


class FlatDecoder:
    """A decoder whose image is the latent's mean, to see what it was given."""

    def __init__(self) -> None:
        self.latents: list[torch.Tensor] = []

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        self.latents.append(latent.clone())
        grey = (128 + 40 * latent.mean(dim=(1, 2, 3))).clamp(0, 255).to(torch.uint8)
        return grey.view(-1, 1, 1, 1).expand(-1, 3, 8, 8)


def test_the_folder_of_a_run(settings: Settings, run_fit: Fit, tmp_path: Path) -> None:
    config = settings(max_steps=6, holdout=7, eval_every=3, log_every=2, checkpoint_every=2, keep_every=2)
    outcome, _ = run_fit(config, command=["repa", "train"])
    run = tmp_path / "run"
    assert (outcome.step, outcome.finished, outcome.resumed_from, outcome.trained) == (6, True, 0, True)
    assert build(load_yaml(run / "config.yaml")) == config
    rows = read_metrics(run / "metrics.csv")
    assert [row["step"] for row in rows] == [2, 3, 4, 6]
    assert [sorted(row) for row in rows][1] == ["held_out", "held_out_ema", "step"]
    assert list(rows[-1]) == [
        "step",
        "loss",
        "velocity",
        "repa",
        "repa_weight",
        "gradient_norm",
        "held_out_ema",
        "held_out",
    ]
    start = json.loads((run / "run.json").read_text())["starts"][0]
    assert start["command"] == ["repa", "train"]
    assert start["seed"] == 0
    assert start["cache_source"].startswith("sha256:")
    assert start["libraries"]["torch"] == torch.__version__.split("+")[0] or start["libraries"]["torch"]
    assert [row["step"] for row in read_metrics(run / "timing.csv")] == [2, 4, 6]
    assert list(checkpoints_of(run)) == [2, 4, 6]


def test_old_checkpoints_go_and_milestones_stay(settings: Settings, run_fit: Fit, tmp_path: Path) -> None:
    run_fit(settings(max_steps=7, checkpoint_every=1, keep_last=2, keep_every=3))
    assert list(checkpoints_of(tmp_path / "run")) == [3, 6, 7]


def test_checkpoints_hold_tensors_and_plain_values_only(
    settings: Settings, run_fit: Fit, tmp_path: Path
) -> None:
    run_fit(settings(max_steps=2))
    path = checkpoints_of(tmp_path / "run")[2]
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["CacheData"] == {"images_seen": 16}
    prefixes = {key.split(".")[0] for key in checkpoint["state_dict"]}
    assert prefixes == {"backbone", "ema", "method"}
    assert checkpoint["repa"]["backbone"]["width"] == 48
    assert not any("rng" in str(key) for key in checkpoint)


def test_a_finished_run_says_so(settings: Settings, run_fit: Fit, tmp_path: Path) -> None:
    config = settings(max_steps=2)
    run_fit(config)
    before = (tmp_path / "run" / "metrics.csv").read_bytes()
    outcome, printed = run_fit(config)
    assert not outcome.trained
    assert outcome.finished
    assert "finished: 2 steps" in printed
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == before


def test_more_steps_go_on(settings: Settings, run_fit: Fit, tmp_path: Path) -> None:
    run_fit(settings(max_steps=2, log_every=2))
    outcome, printed = run_fit(settings(max_steps=4, log_every=2))
    assert (outcome.resumed_from, outcome.step) == (2, 4)
    assert "resuming" in printed
    run_fit(settings(max_steps=4, log_every=2), "whole")
    texts = [(tmp_path / name / "metrics.csv").read_bytes() for name in ("run", "whole")]
    assert texts[0] == texts[1]


def test_other_settings_are_refused(settings: Settings, run_fit: Fit) -> None:
    run_fit(settings(max_steps=1))
    with pytest.raises(RepaError) as caught:
        run_fit(settings(max_steps=1, seed=1, lr=1e-3))
    assert caught.value.field == "seed"


def test_another_cache_is_refused(settings: Settings, run_fit: Fit, tmp_path: Path) -> None:
    run_fit(settings(max_steps=1))
    synthetic_cache(tmp_path / "other", num_rows=40, seed=1, invalid={5: "damaged"})
    with pytest.raises(CacheError, match="source changed"):
        run_fit(settings(max_steps=2, cache=str(tmp_path / "other")))
    synthetic_cache(tmp_path / "holes", num_rows=40, invalid={5: "damaged", 6: "damaged"})
    with pytest.raises(CacheError, match="valid rows changed"):
        run_fit(settings(max_steps=2, cache=str(tmp_path / "holes")))
    synthetic_cache(tmp_path / "drawn", num_rows=40, invalid={5: "damaged"}, random_weights=True)
    with pytest.raises(CacheError, match="sd-vae, demo changed"):
        run_fit(settings(max_steps=2, cache=str(tmp_path / "drawn")))


def test_the_same_cache_elsewhere_goes_on(settings: Settings, run_fit: Fit, tmp_path: Path) -> None:
    run_fit(settings(max_steps=1))
    synthetic_cache(tmp_path / "moved", num_rows=40, invalid={5: "damaged"})
    outcome, _ = run_fit(settings(max_steps=2, cache=str(tmp_path / "moved")))
    assert outcome.resumed_from == 1


def test_problems_stop_before_the_folder_is_made(settings: Settings, run_fit: Fit, tmp_path: Path) -> None:
    with pytest.raises(ProblemsError) as caught:
        run_fit(settings(batch_size=50, method__depth=7))
    assert len(caught.value.problems) == 2
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_named(settings: Settings, run_fit: Fit, tmp_path: Path) -> None:
    run_fit(settings(max_steps=2))
    path = checkpoints_of(tmp_path / "run")[2]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RepaError, match=r"step-00000002\.ckpt is damaged .*delete it"):
        run_fit(settings(max_steps=3))


def test_a_foreign_checkpoint_is_named(tmp_path: Path) -> None:
    torch.save({"model": {}}, tmp_path / "a.ckpt")
    with pytest.raises(RepaError, match="no checkpoint of a run"):
        load_checkpoint(tmp_path / "a.ckpt")


def test_one_process_a_folder(settings: Settings, run_fit: Fit, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    script = (
        "import fcntl, os, sys; d = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT);"
        "fcntl.lockf(d, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "run" / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RepaError, match="another process is training"):
            run_fit(settings(max_steps=1))
    run_fit(settings(max_steps=1))


def test_divergence_stops_the_run(settings: Settings, run_fit: Fit, tmp_path: Path) -> None:
    with pytest.raises(RepaError, match=r"diverged.*--lr"):
        run_fit(settings(lr=1e30, clip=None, max_steps=8, checkpoint_every=100))
    assert checkpoints_of(tmp_path / "run") == {}


def test_previews_are_of_the_same_noise_and_the_averaged_weights(
    settings: Settings, run_fit: Fit, tmp_path: Path
) -> None:
    decoder = FlatDecoder()
    config = settings(max_steps=4, preview_every=2, preview_count=5, preview_steps=2, ema_decay=0.0, lr=1e-2)
    run_fit(config, decoder=decoder)
    folder = tmp_path / "run" / "samples"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002.png", "step-00000004.png"]
    with Image.open(folder / "step-00000002.png") as grid:
        assert grid.size == (3 * 10 + 2, 2 * 10 + 2)
    assert decoder.latents[0].shape == (5, 4, 4, 4)
    assert not torch.equal(*decoder.latents)
    again = FlatDecoder()
    run_fit(config, "again", decoder=again)
    assert torch.equal(decoder.latents[1], again.latents[1])
    shifted = FlatDecoder()
    run_fit(replace(config, preview_shift=0.5), "shifted", decoder=shifted)
    assert not torch.equal(decoder.latents[1], shifted.latents[1])


def test_previews_change_nothing_else(settings: Settings, run_fit: Fit, tmp_path: Path) -> None:
    run_fit(settings(preview_every=1, preview_count=2, preview_steps=1), "with", decoder=FlatDecoder())
    run_fit(settings(), "without")
    texts = [(tmp_path / name / "metrics.csv").read_bytes() for name in ("with", "without")]
    assert texts[0] == texts[1]


def test_no_decoder_is_a_note(settings: Settings, run_fit: Fit) -> None:
    class Absent:
        def decode(self, latent: torch.Tensor) -> torch.Tensor:
            raise RepaError("its weights are not here")

    _, printed = run_fit(settings(preview_every=1, preview_count=1, preview_steps=1), decoder=Absent())
    assert printed.count("no previews: its weights are not here") == 1
    _, printed = run_fit(settings(preview_every=1), "other")
    assert printed.count("no previews") == 1


def test_a_corrupt_row_is_named(settings: Settings, run_fit: Fit, cache: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(cache, copy)
    for shard in (copy / "demo" / "patch" / "c").rglob("*"):
        if shard.is_file():
            data = bytearray(shard.read_bytes())
            data[10] ^= 1
            shard.write_bytes(data)
    with pytest.raises(CorruptRowError, match=r"row \d+ of demo/patch is corrupt"):
        run_fit(settings(cache=str(copy), max_steps=20))


def test_a_full_disk_is_named(
    settings: Settings, run_fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(checkpoint: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("repa.trainer.step.checkpoints.torch.save", save)
    with pytest.raises(RepaError, match=r"cannot write .*step-00000004\.ckpt: No space left.*free some"):
        run_fit(settings())
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_the_bar_of_a_terminal(settings: Settings, tmp_path: Path) -> None:
    printed = io.StringIO()
    fit(settings(), tmp_path / "run", console=Console(file=printed, force_terminal=True, width=120))
    assert "4/4" in printed.getvalue()
    assert "images/s" in printed.getvalue()


SRUN = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "3", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("variables", "leads"),
    [
        ({}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"NODE_RANK": "1"}, False),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "8", "WORLD_SIZE": "16", "LOCAL_RANK": "0"}, False),
        (SRUN, False),
        ({**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, True),
        # Lightning's child in a batch script: SLURM_PROCID is that of the script
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "LOCAL_RANK": "1"}, False),
    ],
)
def test_the_leader(variables: dict[str, str], leads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_leader() == leads


TWO_RANKS = """
import io, sys
from pathlib import Path
from rich.console import Console
import torch
torch.set_num_threads(1)
from repa.trainer.config import build
from repa.trainer.run.fit import fit
from repa.trainer.models.sit import SIT_SIZES, SiTSize

if __name__ == "__main__":
    SIT_SIZES["T"] = SiTSize(depth=2, width=48, heads=3)
    fit(build(assignments=sys.argv[2:]), Path(sys.argv[1]), console=Console(file=io.StringIO()))
"""


@pytest.mark.slow
def test_two_ranks_share_the_global_batch(settings: Settings, tmp_path: Path, warmed: Warmed) -> None:
    """The loss is the mean over two gloo ranks' halves of the same global rows, each with its draws.

    The second is started by the first, as with ``repa train``.
    """
    config = settings(
        max_steps=3,
        holdout=7,
        eval_every=3,
        loggers="csv,tensorboard" if find_spec("tensorboard") else "csv",
        trainer__devices=2,
        trainer__accelerator="cpu",
    )
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    words = [f"{key}={value}" for key, value in flat(config.to_dict()) if key != "recipe"]
    (result,) = warmed.run(script, tmp_path / "run", *words)
    assert result.returncode == 0, result.stderr
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert {"held_out", "held_out_ema"} <= rows[2].keys()
    # rank 0 alone reports
    told = (tmp_path / "run" / "csv" / "metrics.csv").read_text().splitlines()
    column = told[0].split(",").index("step")
    assert [int(line.split(",")[column]) for line in told[1:]] == [1, 2, 3]
    assert len(list((tmp_path / "run").glob("tensorboard/events*"))) == config.loggers.count("tensorboard")

    checked = check(settings(max_steps=3, holdout=7))
    module, _ = assemble(settings(), checked, identity_of(checked, settings()))
    losses = [rank_loss(module, checked, rank) for rank in range(2)]
    assert rows[0]["velocity"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)
    assert load_checkpoint(checkpoints_of(tmp_path / "run")[3])["CacheData"] == {"images_seen": 24}


def flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            pairs += flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            pairs.append((prefix + key, ",".join(map(str, value))))
        else:
            pairs.append((prefix + key, value))
    return pairs


@torch.no_grad()
def rank_loss(module: Any, checked: Any, rank: int) -> float:
    """Velocity loss of step 0 on a rank's half of the global batch."""
    from repa.data.reading.latents import sample_posterior, scale_latent
    from repa.data.reading.loader import CacheLoader

    loader = CacheLoader(
        checked.reader,
        rows=checked.train_rows,
        batch_size=8,
        rank=rank,
        world=2,
        columns_at=module.columns_at,
    )
    batch = next(iter(loader))
    loader.close()
    made = StepDraws(seed=0, rank=rank, device=torch.device("cpu"))
    draws = made.of_step(0, 4, (4, 4, 4), module.objective.times, module.backbone.y_embedder)
    x0 = scale_latent(
        sample_posterior(batch.columns["sd-vae/moments"], draws.posterior), *module.latents.scale
    )
    x_t = module.objective.interpolate(x0, draws.noise, draws.t)
    condition = module.backbone.y_embedder.condition(batch.label, draws.dropped)
    velocity = module.backbone(x_t, draws.t, condition).prediction
    return float((velocity - (draws.noise - x0)).square().mean())
