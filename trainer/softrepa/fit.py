"""A run of SoftREPA from its folder and checks to the tokens, with the parts that any run is made of."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...data.edge import parse
from ...data.errors import CacheError, RepaError
from ...data.format.captions import EMPTY
from ...data.reading.reader import CacheReader
from ...data.storage.files import os_errors, write_file
from ...data.units import counted
from ..input.datamodule import CacheData
from ..models.soft_inputs import take_soft_tokens
from ..models.stable_diffusion import load_denoiser
from ..run.arithmetic import computes_bf16
from ..run.callbacks import Clock, Metrics
from ..run.checked import ProblemsError
from ..run.checkpointing import Checkpoints
from ..run.fit import Outcome
from ..run.folder import CONFIG_FILE, locked_run, refuse_foreign_folder
from ..run.lightning_trainer import at_once, make_trainer, quiet_lightning, restoring
from ..run.loggers import Reports
from ..run.starts import add_start
from ..run.stop import Stop, say_stopped
from ..settings_file import load_yaml
from ..step.checkpoints import (
    SOFTREPA_FILE,
    SOFTREPA_KEY,
    AtomicCheckpointIO,
    checkpoint_path,
    checkpoints_of,
)
from ..step.randomness import generator_for
from .checks import SoftChecked, check, identity_of
from .file import SoftTokensNotes, save_soft_tokens
from .held_out import Best, ended_early, evaluation
from .settings import refuse_changes
from .step import Pairs, SoftModule, text_of
from .tokens import BINS, SoftTokens, first_time_table, first_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from rich.console import Console

    from ..models.denoiser_facts import DenoiserFacts
    from ..models.stable_diffusion import Denoiser
    from .checks import TextColumns
    from .settings import SoftConfig

TOKENS_FILE = "tokens.safetensors"
BEST_FILE = "tokens-best.safetensors"


def fit(config: SoftConfig, run: Path, *, console: Console, command: Sequence[str] = ()) -> Outcome:
    """Train soft tokens, from the newest checkpoint in the run's folder if there is one.

    Args:
        config: settings of the run.
        run: its folder, made if it is not there.
        console: where to print.
        command: the command line, for the record.

    Returns:
        How it ended. A run that its held-out loss ended is finished.

    Raises:
        ProblemsError: the checks found problems; all of them are listed.
        RepaError: the folder holds another run or something else, its checkpoint is of another cache or
            denoiser, the weights cannot be had, or training diverged.
    """
    refuse_folder(run)
    stop = Stop(config.as_run())

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True, markup=False)

    checked = check(config)
    for warning in checked.warnings:
        say(f"note: {warning}")
    if checked.problems:
        raise ProblemsError(checked.problems)
    assert checked.config is not None, "the checks have passed"
    filled = checked.config
    with locked_run(run, leader=True):
        newest = max(checkpoints_of(run).items(), default=None)
        saved = {} if newest is None else read_checkpoint(newest[1])
        file = run / SOFTREPA_FILE
        if saved or file.exists():
            refuse_changes(saved.get("settings") or load_yaml(file), filled)
        resumed = 0 if newest is None else newest[0]
        early = ended_early(filled, saved.get("best", {}))
        if newest is not None and (resumed >= filled.max_steps or early):
            why = f"its held-out loss fell no more for {filled.patience} evaluations" if early else ""
            done = counted(resumed, "step", ",")
            more = "--set patience" if early else "--max-steps"
            say(f"{run} is finished: {why or done}; for more, set a larger {more}")
            return Outcome(step=resumed, finished=True, resumed_from=resumed, trained=False)
        assert checked.facts is not None, "the checks have passed"
        assert checked.text is not None, "the checks have passed"
        dtype = dtype_of(filled.dtype, checked.device)
        denoiser = prepared_denoiser(checked.facts, dtype, checked.text, filled.blocks or ())
        identity = {**identity_of(checked, denoiser.weights_sha256), "settings": filled.to_dict()}
        if newest is not None:
            refuse_other(newest[1], saved, identity)
        with os_errors("write", file):
            write_file(file, filled.to_yaml().encode(), run)
        return _train(filled, run, checked, denoiser, identity, stop, console, command, resumed, say)


def _train(
    config: SoftConfig,
    run: Path,
    checked: SoftChecked,
    denoiser: Denoiser,
    identity: dict[str, Any],
    stop: Stop,
    console: Console,
    command: Sequence[str],
    resumed: int,
    say: Callable[[str], None],
) -> Outcome:
    reader, rows, held = checked.reader, checked.train_rows, checked.held_out_rows
    assert isinstance(reader, CacheReader), "the checks have passed"
    assert rows is not None, "the checks have passed"
    assert held is not None, "the checks have passed"
    assert checked.scale is not None, "the checks have passed"
    assert checked.text is not None, "the checks have passed"
    soft = first_soft(config, checked, reader)
    pairs = Pairs(denoiser, soft, checked.scale, checked.text, reader.manifest.resolution)
    module, as_run, clock = SoftModule(config, pairs, identity), config.as_run(), Clock()

    def save(trained: SoftModule, step: int, name: str = BEST_FILE) -> None:
        notes = notes_of(config, checked, denoiser, step)
        save_soft_tokens(run / name, trained.soft.state_dict(), notes)

    metrics = Metrics(
        as_run,
        run,
        console,
        clock,
        [(config.eval_every, evaluation(config, reader, held))] if len(held) else [],
        Reports(as_run, say),
        lambda: sum(reader.bytes_read.values()),
    )
    checkpoints = Checkpoints(as_run, run, clock, metrics.sync)
    trainer = make_trainer(as_run, run=run, callbacks=[metrics, Best(config, save), stop, checkpoints])
    add_start(run, _described(config, denoiser, trainer.strategy.root_device, command, resumed))
    if resumed:
        say(f"resuming {run} at step {resumed:,}")
    checkpoint = checkpoint_path(run, resumed) if resumed else None
    data = CacheData(as_run, reader, rows, module.columns_at)
    with quiet_lightning(), at_once(trainer), restoring(checkpoint, stop):
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    step = trainer.global_step
    save(module, step, TOKENS_FILE)
    early = ended_early(config, module.best)
    if early:
        say(
            f"ended at step {step:,}: the held-out loss fell no more for {config.patience} evaluations; the "
            f"tokens of step {int(module.best['step']):,} are {run / BEST_FILE}"
        )
    elif step < config.max_steps:
        say_stopped(step, config.max_steps, stop.reason, say)
    done = early or step >= config.max_steps
    return Outcome(step=step, finished=done, resumed_from=resumed, trained=True)


def refuse_folder(run: Path) -> None:
    """Look at the folder of a run that may not be there yet.

    Raises:
        RepaError: it holds something else, a run of another command among it.
    """
    if (run / CONFIG_FILE).exists():
        raise RepaError(f"{run} is a run of `repa train`", "choose another folder with --run", field="--run")
    if not (run / SOFTREPA_FILE).exists():
        refuse_foreign_folder(run)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return what a checkpoint says of its run.

    Raises:
        RepaError: it cannot be read, or is none of SoftREPA.
    """
    checkpoint = AtomicCheckpointIO().load_checkpoint(path)
    said = checkpoint.get(SOFTREPA_KEY) if isinstance(checkpoint, dict) else None
    if said is None:
        raise RepaError(
            f"{path} is no checkpoint of SoftREPA", "choose another folder with --run", field="--run"
        )
    remedy = "delete it to go on from the one before"
    return parse(dict[str, dict[str, Any]], said, where=str(path), remedy=remedy, error=RepaError)


