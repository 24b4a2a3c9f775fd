"""Training with weights that are cut over the devices, ``trainer.strategy=fsdp``.

Its checkpoints are those of any other run: one file with all of every weight and moment, under the same names
and numbers. Lightning's own strategies for this write folders, or number the moments by all parameters of the
module where the optimiser of one device numbers those that train.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from ..methods.base import Problem
from ..step.sharding import cut_as, whole

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.optim import Optimizer

    from ..config import TrainConfig
    from ..methods.base import Method
    from ..step.module import TrainingModule

NAME = "fsdp"
_OTHERS = ("fsdp_", "deepspeed", "model_parallel")


class ShardedStrategy(DDPStrategy):
    """The processes of Lightning's DDP, around weights, gradients and moments that are cut.

    A checkpoint is loaded before they are.
    """

    def model_to_device(self) -> None:
        """Cut the weights, which brings each device its part, and move what is not cut."""
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        cast("TrainingModule", self.lightning_module).shard(mesh)
        super().model_to_device()

    def configure_ddp(self) -> None:
        """Wrap nothing."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the state dict of the module with whole tensors on rank 0, an empty one on the others."""
        assert self.lightning_module is not None
        return self._on_rank_0(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state of an optimiser with whole moments on rank 0, with none on the others."""
        state: dict[str, Any] = super().optimizer_state(optimizer)
        moments = {number: self._on_rank_0(values) for number, values in state["state"].items()}
        return {**state, "state": moments}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give each rank its part of the moments of a checkpoint."""
        states = []
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [each for group in optimizer.param_groups for each in group["params"]]
            moments = {
                number: {key: _as_its_parameter(value, parameters[number]) for key, value in values.items()}
                for number, values in state["state"].items()
            }
            states.append({**state, "state": moments})
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})

    def teardown(self) -> None:
        """Let go what an error in the middle of a step has left gathered, which cannot be moved."""
        module: Any = self.lightning_module
        if isinstance(module, FSDPModule):
            module.reset_iter_state()
        super().teardown()

    def _on_rank_0(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Gather one value after the other, so that one at a time is whole on the other ranks."""
        found = {}
        for name, value in values.items():
            gathered = whole(value) if isinstance(value, Tensor) else value
            if self.is_global_zero:
                found[name] = gathered.cpu() if isinstance(gathered, Tensor) else gathered
        return found


def sharding_problems(config: TrainConfig, method: Method) -> list[Problem]:
    """Check whether a run's weights can be cut, if they are to be.

    Args:
        config: of the run.
        method: of the run.
    """
    strategy = config.trainer.get("strategy")
    if isinstance(strategy, str) and strategy.startswith(_OTHERS):
        return [
            Problem(
                what=f"trainer.strategy={strategy} writes checkpoints that nothing here reads",
                remedy=f"set trainer.strategy={NAME}",
                field="trainer.strategy",
            )
        ]
    if strategy != NAME:
        return []
    found = []
    if config.gradient_angle_every:
        found.append(
            Problem(
                what=f"gradient_angle_every is {config.gradient_angle_every}, and with "
                f"trainer.strategy={NAME} no device has the whole gradient of a block",
                remedy="set gradient_angle_every=0, or trainer.strategy=ddp",
                field="gradient_angle_every",
            )
        )
    if config.compile == "whole":
        found.append(
            Problem(
                what=f"compile=whole makes one graph of the network, and with trainer.strategy={NAME} each "
                "block is gathered by itself",
                remedy="set compile=blocks",
                field="compile",
            )
        )
    if config.precision == "16-mixed":
        found.append(
            Problem(
                what=f"precision 16-mixed scales losses by gradients that are whole, and with "
                f"trainer.strategy={NAME} they are cut",
                remedy="set precision=bf16-mixed or 32-true, or trainer.strategy=ddp",
                field="precision",
            )
        )
    scalars = [name for name, each in method.named_parameters() if not each.ndim]
    if scalars:
        found.append(
            Problem(
                what=f"method {config.method_name} has the parameter {scalars[0]}, a single number, which "
                f"trainer.strategy={NAME} cannot cut",
                remedy="set trainer.strategy=ddp, or have the method hold a vector of one",
                field="trainer.strategy",
            )
        )
    return found


def _as_its_parameter(value: Any, parameter: Tensor) -> Any:
    """Return a moment cut as its parameter is, and the count of steps, which has no shape, as it is."""
    same = isinstance(value, Tensor) and value.shape == parameter.shape
    return cut_as(value, parameter) if same else value
