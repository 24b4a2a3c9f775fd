"""A run from its folder and checks to the last step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...data.errors import RepaError
from ...data.reading.reader import CacheReader
from ...data.units import counted
from ..added_callbacks import make_callbacks
from ..input.statistics import MOST_TOKEN_ROWS
from ..step.checkpoints import checkpoint_path, checkpoints_of
from .arithmetic import float32_products, resolved
from .assembly import assemble
from .callbacks import Clock, Metrics
from .checked import RANDOM_WEIGHTS, Checked, ProblemsError
from .checkpointing import Checkpoints
from .checks import check
from .divergence import refuse_lost
from .first_steps import TakenSteps, read_first_steps
from .folder import changed_settings, locked_run, refuse_foreign_folder, settle_config
from .going_back import checkpoint_to_go_on_from, set_newer_aside
from .gradient_angle import GradientAngle
from .identity import check_resumable, identity_of
from .initial import Initial, read_initial
from .launch import is_leader
from .lightning_trainer import (
    at_once,
    begin_at,
    make_trainer,
    other_ranks,
    quiet_lightning,
    restoring,
)
from .loggers import Reports, logger_ids, make_loggers
from .measured_beside import evaluations_of
from .previews import LatentDecoder, Previews
from .starts import add_start, describe_start, method_changed, read_starts
from .stop import Stop, say_stopped
from .utilisation import utilisation_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from lightning.pytorch.callbacks import Callback
    from rich.console import Console

    from ..config import TrainConfig
    from ..input.datamodule import CacheData
    from ..input.online import LiveTargets
    from ..resuming import Change
    from ..step.module import TrainingModule
    from .callbacks import Evaluate
    from .evaluations import Evaluator


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended.

    Attributes:
        step: steps that are done.
        finished: whether all were; False for a run that was stopped and saved.
        resumed_from: step of the checkpoint that it went on from, 0 without.
        trained: whether any step was made by this call.
        predicts: whether the prediction has been trained, which a warm-up leaves out.
        leader: whether this process is rank 0, which speaks for all.
    """

    step: int
    finished: bool
    resumed_from: int
    trained: bool
    predicts: bool = True
    leader: bool = True


def fit(
    config: TrainConfig,
    run: Path,
    *,
    console: Console,
    live: LiveTargets | None = None,
    decoder: LatentDecoder | None = None,
    evaluator: Evaluator | None = None,
    command: Sequence[str] = (),
    from_step: int | None = None,
) -> Outcome:
    """Train, from the newest checkpoint in the run's folder if there is one.

    Args:
        config: settings of the run.
        run: its folder, made if it is not there.
        console: where to print.
        live: computes the targets of a run with ``targets=online``.
        decoder: latents to images for previews and evaluations; None makes none.
        evaluator: networks and reference of the evaluations; None makes none.
        command: the command line, for the record.
        from_step: go back to the checkpoint of this step, and on from there; once, not at every start.

    Returns:
        How it ended.

    Raises:
        ProblemsError: the checks found problems; all of them are listed.
        RepaError: the folder holds another run or something else, its checkpoint is of another cache or live
            teacher, that teacher cannot be had, training diverged, or another rank has ended.
    """
    refuse_foreign_folder(run)
    # its time runs from here: the teachers' loading is part of what a scheduler counts
    stop = Stop(config)
    config = resolved(config)
    leader = is_leader()
    say = _printer(console, leader=leader)
    checked = _checked(config, live, say)
    identity, new = identity_of(checked, config), not checkpoints_of(run)
    # before the folder is made: it would be bound to what cannot be had
    initial = read_initial(config.init, checked) if config.init and new else None
    taken = read_first_steps(checked, config, identity) if new else None
    with locked_run(run, leader=leader):
        newest, going_back = checkpoint_to_go_on_from(run, from_step, say)
        changed = _settled(config, run, None if newest is None else newest[1], identity, leader=leader)
        if newest is not None and newest[0] >= config.max_steps:
            done = counted(newest[0], "step", ",")
            say(f"{run} is finished: {done}; for more, set a larger --max-steps")
            return Outcome(
                step=newest[0], finished=True, resumed_from=newest[0], trained=False, leader=leader
            )
        resumed = 0 if newest is None else newest[0]
        for change in changed:
            say(f"{change} from step {resumed:,} on")
        return _train(
            config,
            run,
            checked,
            identity,
            stop,
            console=console,
            decoder=decoder,
            evaluator=evaluator,
            command=command,
            resumed=resumed,
            changed=changed,
            from_step=from_step if going_back else None,
            initial=initial,
            taken=taken,
        )


