"""The folder of a run, with what may lie in it before, who may write to it, and the settings it is bound to.

Nothing is put into a folder that holds something else: a wrong ``--run`` must not scatter checkpoints over an
image set or a cache. What a scheduler or a shell leaves there is no obstacle: the usual job script has its
log written into the very folder that the run is to make (``sbatch -o runs/a/slurm-%j.out``).
"""

from __future__ import annotations

import fcntl
import os
import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.errors import RepaError
from ...data.storage.files import make_folder, open_lock, os_errors, write_file
from ..config import build
from ..methods.outside import FLAG as METHOD_FLAG
from ..resuming import changes
from ..settings_file import load_yaml
from ..step.checkpoints import FOLDER as CHECKPOINTS
from ..step.checkpoints import SOFTREPA_FILE, checkpoints_of, load_checkpoint
from ..step.module import CHECKPOINT_KEY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..config import TrainConfig
    from ..resuming import Change

CONFIG_FILE = "config.yaml"

# logs of SLURM, PBS, SGE (name.o123), LSF, nohup and tee, job scripts, and submitit's pickles
_OF_A_JOB = re.compile(
    r".*\.(?:out|err|log|sh|sbatch|slurm|pbs|sge|lsf|pid)|.*\.[eo]\d+|log\.txt|\d+_(?:\d+_)?\w+\.pkl"
)


def run_of(checkpoint: Path) -> Path | None:
    """Return the run that a checkpoint lies in, if it lies in one."""
    run = checkpoint.parent.parent
    return run if checkpoint.parent.name == CHECKPOINTS and (run / CONFIG_FILE).exists() else None


def refuse_foreign_folder(run: Path) -> None:
    """Look at the folder of a run that may not be there yet, before anything is put into it.

    It must be a run, or hold nothing but logs and scripts of a job, hidden files and empty folders.

    Raises:
        RepaError: it holds something else, or the operating system refuses.
    """
    with os_errors("read", run):
        if (run / SOFTREPA_FILE).exists():
            raise RepaError(
                f"{run} is a run of SoftREPA",
                f"go on with it by `repa softrepa train --run {run}`, or choose another folder with --run",
                field="--run",
            )
        if not run.is_dir() or checkpoints_of(run):
            return
        if (run / CONFIG_FILE).exists():
            _check_config(run)
            return
        foreign = next(_foreign_files(run), None)
    # another rank may have begun the run meanwhile, with its configuration as the first file
    if foreign is not None and not (run / CONFIG_FILE).exists():
        raise RepaError(
            f"{run} holds {foreign} and is no run", "choose a new or empty folder with --run", field="--run"
        )


def _check_config(run: Path) -> None:
    try:
        _build_without_cache(run)
    except RepaError as error:
        if error.field == METHOD_FLAG:
            raise  # the run can be read once its method can be had
        raise RepaError(
            f"{run / CONFIG_FILE} is not of a run that this repa can read ({error.what})",
            "choose another folder with --run",
            field="--run",
        ) from error


def _build_without_cache(run: Path) -> TrainConfig:
    """Return a run's settings without a look at the cache, as a resumed run may have another."""
    return build(load_yaml(run / CONFIG_FILE), {"cache": ""})


def _foreign_files(run: Path) -> Iterator[Path]:
    """List files that no job leaves in the folder of its run, by their paths in it."""
    for folder, folders, files in os.walk(run):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and not _OF_A_JOB.fullmatch(name):
                yield Path(folder, name).relative_to(run)


@contextmanager
def locked_run(run: Path, *, leader: bool) -> Iterator[None]:
    """Make the folder and keep other processes out of it. Other ranks of this run follow their leader.

    Raises:
        RepaError: another process is training there, or the operating system refuses.
    """
    if not leader:
        yield
        return
    with os_errors("write", run):
        make_folder(run, run)
        descriptor = open_lock(run / ".lock")
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RepaError(
                f"another process is training in {run}", "wait for it, or choose another --run"
            ) from None
        yield
    finally:
        os.close(descriptor)


def settle_config(config: TrainConfig, run: Path, newest: Path | None = None) -> list[Change]:
    """Write the configuration, if it is the run's but for what may change.

    Arguments, result and errors are those of `changed_settings`.
    """
    changed = changed_settings(config, run, newest)
    file = run / CONFIG_FILE
    with os_errors("write", file):
        write_file(file, config.to_yaml().encode(), run)
    return changed


def changed_settings(config: TrainConfig, run: Path, newest: Path | None = None) -> list[Change]:
    """Compare the configuration with the run's, and refuse what may not change.

    Args:
        config: settings to go on with.
        run: its folder.
        newest: the checkpoint to go on from; it says what the run was trained with, whoever has edited the
            configuration since.

    Returns:
        What goes on at another value from here on, for the record.

    Raises:
        RepaError: the folder holds another run, or checkpoints without a configuration.
    """
    if (run / CONFIG_FILE).exists():
        before = _build_without_cache(run).to_dict()
        return changes(before if newest is None else _trained_with(newest, before), config)
    if checkpoints_of(run):
        raise RepaError(
            f"{run} has checkpoints but no {CONFIG_FILE}", "start another run with --run", field="--run"
        )
    return []


def _trained_with(checkpoint: Path, configuration: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that a checkpoint was trained with.

    One of before settings were kept in it has those of the optimiser alone; the rest is as the configuration
    says.
    """
    saved = load_checkpoint(checkpoint)
    if "settings" in saved[CHECKPOINT_KEY]:
        return dict(saved[CHECKPOINT_KEY]["settings"])
    group = saved["optimizer_states"][0]["param_groups"][0]
    optimiser = {"lr": group["lr"], "betas": list(group["betas"]), "weight_decay": group["weight_decay"]}
    return {**configuration, **optimiser}