def refuse_other(path: Path, saved: dict[str, Any], identity: dict[str, Any]) -> None:
    """Hold a checkpoint against the run that would go on from it.

    Raises:
        CacheError: it is of another cache, denoiser or scale of latents.
    """
    for what in ("cache", "model", "latent"):
        before, now = saved.get(what, {}), identity[what]
        changed = [each for each in dict.fromkeys((*before, *now)) if before.get(each) != now.get(each)]
        if changed:
            raise CacheError(
                f"the {what} is not the one {path} was trained on ({', '.join(changed)} changed)",
                "restore it, or start another run with --run",
                field="--model" if what == "model" else "--cache",
            )


def prepared_denoiser(
    facts: DenoiserFacts, dtype: torch.dtype, text: TextColumns, blocks: Sequence[str]
) -> Denoiser:
    """Load a denoiser, and have it take soft tokens and the text of a cache.

    Args:
        facts: what it is.
        dtype: of its weights.
        text: columns of the cache.
        blocks: parts of a U-Net that see the tokens.

    Raises:
        RepaError: its weights cannot be had.
    """
    denoiser = load_denoiser(facts, dtype)
    if text.embedded:
        denoiser.take_embedded()
    take_soft_tokens(denoiser.model, facts.kind, blocks=blocks, text_length=text.length)
    return denoiser


