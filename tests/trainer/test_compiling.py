"""What is compiled, how many graphs it takes, and that nothing but rounding changes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from every_method import shrink, small_config, write_cache
from repa.trainer import compiling
from repa.trainer.compiling import (
    chosen,
    compile_backbone,
    compile_children,
    compiled_losses,
    fused,
    missing,
    uncompiled,
)
from repa.trainer.methods import METHODS
from repa.trainer.methods.base import Method, Step
from repa.trainer.models import registry
from repa.trainer.models.base import Backbone
from repa.trainer.models.capture import Capture, Captured
from repa.trainer.models.mmdit import MMDIT_SIZES, MMDiTSize
from repa.trainer.models.sit import SIT_SIZES, SiTSize
from repa.trainer.models.sit_down import SIT_DOWN_SIZES, SiTDownSize
from repa.trainer.models.text_conditioning import TextConditioner
from repa.trainer.models.token_groups import TokenGroups
from repa.trainer.run.assembly import assemble
from repa.trainer.run.checks import check
from repa.trainer.run.identity import identity_of
from repa.trainer.run.lightning_trainer import make_trainer
from torch import Tensor
from torch._dynamo.utils import counters


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for every graph that is captured from here on; each runs as it was captured."""
    found: list[int] = []
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(compiling, "BACKEND", lambda graph, _: (found.append(1), graph.forward)[1])
    return found


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIT_SIZES, "T", SiTSize(depth=3, width=24, heads=2))
    monkeypatch.setitem(SIT_DOWN_SIZES, "T", SiTDownSize(outer=2, middle=2, width=24, heads=2, mlp_width=32))
    monkeypatch.setitem(MMDIT_SIZES, "6", MMDiTSize(depth=3, width=24, heads=2))


def network_of(model: str, **settings: Any) -> Backbone:
    config = registry.config_of(model, input_size=8, in_channels=4, num_classes=3, **settings)
    torch.manual_seed(0)
    conditioner = TextConditioner("text/tokens", (5, 6), 24) if config.takes_sequences else None
    network = registry.build(config, conditioner).double()
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return network