def _checked(config: TrainConfig, live: LiveTargets | None, say: Callable[[str], None]) -> Checked:
    """Check a run, say what is of note, and load its live teachers.

    Raises:
        ProblemsError: the checks found problems; all of them are listed.
        RepaError: a live teacher cannot be had.
    """
    checked = check(config, live)
    for warning in checked.warnings:
        say(f"note: {warning}")
    if checked.problems:
        raise ProblemsError(checked.problems)
    load_live(checked, say)
    return checked


def _settled(
    config: TrainConfig,
    run: Path,
    newest: Path | None,
    identity: Mapping[str, Any],
    *,
    leader: bool,
) -> list[Change]:
    """Refuse a checkpoint of another run or a lost one, write the settings, and return what changed of them.

    Args:
        config: settings of the run.
        run: its folder.
        newest: checkpoint that the run goes on from, None where it begins.
        identity: what the checkpoint has to share.
        leader: whether this process speaks for all; others find no changes.
    """
    if newest is not None:
        if leader:
            # before what follows from it: with other targets the cache is another too
            changed_settings(config, run, newest)
        check_resumable(newest, identity)
    if not leader:
        return []
    if newest is not None:
        refuse_lost(newest, run)
    return settle_config(config, run, newest)


def _train(
    config: TrainConfig,
    run: Path,
    checked: Checked,
    identity: Mapping[str, Any],
    stop: Stop,
    *,
    console: Console,
    decoder: LatentDecoder | None,
    evaluator: Evaluator | None,
    command: Sequence[str],
    resumed: int,
    changed: Sequence[Change],
    from_step: int | None,
    initial: Initial | None,
    taken: TakenSteps | None,
) -> Outcome:
    leader = is_leader()
    say = _printer(console, leader=leader)
    if checked.tokens is not None and checked.train_rows is not None and not resumed:
        images = min(len(checked.train_rows), MOST_TOKEN_ROWS)
        say(f"measures {config.latents} of {counted(images, 'image', ',')}")
    module, data = assemble(config, checked, identity, restored=bool(resumed))
    first = _load_first_weights(module, data, initial, taken, say) or resumed
    reports = Reports(config, say)
    evaluations = evaluations_of(config, run, checked, evaluator, decoder, say)
    callbacks = _callbacks(
        config, run, checked, module, evaluations, reports, stop, console=console, decoder=decoder, say=say
    )
    ids = logger_ids(config, read_starts(run), anew=from_step is not None)
    loggers = make_loggers(config, run, ids, resumed=resumed, leader=leader)
    trainer = make_trainer(config, run=run, callbacks=callbacks, loggers=loggers)
    if taken is not None:
        begin_at(trainer, taken.step)
    if leader:
        start = describe_start(config, checked, trainer, command=command, resumed=first, changed=changed)
        start["loggers"] = ids
        start["init"] = None if initial is None else initial.record
        start["first_steps"] = None if taken is None else taken.record
        _record_start(config, run, start, from_step, say)
    if resumed:
        say(f"resuming {run} at step {resumed:,}")
    checkpoint = checkpoint_path(run, resumed) if resumed else None
    with (
        float32_products(config),
        reports.begun(loggers if leader else ()),
        quiet_lightning(),
        other_ranks(),
        at_once(trainer),
        restoring(checkpoint, stop),
    ):
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    step = trainer.global_step
    if step < config.max_steps and leader:
        _say_stopped(config, run, step, stop.reason, say)
    return Outcome(
        step=step,
        finished=step >= config.max_steps,
        resumed_from=resumed,
        trained=True,
        predicts=module.method.predicts_after(step),
        leader=leader,
    )


