"""The processes of a run: those that a launcher has started, or refused before anything is trained."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, get_type_hints

import pytest
import typer
from repa.commands.preprocess import PreprocessFlags
from repa.commands.train import TrainFlags
from repa.data.errors import RepaError
from repa.data.launchers import launched_world, tasks_without_srun
from repa.trainer.run.launch import LaunchedEnvironment, launched_devices
from repa.trainer.run.lightning_trainer import make_trainer

if TYPE_CHECKING:
    from collections.abc import Callable

    from repa.trainer.config import TrainConfig

    Settings = Callable[..., TrainConfig]

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_JOB_ID": "123456_7",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


@pytest.mark.parametrize(
    ("variables", "settings", "expected"),
    [
        ({}, {}, {"devices": 1}),
        ({}, {"devices": 2, "num_nodes": 3}, {"devices": 2, "num_nodes": 3}),
        (TORCHRUN, {}, {"devices": 4, "num_nodes": 2}),
        (TORCHRUN, {"devices": 4, "num_nodes": 2}, {"devices": 4, "num_nodes": 2}),
        (TORCHRUN, {"devices": "auto"}, {"devices": 4, "num_nodes": 2}),
        (TORCHRUN, {"devices": -1}, {"devices": 4, "num_nodes": 2}),
        (TORCHRUN, {"devices": [0, 1, 2, 3]}, {"devices": 4, "num_nodes": 2}),
        (SRUN, {}, {"devices": 2, "num_nodes": 2}),
        # a batch script that calls the program itself: Lightning starts what trainer.devices says
        ({name: each for name, each in SRUN.items() if "STEP" not in name}, {"devices": 2}, {"devices": 2}),
    ],
)
def test_devices(variables: dict[str, str], settings: dict[str, Any], expected: dict[str, int]) -> None:
    assert launched_devices(settings, launched_world(variables)) == expected


@pytest.mark.parametrize(
    ("variables", "settings", "field"),
    [
        (TORCHRUN, {"devices": 2}, "trainer.devices"),
        (TORCHRUN, {"devices": [0]}, "trainer.devices"),
        (TORCHRUN, {"num_nodes": 1}, "trainer.num_nodes"),
        ({**TORCHRUN, "WORLD_SIZE": "7"}, {}, "trainer.devices"),
    ],
)
def test_devices_that_contradict_the_launcher(
    variables: dict[str, str], settings: dict[str, Any], field: str
) -> None:
    with pytest.raises(RepaError) as caught:
        launched_devices(settings, launched_world(variables))
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("variables", "address", "port"),
    [(TORCHRUN, "head", 29500), (SRUN, "gpu07", 15000 + 1234567 % 10000)],
)
def test_what_lightning_is_told(
    variables: dict[str, str], address: str, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    world = launched_world()
    assert world is not None
    told = LaunchedEnvironment(world)
    assert (told.main_address, told.main_port) == (address, port)
    assert (told.global_rank(), told.world_size()) == (world.rank, world.size)
    assert (told.node_rank(), told.local_rank()) == (1, 1)
    assert told.creates_processes_externally


def test_a_trainer_is_of_the_launchers_world(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    trainer = make_trainer(settings(trainer__accelerator="cpu"))
    assert (trainer.world_size, trainer.global_rank, trainer.num_nodes) == (4, 3, 2)
    with pytest.raises(RepaError) as caught:
        make_trainer(settings(trainer__accelerator="cpu", trainer__strategy="single_device"))
    assert caught.value.field == "trainer"


def test_a_trainer_in_a_batch_script_is_alone(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SRUN.items():
        if "STEP" not in name:
            monkeypatch.setenv(name, value)
    assert make_trainer(settings(trainer__accelerator="cpu")).world_size == 1
    assert tasks_without_srun() == 4


@pytest.mark.parametrize("flags", [TrainFlags, PreprocessFlags])
def test_torchrun_takes_every_flag_for_ours(flags: type) -> None:
    """Its parser looks for short forms of its own options behind the script too, up to Python 3.11."""
    from torch.distributed.run import get_args_parser

    parser = get_args_parser()
    hints = get_type_hints(flags, include_extras=True)
    names = []
    for name in inspect.signature(flags).parameters:
        option = next(each for each in hints[name].__metadata__ if isinstance(each, typer.models.OptionInfo))
        names += [each for each in option.param_decls or (f"--{name.replace('_', '-')}",) if each[:2] == "--"]
    assert "--run-folder" in names or flags is PreprocessFlags
    for name in names:
        if name != "--run":  # --run-folder is there for that
            parsed = parser.parse_args(["repa", "train", name, "value"])
            assert parsed.training_script_args == ["train", name, "value"], name
