"""SRA with two times an image: golden numbers, a loop over tokens, what gradient reaches, what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import small_sra as small
import torch
from repa.trainer.methods.sra import Sra, SraConfig
from repa.trainer.models.capture import Capture, Captured
from torch.testing import assert_close

if TYPE_CHECKING:
    from pathlib import Path

DUAL = {"preset": "dts_as", "separate": False}


@pytest.fixture(scope="module")
def reference(shared: Path) -> small.Reference:
    return small.load(shared)


def test_golden_with_separation(reference: small.Reference) -> None:
    """The released teacher has the labels that were not dropped."""
    numbers, method = reference.numbers, small.make(reference, "dts_as")
    step, velocity = small.dual_step_of(reference, method, teacher_labels="dts_y")
    assert_close(step.student.prediction, numbers["dts_as_out"], **small.TOLERANCE)
    assert_close(step.noise - step.x0, numbers["dts_as_target"], **small.TOLERANCE)
    assert_close(velocity, numbers["dts_as_gen"], **small.TOLERANCE)
    terms = method.losses(step)
    assert_close(terms["sra"].value, numbers["dts_as_cos_token"], **small.TOLERANCE)
    assert_close(1 - terms["sra_cosine_channel"].value, numbers["dts_as_cos_channel"], **small.TOLERANCE)
    paper = replace_config(method, distance="smooth-l1").losses(step)
    assert_close(paper["sra"].value, numbers["dts_as_sml1"], **small.TOLERANCE)
    total = velocity.mean() + 0.5 * terms["sra"].value
    assert_close(total, numbers["dts_as_total"], **small.TOLERANCE)
    gradients = torch.autograd.grad(
        total, [reference.student.blocks[0].attn.proj.weight, method.ap_head.linear1.weight]
    )
    for found, part in zip(gradients, ("proj", "head"), strict=True):
        assert_close(found, numbers[f"dts_as_grad_{part}"], **small.TOLERANCE)


def replace_config(method: Sra, **changes: Any) -> Sra:
    method.config = replace(method.config, **changes)
    return method


def test_golden_teacher_with_separation(reference: small.Reference) -> None:
    numbers, method = reference.numbers, small.make(reference, "dts_as")
    step, _ = small.dual_step_of(reference, method, teacher_labels="dts_y")
    times = []
    forward = step.ema_forward
    assert forward is not None

    def look(x: torch.Tensor, t: torch.Tensor, capture: Capture) -> Captured:
        times.append(t)
        captured = forward(x, t, capture)
        assert_close(captured.hidden[5], numbers["dts_as_teacher"], **small.TOLERANCE)
        return captured

    method.losses(replace(step, ema_forward=look))
    groups, t = small.groups_of(reference, separate=True)
    for found, wanted in ((t, "dts_token_t"), (times[0], "dts_teacher_token_t")):
        assert_close(groups.spread(found.unsqueeze(-1)).squeeze(-1), numbers[wanted], **small.TOLERANCE)


def test_golden_with_the_labels_of_the_student(reference: small.Reference) -> None:
    method = small.make(reference, "dts_as")
    terms = method.losses(small.dual_step_of(reference, method)[0])
    numbers = reference.numbers
    assert_close(terms["sra"].value, numbers["dts_as_cos_token_dropped"], **small.TOLERANCE)
    assert_close(
        1 - terms["sra_cosine_channel"].value, numbers["dts_as_cos_channel_dropped"], **small.TOLERANCE
    )


def test_golden_without_separation(reference: small.Reference) -> None:
    numbers, method = reference.numbers, small.make(reference, **DUAL)
    step, velocity = small.dual_step_of(reference, method, teacher_labels="dts_y")
    assert_close(step.student.prediction, numbers["dts_out"], **small.TOLERANCE)
    assert_close(velocity, numbers["dts_gen"], **small.TOLERANCE)
    terms = method.losses(step)
    assert_close(terms["sra"].value, numbers["dts_cos_token"], **small.TOLERANCE)
    assert_close(1 - terms["sra_cosine_channel"].value, numbers["dts_cos_channel"], **small.TOLERANCE)


def test_golden_self_flow(reference: small.Reference) -> None:
    """The teacher sees the whole image at the smaller time; the student as with separation."""
    numbers, method = reference.numbers, small.make(reference, "dts_as", teacher="self_flow")
    step, _ = small.dual_step_of(reference, method, teacher_labels="dts_y")
    times = []
    forward = step.ema_forward
    assert forward is not None
    step = replace(step, ema_forward=lambda x, t, capture: (times.append(t), forward(x, t, capture))[1])
    terms = method.losses(step)
    assert_close(times[0], numbers["selfflow_teacher_t"], **small.TOLERANCE)
    assert_close(terms["sra"].value, numbers["selfflow_cos_token"], **small.TOLERANCE)
    assert_close(1 - terms["sra_cosine_channel"].value, numbers["selfflow_cos_channel"], **small.TOLERANCE)


@pytest.mark.parametrize("separate", [True, False])
def test_the_loss_by_loops_over_tokens(reference: small.Reference, separate: bool) -> None:
    """Patch by patch: its own x_t and its own error; group by group: a forward pass of its tokens alone."""
    numbers = reference.numbers
    method = small.make(reference, **DUAL | {"separate": separate})
    step, velocity = small.dual_step_of(reference, method)
    groups, t = small.groups_of(reference, separate=separate)
    x0, noise, total = numbers["x0"], numbers["noise"], []
    for image in range(3):
        x_t = torch.empty_like(x0[image])
        for token in range(64):
            rows, columns = (slice(2 * at, 2 * at + 2) for at in divmod(token, 8))
            time = t[image, groups.of_token[image, token]]
            patch = (slice(None), rows, columns)
            x_t[patch] = (1 - time) * x0[image][patch] + time * noise[image][patch]
        tokens = reference.student.x_embedder(x_t[None]) + reference.student.pos_embed
        label = reference.student.y_embedder(step.condition[image : image + 1])
        embeddings = [reference.student.t_embedder(t[image, group][None]) + label for group in (0, 1)]
        found = torch.zeros_like(x0[image])
        if separate:
            for group, embedding in enumerate(embeddings):
                mine = (groups.of_token[image] == group).nonzero().flatten()
                if not len(mine):
                    continue
                hidden = tokens[:, mine]
                for block in reference.student.blocks:
                    hidden, _ = block(hidden, embedding)
                patches = reference.student.final_layer(hidden, embedding)[0]
                for patch, token in zip(patches, mine.tolist(), strict=True):
                    place(found, patch, token)
        else:
            hidden = tokens
            for block in reference.student.blocks:
                hidden = block_by_tokens(block, hidden, embeddings, groups.of_token[image])
            for token in range(64):
                embedding = embeddings[int(groups.of_token[image, token])]
                place(
                    found, reference.student.final_layer(hidden[:, token : token + 1], embedding)[0, 0], token
                )
        total.append(math.fsum(((found - (noise - x0)[image]) ** 2).flatten().tolist()) / 1024)
    assert_close(velocity, torch.tensor(total, dtype=torch.float64), **small.TOLERANCE)


def place(image: torch.Tensor, patch: torch.Tensor, token: int) -> None:
    """Write a patch, channels last, where its token lies."""
    row, column = divmod(token, 8)
    image[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = patch.reshape(2, 2, 4).permute(2, 0, 1)


def block_by_tokens(
    block: Any, hidden: torch.Tensor, embeddings: list[torch.Tensor], of_token: torch.Tensor
) -> torch.Tensor:
    """A block whose every token has its own adaLN, written out."""
    parts = [block.adaLN_modulation(embeddings[int(group)]).chunk(6, dim=1) for group in of_token]
    s1, m1, g1, s2, m2, g2 = (torch.stack([part[i][0] for part in parts])[None] for i in range(6))
    hidden = hidden + g1 * block.attn(block.norm1(hidden) * (1 + m1) + s1)[0]
    return hidden + g2 * block.mlp(block.norm2(hidden) * (1 + m2) + s2)


@pytest.mark.parametrize("separate", [True, False])
def test_gradient_crosses_groups_only_without_separation(reference: small.Reference, separate: bool) -> None:
    numbers = reference.numbers
    groups, t = small.groups_of(reference, separate=separate)
    x = numbers["x0"].clone().requires_grad_()
    captured = reference.student(x, t, numbers["dts_y"], Capture(hidden=(2,)), groups=groups)
    patches = groups.on_latent(torch.tensor([[0.0, 1.0]]).expand(3, 2), (8, 8), 2).expand_as(x)
    assert captured.prediction is not None
    for group in (0, 1):
        mine = (groups.of_token == group).unsqueeze(-1)
        for output in (captured.prediction * (patches == group), captured.hidden[2] * mine):
            (gradient,) = torch.autograd.grad(output.square().sum(), x, retain_graph=True)
            reached = gradient != 0
            assert reached[patches == group].all()
            # the third image has one group, and nothing to cross
            crossed = reached[:2][patches[:2] != group]
            assert len(crossed) > 0
            assert not crossed.any() if separate else crossed.all()


def test_each_token_sends_gradient_to_head_and_student(reference: small.Reference) -> None:
    method = small.make(reference, "dts_as")
    step, velocity = small.dual_step_of(reference, method)
    hidden = step.student.hidden[2]
    (gradient,) = torch.autograd.grad(
        velocity.mean() + method.losses(step)["sra"].value, hidden, retain_graph=True
    )
    assert gradient.abs().amax(-1).min() > 0


def test_equal_times_without_separation_are_one_time(reference: small.Reference) -> None:
    numbers = reference.numbers
    groups, _ = small.groups_of(reference, separate=False)
    t = numbers["t"].unsqueeze(1).expand(-1, 2)
    found = reference.student(numbers["x_t"], t, numbers["y"], groups=groups)
    assert_close(found.prediction, numbers["out"], **small.TOLERANCE)


def test_offsets_have_the_shape_of_the_times() -> None:
    generator = torch.Generator().manual_seed(0)
    phase = small.make().phase_at(0)
    assert small.make(times="two").draws(phase, 5, generator)["offset"].shape == (5, 2)
    assert small.make(separate=True).draws(phase, 5, generator)["offset"].shape == (5,)


def test_groups_that_share_a_time_share_its_offset_and_a_whole_image_takes_the_last() -> None:
    one, two = small.make(separate=True), small.make(times="two")
    t, offset = torch.tensor([0.5, 0.1]), torch.tensor([[0.3, 0.2], [0.3, 0.2]])
    both = one._teacher_times(t.unsqueeze(1).expand(2, 2), offset[:, 1])
    assert_close(both, torch.tensor([[0.3, 0.3], [0.0, 0.0]]))
    assert_close(two._teacher_times(t, offset), torch.tensor([0.3, 0.0]))


def test_which_images_have_groups() -> None:
    method = small.make(stop=5)
    assert method.token_times(method.phase_at(0)) is None
    method = small.make(stop=5, times="two", share=0.35, whole=0.1)
    law = method.token_times(method.phase_at(0))
    assert law is not None
    assert (law.shares, law.separate, law.one_time, law.whole) == ((0.35, 0.65), False, False, 0.1)
    assert method.token_times(method.phase_at(5)) is None
    law = (separated := small.make(separate=True)).token_times(separated.phase_at(0))
    assert law is not None
    assert (law.separate, law.one_time) == (True, True)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"share": 0.5}, "method.share"),
        ({"whole": 0.5}, "method.whole"),
        ({"teacher": "self_flow"}, "method.teacher"),
        ({"teacher": "self_flow", "separate": True}, "method.teacher"),
        ({"teacher": "self_flow", "times": "two", "offset": 0.1}, "method.offset"),
        ({"decay_epochs": 0, "decay_after": 5}, "method.decay_after"),
        ({"decay_epochs": 0, "epoch_steps": 5}, "method.epoch_steps"),
        ({"times": "two", "share": 0.001}, "method.share"),
        ({"separate": True, "share": 0.999}, "method.share"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings: dict[str, Any], field: str) -> None:
    (problem,) = small.make(**settings).problems()
    assert problem.field == field
    assert problem.remedy


@pytest.mark.parametrize(
    "settings",
    [
        {"times": "two", "share": 0.5, "whole": 0.5, "offset": 0.1},
        {"separate": True, "share": 0.5, "whole": 0.5},
        {"decay_after": 5, "epoch_steps": 5},
        {"times": "two", "teacher": "self_flow", "separate": True},
    ],
)
def test_settings_that_go_together(settings: dict[str, Any]) -> None:
    assert small.make(**settings).problems() == []
    assert isinstance(small.make(**settings).config, SraConfig)