def _load_first_weights(
    module: TrainingModule,
    data: CacheData,
    initial: Initial | None,
    taken: TakenSteps | None,
    say: Callable[[str], None],
) -> int:
    """Load weights and first steps that a new run takes from others, and return how many steps these are."""
    if initial is not None:
        notes = initial.load_into(module)
        for line in (f"begins with the weights of {initial.record['file']}", *notes):
            say(line)
    if taken is None:
        return 0
    taken.load_into(module)
    data.begin_at(taken.step)
    say(f"begins at step {taken.step:,} with the weights of {taken.record['file']}")
    return taken.step


def _callbacks(
    config: TrainConfig,
    run: Path,
    checked: Checked,
    module: TrainingModule,
    evaluations: Sequence[tuple[int, Evaluate]],
    reports: Reports,
    stop: Stop,
    *,
    console: Console,
    decoder: LatentDecoder | None,
    say: Callable[[str], None],
) -> list[Callback]:
    """Make what is called at every step, in the order in which it is called."""
    clock = Clock()
    if decoder is None and config.preview_every:
        say("no previews: nothing says which autoencoder decodes the latents")
    utilisation = None
    if checked.device is not None and checked.world_size is not None:
        utilisation = utilisation_of(config, module, checked.device, checked.world_size)
    metrics = Metrics(config, run, console, clock, evaluations, reports, _bytes_read(checked), utilisation)
    return [
        GradientAngle(config),
        metrics,
        Previews(config, run, decoder, say, clock, reports),
        *make_callbacks(config.trainer.get("callbacks", ())),
        stop,
        Checkpoints(config, run, clock, metrics.sync),
    ]


def _record_start(
    config: TrainConfig,
    run: Path,
    start: dict[str, Any],
    from_step: int | None,
    say: Callable[[str], None],
) -> None:
    """Add a start to the run's, and set aside what is newer than the step that it goes back to."""
    if from_step is not None:
        start["from_step"], start["set_aside"] = from_step, set_newer_aside(run, from_step)
    if method_changed(run, start):
        say(f"[yellow]note[/yellow]: the file of method {config.method_name} changed since the last start")
    add_start(run, start)


def _say_stopped(
    config: TrainConfig, run: Path, step: int, reason: str | None, say: Callable[[str], None]
) -> None:
    """Say where a run stopped and that it goes on, and have its job of SLURM do so.

    Raises:
        RepaError: something that is no stop of ours ended it, and nothing was saved.
    """
    if not checkpoint_path(run, step).exists():
        raise RepaError(
            f"the run ended at step {step:,} of {config.max_steps:,} and nothing was saved",
            "leave out the setting trainer.… that ended it; trainer.max_time saves",
            field="trainer",
        )
    say_stopped(step, config.max_steps, reason, say)


def load_live(checked: Checked, say: Callable[[str], None]) -> None:
    """Load the live teachers of an online run, to the training device.

    Args:
        checked: a run that passed the checks; takes what the teachers are.
        say: prints a line.

    Raises:
        RepaError: weights that are not there, or not those of the cache.
    """
    if checked.live is None or checked.device is None:
        return
    checked.live_sources = checked.live.load(checked.device)
    for source, provenance in checked.live_sources.items():
        if provenance.random_weights:
            say(f"note: the live teacher {source} has random weights: {RANDOM_WEIGHTS}")


def _bytes_read(checked: Checked) -> Callable[[], int] | None:
    """Return what counts the bytes read from the cache. Nobody does for tars."""
    reader = checked.reader
    return (lambda: sum(reader.bytes_read.values())) if isinstance(reader, CacheReader) else None


def _printer(console: Console, *, leader: bool) -> Callable[[str], None]:
    def say(line: str) -> None:
        if leader:
            console.print(line, highlight=False, soft_wrap=True, markup=False)

    return say