def dtype_of(name: str, device: torch.device | None) -> torch.dtype:
    """Return the dtype of a denoiser.

    Args:
        name: ``auto``, ``float32`` or ``bfloat16``.
        device: where it will compute.
    """
    if name == "auto":
        able = device is not None and device.type == "cuda" and computes_bf16()
        return torch.bfloat16 if able else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def first_soft(config: SoftConfig, checked: SoftChecked, reader: CacheReader) -> SoftTokens:
    """Return the tokens before the first step, a function of the seed, the cache and the settings.

    Args:
        config: filled in.
        checked: a run that passed the checks.
        reader: of the text, for tokens that begin as the empty caption's first state.
    """
    assert checked.shape is not None, "the checks have passed"
    assert checked.text is not None, "the checks have passed"
    assert config.start is not None, "the checks have filled it in"
    bos = None
    if config.start != "normal":
        states, _ = null_text(reader, checked.text)
        bos = states[0, 0]
    generator = generator_for(config.seed, "soft tokens")
    tokens = first_tokens(checked.shape, config.start, generator, bos=bos)
    table = first_time_table(checked.shape, config.time_start, generator) if config.time_table else None
    return SoftTokens(tokens, table, interpolate=config.interpolate)


def null_text(reader: CacheReader, text: TextColumns) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the states ``[1, S, E]`` and the pooled text ``[1, P]`` of the empty caption."""
    assert reader.texts is not None, "columns of captions are read"
    specs = reader.texts.manifest.columns
    out = {name: np.empty((1, *specs[name].shape), specs[name].numpy_dtype) for name in text.names}
    reader.texts.read_rows(np.array([EMPTY]), text.names, out)
    return text_of({name: torch.from_numpy(each) for name, each in out.items()}, text)


def notes_of(config: SoftConfig, checked: SoftChecked, denoiser: Denoiser, step: int) -> SoftTokensNotes:
    """Return what the file of the tokens says of them."""
    assert checked.text is not None, "the checks have passed"
    facts = denoiser.facts
    return SoftTokensNotes(
        kind=facts.kind,  # type: ignore[arg-type]
        model=facts.name,
        model_sha256=denoiser.weights_sha256,
        blocks=list(config.blocks or ()),
        text_length=checked.text.length,
        condition=checked.text.states,
        bins=BINS if config.time_table else 0,
        interpolate=config.interpolate,
        preset=facts.kind,
        step=step,
        settings=config.to_dict(),
    )


def _described(
    config: SoftConfig, denoiser: Denoiser, device: torch.device, command: Sequence[str], resumed: int
) -> dict[str, Any]:
    """Return what is recorded of a start, as plain values."""
    return {
        "command": list(command),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "first_step": resumed,
        "cache": config.cache,
        "seed": config.seed,
        "model": {"name": denoiser.facts.name, "weights_sha256": denoiser.weights_sha256},
        "dtype": str(denoiser.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "libraries": {"torch": str(torch.__version__)},
    }
