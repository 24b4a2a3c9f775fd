"""Factors of an image's attention: what they lose, on which inputs they are finite, and whose they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from repa.data.format.factor_layout import FactorLayout
from repa.pipeline.columns.factored import FactoredForm
from repa.pipeline.columns.factoring import spectrum, start_basis, weighted_moments
from repa.pipeline.columns.forms import AttentionForm
from repa.pipeline.columns.measures import attention_divergence
from repa.pipeline.columns.specs import bytes_per_image
from repa.pipeline.columns.truncation import balanced_projections, centred, second_moment, truncated

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

HEADS, TOKENS, WIDTH, SCALE = 2, 24, 16, 0.25


def drawn(images: int, seed: int, *, rank: int = WIDTH, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """Queries and keys ``[B, 1, H, T, Dh]`` of falling variance, within ``rank`` directions of the image."""
    generator = torch.Generator().manual_seed(seed)
    strength = torch.logspace(0.3, -1, WIDTH)
    strength[rank:] = 0
    pair = []
    for _ in range(2):
        turn = torch.linalg.qr(torch.randn(images, 1, HEADS, WIDTH, WIDTH, generator=generator)).Q
        values = torch.randn(images, 1, HEADS, tokens, WIDTH, generator=generator) * strength
        pair.append(values @ turn)
    return pair[0], pair[1]


def form_of(
    queries: Tensor, keys: Tensor, components: tuple[int, int], *, scale: float = SCALE
) -> FactoredForm:
    """The form fitted to some images, every head with the same components."""
    found = weighted_moments(queries[:, 0], keys[:, 0], scale)
    basis = start_basis(found[0].mean(0), found[1].mean(0)).unsqueeze(0)
    layout = FactorLayout(tokens=queries.shape[-2], components=((components,) * HEADS,))
    return FactoredForm(
        model="demo", blocks=(1,), head_width=WIDTH, logit_scale=scale, layout=layout, basis=basis
    )


def loss_of(form: FactoredForm | AttentionForm, queries: Tensor, keys: Tensor, scale: float = SCALE) -> float:
    stored = form.decode(form.encode({"q": queries, "k": keys}))
    return float(attention_divergence((queries, keys), stored, scale).mean())


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_an_image_of_few_directions_is_kept_to_rounding(rank: int) -> None:
    """Each image in directions of its own: all of them together fill the width."""
    queries, keys = drawn(4, 0, rank=rank)
    kept = loss_of(form_of(queries, keys, (rank, 0)), queries, keys)
    assert 0 <= kept < 2e-5
    if rank > 1:
        assert loss_of(form_of(queries, keys, (rank - 1, 0)), queries, keys) > 20 * kept


def test_more_components_lose_less_and_int4_loses_more_than_int8() -> None:
    queries, keys = drawn(4, 0)
    losses = [loss_of(form_of(queries, keys, (count, 0)), queries, keys) for count in (2, 4, 8, 16)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 3 * losses[1] > 30 * losses[2] > 3000 * losses[3]
    assert loss_of(form_of(queries, keys, (0, 16)), queries, keys) > 100 * losses[3]
    # more components in int4 beat fewer in int8 of the same bytes
    assert loss_of(form_of(queries, keys, (2, 4)), queries, keys) < losses[1]


def constant() -> tuple[Tensor, Tensor]:
    """All tokens alike, as of a blank picture."""
    queries, keys = drawn(2, 0)
    return queries[..., :1, :].expand_as(queries), keys[..., :1, :].expand_as(keys)


def zero_keys() -> tuple[Tensor, Tensor]:
    queries, keys = drawn(2, 0)
    return queries, torch.zeros_like(keys)


def zeros() -> tuple[Tensor, Tensor]:
    queries, keys = drawn(2, 0)
    return torch.zeros_like(queries), torch.zeros_like(keys)


def saturated() -> tuple[Tensor, Tensor]:
    """Attention of one key alone in most rows, of none at all for some keys."""
    queries, keys = drawn(2, 0)
    return queries * 30, keys * 30


def tiny() -> tuple[Tensor, Tensor]:
    queries, keys = drawn(2, 0)
    return queries * 1e-12, keys * 1e-12


def outlying() -> tuple[Tensor, Tensor]:
    """A token of a norm a hundred times the others', as a trained teacher's registers are."""
    queries, keys = drawn(2, 0)
    keys = keys.clone()
    keys[..., 5, :] *= 100
    return queries, keys


HARD = {
    "one direction": lambda: drawn(2, 0, rank=1),
    "fewer tokens than components": lambda: drawn(2, 0, tokens=4),
    "one token": lambda: drawn(2, 0, tokens=1),
    "constant": constant,
    "zero keys": zero_keys,
    "zeros": zeros,
    "saturated": saturated,
    "tiny": tiny,
    "a token that outshines all": outlying,
}


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("components", [(16, 0), (0, 16), (3, 5), (0, 1)])
def test_hard_images_have_finite_columns(kind: str, components: tuple[int, int]) -> None:
    """With a basis fitted to such images, and with that of others."""
    queries, keys = HARD[kind]()
    tokens = queries.shape[-2]
    for fitted in ((queries, keys), drawn(4, 1, tokens=tokens)):
        form = form_of(*fitted, components)
        assert form.basis.isfinite().all()
        columns = form.encode({"q": queries, "k": keys})
        assert columns["demo/q-scale"].isfinite().all()
        divergence = attention_divergence((queries, keys), form.decode(columns), SCALE)
        assert divergence.isfinite().all()
        if kind in ("constant", "zero keys", "zeros", "tiny", "one token"):
            assert divergence.max() < 1e-9
        elif components == (16, 0):
            assert divergence.mean() < 2e-3
            whole = AttentionForm(
                model="demo", blocks=(1,), heads=HEADS, tokens=tokens, head_width=WIDTH, dtype="int8"
            )
            # half a percent more where one direction is all that there is
            assert divergence.mean() < 1.02 * loss_of(whole, queries, keys)


def test_what_is_not_finite_has_scales_that_are_not() -> None:
    queries, keys = drawn(3, 0)
    form = form_of(queries, keys, (4, 4))
    for broken in (float("nan"), float("inf")):
        bad = queries.clone()
        bad[1, 0, 0, 3, 2] = broken
        columns = form.encode({"q": bad, "k": keys})
        finite = columns["demo/q-scale"].isfinite().all(dim=1)
        # the others' are what they were
        assert finite.tolist() == [True, False, True]
        for name, values in form.encode({"q": queries, "k": keys}).items():
            assert torch.equal(values[0], columns[name][0])


@pytest.mark.parametrize("components", [(3, 5), (16, 0)])
def test_an_images_bytes_are_its_own(components: tuple[int, int]) -> None:
    """Whatever the batch, and wherever in it."""
    queries, keys = drawn(8, 0)
    form = form_of(queries, keys, components)

    def encoded(rows: list[int]) -> Mapping[str, Tensor]:
        return form.encode({"q": queries[rows], "k": keys[rows]})

    whole = encoded(list(range(8)))
    for rows in ([5], [7, 5, 0], [1, 2, 5], [5, 5, 5, 4, 3, 2, 1, 0]):
        for name, values in encoded(rows).items():
            assert torch.equal(values, whole[name][rows]), (name, rows)


def test_what_all_keys_share_changes_nothing() -> None:
    queries, keys = drawn(3, 0)
    form = form_of(queries, keys, (6, 4))
    shifted = keys + 4 * torch.randn(3, 1, HEADS, 1, WIDTH, generator=torch.Generator().manual_seed(2))
    losses = [loss_of(form, queries, each) for each in (keys, shifted)]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_the_spectrum_is_of_the_weighted_logits() -> None:
    queries, keys = (each.double() for each in drawn(3, 0))
    keys = centred(keys)
    received = torch.softmax(SCALE * queries @ keys.mT, -1).mean(-2)
    exact = torch.linalg.svdvals(queries @ keys.mT * received.sqrt().unsqueeze(-2))[..., :WIDTH]
    torch.testing.assert_close(spectrum(queries, keys, received), exact.square(), rtol=1e-6, atol=1e-8)


def test_flat_over_the_set_and_steep_within_an_image() -> None:
    """Real attention is so: one basis for all then loses ten times what factors of each image do."""
    queries, keys = drawn(24, 0, rank=6)
    noise = torch.Generator().manual_seed(3)
    queries, keys = (each + 0.02 * torch.randn(each.shape, generator=noise) for each in (queries, keys))
    moments = [second_moment(each).mean(0) for each in (queries, centred(keys))]
    # flat: the best cut to half of the width leaves a good part of the energy
    singular = torch.linalg.svdvals(
        torch.linalg.cholesky(moments[0]).mT @ torch.linalg.cholesky(moments[1])
    ).square()
    assert (singular[..., WIDTH // 2 :].sum(-1) / singular.sum(-1) > 0.2).all()
    for rank, components in ((4, (4, 0)), (8, (4, 8)), (12, (8, 8))):
        cut = AttentionForm(
            model="demo",
            blocks=(1,),
            heads=HEADS,
            tokens=TOKENS,
            head_width=WIDTH,
            dtype="int8",
            projections=truncated(balanced_projections(*moments), rank),
        )
        factors = form_of(queries, keys, components)
        assert bytes_per_image(factors.columns) <= bytes_per_image(cut.columns)
        assert loss_of(factors, queries, keys) < loss_of(cut, queries, keys) / 10
    # the whole width in int8 is the one basis' best
    whole = AttentionForm(
        model="demo", blocks=(1,), heads=HEADS, tokens=TOKENS, head_width=WIDTH, dtype="int8"
    )
    factors = form_of(queries, keys, (WIDTH, 0))
    assert bytes_per_image(factors.columns) <= bytes_per_image(whole.columns)
    assert loss_of(factors, queries, keys) < loss_of(whole, queries, keys)