def inputs(network: Backbone, images: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(images, 4, 8, 8, generator=draw, dtype=torch.float64)
    t = torch.rand(images, generator=draw, dtype=torch.float64)
    if network.config.takes_sequences:
        return x, t, torch.randn(images, 5, 6, generator=draw, dtype=torch.float64)
    return x, t, torch.arange(images)


def results(network: Backbone, capture: Capture, given: Any, **more: Any) -> list[Tensor]:
    """Return what a forward pass gives and the gradients of all of it."""
    captured = network(*given, capture, **more)
    values = [*captured.hidden.values(), *captured.queries.values(), *captured.keys.values()]
    values += [] if captured.prediction is None else [captured.prediction]
    used = [each for each in network.parameters() if each.requires_grad]
    total = torch.stack([each.square().mean() for each in values]).sum()
    return [*values, *torch.autograd.grad(total, used, materialize_grads=True, allow_unused=True)]


ROTARY = {"qk_norm": True, "rope": True, "rms_norm": True, "swiglu": True}
# kinds of blocks: of SiT↓ outer, inner and joining ones; of MM-DiT the last is another
FAMILIES = [
    ("SiT-T/2", {}, 1),
    ("SiT-T/2", ROTARY, 1),
    ("DiT-T/2", {}, 1),
    ("LightningDiT-T/2", {}, 1),
    ("SiT-down-T/2", {"qk_norm": True}, 3),
    ("MMDiT-6/2", {"qk_norm": True}, 2),
]


@pytest.mark.parametrize(("model", "settings", "kinds"), FAMILIES)
def test_one_graph_for_all_blocks_of_a_kind(
    model: str, settings: dict[str, Any], kinds: int, graphs: list[int]
) -> None:
    """One more where a block is looked into, none for another hidden state, an early stop or the average."""
    network, plain = network_of(model, **settings), network_of(model, **settings)
    compile_backbone(network, network.blocks, "blocks")
    given = inputs(network)
    for capture, expected in (
        (Capture(), kinds),
        (Capture(hidden=(2,)), kinds),
        (Capture(hidden=(1, 3), attention=(2,)), kinds + 1),
        (Capture(hidden=(2,), stop_after=2), kinds + 1),
    ):
        torch.testing.assert_close(
            results(network, capture, given), results(plain, capture, given), rtol=1e-12, atol=1e-12
        )
        assert len(graphs) == expected, capture
    with uncompiled(), torch.no_grad():
        network(*inputs(network, images=3))
    assert len(graphs) == kinds + 1
    assert not counters["graph_break"]
    assert network.state_dict().keys() == plain.state_dict().keys()


def test_threads_that_run_as_written_at_once_leave_the_compiler_on(graphs: list[int]) -> None:
    network = network_of("SiT-T/2")
    compile_backbone(network, network.blocks, "whole")
    given = inputs(network)
    first, second = uncompiled(), uncompiled()
    with torch.no_grad():
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        network(*given)
        assert not graphs
        second.__exit__(None, None, None)
        network(*given)
    assert len(graphs) == 1


# tests of the other families hold it for them
@pytest.mark.parametrize(("model", "settings"), [("DiT-T/2", {}), ("MMDiT-6/2", {"qk_norm": True})])
def test_the_whole_is_one_graph(model: str, settings: dict[str, Any], graphs: list[int]) -> None:
    network, plain = network_of(model, **settings), network_of(model, **settings)
    compile_backbone(network, network.blocks, "whole")
    capture, given = Capture(hidden=(2,), attention=(1,)), inputs(network)
    torch.testing.assert_close(
        results(network, capture, given), results(plain, capture, given), rtol=1e-12, atol=1e-12
    )
    assert len(graphs) == 1
    assert not counters["graph_break"]


def test_groups_of_tokens_take_one_graph_more(graphs: list[int]) -> None:
    network, plain = network_of("SiT-T/2"), network_of("SiT-T/2")
    compile_backbone(network, network.blocks, "blocks")
    x, t, y = inputs(network)
    groups = TokenGroups(of_token=torch.arange(32).reshape(2, 16) % 2, separate=True)
    times = torch.stack([t, t.flip(0)], dim=1)
    for given, more, expected in (((x, t, y), {}, 1), ((x, times, y), {"groups": groups}, 2)):
        for _ in range(2):
            torch.testing.assert_close(
                results(network, Capture(hidden=(2,)), given, **more),
                results(plain, Capture(hidden=(2,)), given, **more),
                rtol=1e-12,
                atol=1e-12,
            )
        assert len(graphs) == expected
    assert not counters["graph_break"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with everything that a method reads."""
    return write_cache(tmp_path_factory.mktemp("compiling") / "whole")


def in_double(value: Any) -> Any:
    """Return what a network gave, in float64 and as leaves that take a gradient."""
    if isinstance(value, dict):
        return {key: in_double(each) for key, each in value.items()}
    if isinstance(value, Tensor):
        return value.detach().double().requires_grad_()
    return value


def captured_in_double(captured: Captured) -> Captured:
    return Captured(**{key: in_double(each) for key, each in vars(captured).items()})


def losses_of(name: str, whole: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Method, Step]:
    """Return a method in float64 and what it sees in its first step, in float64 as far as it is computed."""
    shrink(monkeypatch)
    config = small_config(name, whole)
    checked = check(config)
    assert checked.problems == []
    module, data = assemble(config, checked, identity_of(checked, config))
    for parameter in (*module.backbone.parameters(), *module.ema.parameters()):
        torch.nn.init.normal_(parameter, std=0.2)
    data.trainer = make_trainer(config)
    steps: list[Step] = []
    monkeypatch.setattr(module.method, "losses", lambda step: (steps.append(step), {})[1])
    module.terms(next(data.train_dataloader()))
    monkeypatch.undo()
    data.teardown("fit")
    (step,) = steps
    teach = step.ema_forward
    return module.method.double(), replace(
        step,
        x0=step.x0.double(),
        student=captured_in_double(step.student),
        ema_forward=teach and (lambda *given: captured_in_double(teach(*given))),
    )


@pytest.mark.parametrize("name", sorted(METHODS))
def test_losses_of_every_method_are_the_same(
    name: str, whole: Path, graphs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, terms and gradients, without a break in a graph, and a second step makes no graph."""
    with pytest.MonkeyPatch.context() as patch:
        method, step = losses_of(name, whole, patch)
    student = step.student
    leaves = [student.prediction, *student.hidden.values(), *student.leading.values()]
    leaves += [*student.queries.values(), *student.keys.values(), *method.parameters()]
    used = [each for each in leaves if each is not None]

    def values() -> list[Tensor]:
        terms = method.losses(step)
        weighted = [each.value * each.weight for each in terms.values() if each.weight is not None]
        # where there are no terms, as of `none`, there is a gradient all the same
        total = torch.stack([*weighted, used[0].mean()]).sum()
        gradients = torch.autograd.grad(total, used, materialize_grads=True, allow_unused=True)
        return [*(each.value for each in terms.values()), *gradients]

    plain = values()
    assert all(each.dtype == torch.float64 for each in plain)
    assert not graphs
    compile_children(method)
    counts = []
    for _ in range(2):
        with compiled_losses(True):
            torch.testing.assert_close(values(), plain, rtol=1e-11, atol=1e-13)
        counts.append(len(graphs))
    assert counts[0] == counts[1]
    assert counts[0] > 0 or name == "none"
    assert not counters["graph_break"]


def test_functions_are_fused_where_it_is_wanted(graphs: list[int]) -> None:
    double = fused(lambda x: 2 * x)
    values = torch.arange(3.0)
    for wanted, expected in ((False, 0), (True, 1), (True, 1), (False, 1)):
        with compiled_losses(wanted):
            assert torch.equal(double(values), 2 * values)
        assert len(graphs) == expected


@pytest.mark.parametrize(
    ("setting", "device", "lacks", "expected"),
    [
        ("auto", "cuda", "", "blocks"),
        ("auto", "cuda", "the package triton", "off"),
        ("auto", "cpu", "", "off"),
        ("auto", "mps", "", "off"),
        ("whole", "cpu", "", "whole"),
        ("off", "cuda", "", "off"),
    ],
)
def test_what_auto_means(
    setting: Any, device: str, lacks: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "missing", lambda device: lacks)
    assert chosen(setting, device) == expected


def test_what_is_missing(monkeypatch: pytest.MonkeyPatch, whole: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert missing("cpu")
    assert missing("cuda")
    assert not missing("mps")
    shrink(monkeypatch)
    problems = check(small_config("none", whole, compile="blocks", trainer__accelerator="cpu")).problems
    assert [each.field for each in problems] == ["compile"]
    assert check(small_config("none", whole, trainer__accelerator="cpu")).problems == []
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(compiling, "find_spec", lambda name: object())
    assert not missing("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 1))
    assert missing("cuda")
