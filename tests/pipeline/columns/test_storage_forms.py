"""Truncation, divergence and token errors as numbers; on which images; the file they fill."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from repa.data.errors import RepaError
from repa.data.format.columns import ColumnSpec
from repa.pipeline.columns.calibration import Calibration, choose_images
from repa.pipeline.columns.forms import AttentionForm, TokenForm
from repa.pipeline.columns.measures import TokenErrors, attention_divergence
from repa.pipeline.columns.specs import AttentionSettings, bytes_per_image
from repa.pipeline.columns.truncation import (
    balanced_projections,
    centred,
    hartley,
    project,
    second_moment,
    truncated,
)
from repa.pipeline.images.base import UndecodableImage

L, H, DH = 2, 2, 16


def drawn(count: int, seed: int, *, rank: int = DH) -> torch.Tensor:
    """Anisotropic vectors ``[count, L, H, T=12, Dh]``: over three decades of variance, turned."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -1.5, DH)
    scales[rank:] = 0
    turn = torch.linalg.qr(torch.randn(L, H, DH, DH, generator=generator)).Q
    return (torch.randn(count, L, H, 12, DH, generator=generator) + 0.5) * scales @ turn


def moments(values: torch.Tensor) -> torch.Tensor:
    return second_moment(values).mean(0)


def flat(values: torch.Tensor) -> torch.Tensor:
    """``[N, L, H, T, Dh]`` as ``[L, H, N·T, Dh]``."""
    return values.permute(1, 2, 0, 3, 4).flatten(2, 3).double()


def error_of(q: torch.Tensor, k: torch.Tensor, form: torch.Tensor) -> torch.Tensor:
    """Mean of (q·k − qᵀ·form·k)² over all pairs: ``[L, H]``."""
    missed = torch.eye(DH, dtype=torch.float64) - form
    return (flat(q) @ missed @ flat(k).mT).square().mean(dim=(-2, -1))


@pytest.mark.parametrize("rank", [1, 4, 8, 12])
def test_truncation_is_the_best_form_of_its_rank(rank: int) -> None:
    """Against principal components of the queries, of the keys, and random ones; and the closed form."""
    q, k = drawn(5, 0), centred(drawn(5, 1))
    to_query, to_key = truncated(balanced_projections(moments(q), moments(k)), rank)
    balanced = error_of(q, k, (to_query.mT @ to_key).double())
    others = {}
    for name, basis in (
        ("queries", torch.linalg.eigh(moments(q)).eigenvectors[..., -rank:]),
        ("keys", torch.linalg.eigh(moments(k)).eigenvectors[..., -rank:]),
        ("random", torch.linalg.qr(torch.randn(L, H, DH, rank, dtype=torch.float64)).Q),
    ):
        others[name] = error_of(q, k, basis @ basis.mT)
    for name, error in others.items():
        assert (balanced <= error * (1 + 1e-6)).all(), name
    assert (balanced < 0.9 * others["random"]).all()
    # Σ of the squared singular values that are left out
    roots = [torch.linalg.cholesky(moments(each)).mT for each in (q, k)]
    singular = torch.linalg.svdvals(roots[0] @ roots[1].mT)
    torch.testing.assert_close(balanced, singular[..., rank:].square().sum(-1), rtol=1e-4, atol=1e-12)


def test_all_ranks_are_beginnings_of_one_and_the_whole_is_exact() -> None:
    q, k = drawn(5, 0), centred(drawn(5, 1))
    to_query, to_key = balanced_projections(moments(q), moments(k))
    exact = q.double() @ k.double().mT
    whole = truncated((to_query, to_key), DH)
    kept = project(q, whole[0]).double() @ project(k, whole[1]).double().mT
    assert (kept - exact).abs().max() / exact.abs().max() < 1e-6
    # both sides have the same second moments, diagonal and falling: that is what balanced means
    for each in (q.double() @ to_query.mT, k.double() @ to_key.mT):
        moment = moments(each)
        diagonal = moment.diagonal(dim1=-2, dim2=-1)
        assert (diagonal.diff(dim=-1) <= 1e-9).all()
        torch.testing.assert_close(
            moment, torch.diag_embed(diagonal), atol=1e-6 * float(diagonal.max()), rtol=0
        )
    # signs are fixed, so that another library's cannot differ
    largest = to_query.abs().argmax(dim=-1, keepdim=True)
    assert (to_query.gather(-1, largest) > 0).all()


@pytest.mark.parametrize("size", [1, 2, 7, 8, 24, 64])
def test_the_turn_is_orthogonal_and_even(size: int) -> None:
    turn = hartley(size)
    torch.testing.assert_close(turn @ turn.mT, torch.eye(size, dtype=torch.float64), atol=1e-12, rtol=0)
    assert torch.equal(turn, turn.mT)
    assert turn.abs().max() <= math.sqrt(2 / size) + 1e-12


def test_the_turn_changes_no_product_and_makes_int8_finer() -> None:
    """By about what the variances say: (Σs)²/r for Σs²."""
    q, k = drawn(6, 0), centred(drawn(6, 1))
    balanced = balanced_projections(moments(q), moments(k))
    singular = moments(q.double() @ balanced[0].mT).diagonal(dim1=-2, dim2=-1)[..., :8]
    expected = (singular.sum(-1) ** 2 / 8 / singular.square().sum(-1)).mean()
    straight = tuple(each[..., :8, :].float() for each in balanced)
    products, errors = [], []
    for cut in (straight, truncated(balanced, 8)):
        form = AttentionForm(
            model="demo", blocks=(1, 2), heads=H, tokens=12, head_width=DH, dtype="int8", projections=cut
        )
        products.append(project(q, cut[0]) @ project(k, cut[1]).mT)
        queries, keys = form.decode(form.encode({"q": q, "k": k}))
        errors.append(float((queries @ keys.mT - products[-1]).square().mean()))
    torch.testing.assert_close(products[0], products[1], atol=1e-5, rtol=1e-5)
    assert expected < 0.6
    assert errors[1] / errors[0] < 1.2 * expected


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_directions_without_queries_or_keys_do_no_harm(rank: int) -> None:
    q, k = drawn(3, 0, rank=rank), centred(drawn(3, 1))
    for first, second in ((q, k), (k, q)):
        to_first, to_second = truncated(balanced_projections(moments(first), moments(second)), DH)
        assert to_first.isfinite().all()
        assert to_second.isfinite().all()
        kept = project(first, to_first).double() @ project(second, to_second).double().mT
        exact = first.double() @ second.double().mT
        assert (kept - exact).abs().max() <= 1e-5 * max(float(exact.abs().max()), 1e-30)


def test_centring_the_keys_changes_no_probability() -> None:
    q, k = drawn(2, 0), drawn(2, 1) + 3.0
    before, after = ((q.double() @ each.double().mT).softmax(-1) for each in (k, centred(k.double())))
    assert (before - after).abs().max() < 1e-14
    form = AttentionForm(model="demo", blocks=(1, 2), heads=H, tokens=12, head_width=DH, dtype="int8")
    shifted = form.encode({"q": q, "k": k + 5.0})
    for name, values in form.encode({"q": q, "k": k}).items():
        # float32 rounds k + 5 before it is centred: a step of int8 here and there
        torch.testing.assert_close(shifted[name].float(), values.float(), rtol=1e-5, atol=1.0)
    assert attention_divergence((q, k), form.decode(form.encode({"q": q, "k": k})), 1.0).max() < 1e-3


def test_divergence_is_the_definition() -> None:
    q, k = drawn(2, 0), drawn(2, 1)
    kept = (q + 0.01, k * 1.02)
    measured = attention_divergence((q, k), kept, 0.25)
    assert measured.shape == (2, L, H, 12)
    assert measured.dtype == torch.float64
    for place in np.ndindex(2, L, H, 12):
        image, block, head, _ = place
        maps = []
        for queries, keys in ((q, k), kept):
            logits = [
                0.25 * math.fsum(float(a) * float(b) for a, b in zip(queries[place], key, strict=True))
                for key in keys[image, block, head]
            ]
            total = math.fsum(math.exp(x) for x in logits)
            maps.append([math.exp(x) / total for x in logits])
        expected = math.fsum(p * math.log(p / r) for p, r in zip(*maps, strict=True))
        assert float(measured[place]) == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert attention_divergence((q, k), (q, k), 0.25).abs().max() == 0


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_forms_without_truncation(dtype: str) -> None:
    q, k = drawn(2, 0), drawn(2, 1)
    form = AttentionForm(model="demo", blocks=(4, 6), heads=H, tokens=12, head_width=DH, dtype=dtype)
    stored = form.encode({"q": q, "k": k})
    assert {
        name: (tuple(v.shape[1:]), str(v.dtype).removeprefix("torch.")) for name, v in stored.items()
    } == {name: (spec.shape, spec.dtype) for name, spec in form.columns.items()}
    queries, keys = form.decode(stored)
    if dtype == "int8":
        assert form.notes["keys"] == "centred"
        step = stored["demo/k-scale"].unsqueeze(-2)
        assert ((keys - centred(k)).abs() <= step / 2 + 1e-7).all()
    else:
        assert form.notes["keys"] == "as computed"
        assert torch.equal(keys, k.half().float() if dtype == "float16" else k)
        assert torch.equal(queries, q.half().float() if dtype == "float16" else q)
    assert (form.notes["form"], form.notes["rank"], form.notes["blocks"]) == ("exact", DH, [4, 6])


def test_a_cut_form() -> None:
    q, k = drawn(4, 0), drawn(4, 1)
    cut = truncated(balanced_projections(moments(q), moments(centred(k))), 6)
    form = AttentionForm(
        model="demo", blocks=(1, 2), heads=H, tokens=12, head_width=DH, dtype="int8", projections=cut
    )
    assert form.columns == {
        "demo/q": ColumnSpec(shape=(L, H, 12, 6), dtype="int8"),
        "demo/q-scale": ColumnSpec(shape=(L, H, 6), dtype="float32"),
        "demo/k": ColumnSpec(shape=(L, H, 12, 6), dtype="int8"),
        "demo/k-scale": ColumnSpec(shape=(L, H, 6), dtype="float32"),
    }
    assert bytes_per_image(form.columns) == 2 * (L * H * 12 * 6 + 4 * L * H * 6)
    queries, keys = form.decode(form.encode({"q": q, "k": k}))
    expected = project(q, cut[0]) @ project(centred(k), cut[1]).mT
    assert (queries @ keys.mT - expected).abs().max() < 0.02 * expected.abs().max()
    assert (form.notes["form"], form.notes["rank"], form.notes["head_width"]) == ("truncated", 6, DH)


def test_tokens_in_int8() -> None:
    generator = torch.Generator().manual_seed(0)
    features = {
        "patch": torch.randn(2, 5, 8, generator=generator),
        "cls": torch.randn(2, 8, generator=generator),
    }
    form = TokenForm(model="demo", tokens=5, width=8, dtype="int8")
    stored = form.encode(features)
    assert {name: (spec.shape, spec.dtype) for name, spec in form.columns.items()} == {
        "demo/patch": ((5, 8), "int8"),
        "demo/patch-scale": ((8,), "float32"),
        "demo/cls": ((8,), "float16"),
    }
    assert torch.equal(stored["demo/cls"], features["cls"].half())
    kept = form.decode(stored)
    error, change = TokenErrors(5, 8)(features["patch"], kept)
    for image, token in np.ndindex(2, 5):
        z, near = features["patch"][image, token].double(), kept[image, token].double()
        cosine = float(z @ near / (z.norm() * near.norm()))
        assert float(error[image, token]) == pytest.approx(1 - cosine, abs=1e-12)
        # no prediction can lose more than the chord
        assert abs(float(change[image, token])) <= math.sqrt(2 * float(error[image, token])) + 1e-12


def test_the_change_of_repas_loss_is_that_of_predictions_at_half_cosine() -> None:
    """Against tokens turned by a known angle towards and away from the prediction."""
    z = torch.tensor([[[2.0, 0.0], [0.0, 3.0]]])
    errors = TokenErrors(2, 2)
    angle = 0.1
    turned = torch.tensor([[[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]])
    error, change = errors(z, turned)
    assert error.flatten().tolist() == pytest.approx([1 - math.cos(angle)] * 2, rel=1e-5)
    towards, away = 0.5 - math.cos(math.pi / 3 - angle), 0.5 - math.cos(math.pi / 3 + angle)
    for value in change.flatten().tolist():
        assert min(abs(value - towards), abs(value - away)) < 1e-6
    assert errors(z, 5 * z)[1].abs().max() < 1e-12  # only directions count


@pytest.mark.parametrize(
    ("options", "dtype", "factored", "asked"),
    [
        ({}, "float16", False, {"rank": None, "tolerance": None}),
        ({"rank": 12}, "int8", False, {"rank": 12, "tolerance": None}),
        ({"tolerance": 0.1}, "uint8", True, {"rank": None, "tolerance": 0.1}),
        ({"bytes": 500}, "uint8", True, {"rank": None, "tolerance": None, "bytes": 500}),
        # a rank that an earlier version chose for the tolerance, and what its calibration was made for
        ({"rank": 8, "tolerance": 0.1}, "int8", False, {"rank": None, "tolerance": 0.1}),
    ],
)
def test_what_is_asked_for_says_the_form(
    options: dict[str, Any], dtype: str, factored: bool, asked: dict[str, Any]
) -> None:
    settings = AttentionSettings(blocks=(1,), dtype="float16", **options)
    assert (settings.stored_dtype, settings.factored) == (dtype, factored)
    assert settings.asked == {"blocks": [1], "dtype": dtype, **asked}


class Images:
    """Images of one grey each, some broken."""

    name = "greys"

    def __init__(self, count: int, broken: set[int]) -> None:
        self.count, self.broken = count, broken

    def __len__(self) -> int:
        return self.count

    def load(self, index: int) -> Image.Image:
        if index in self.broken:
            raise UndecodableImage("broken")
        return Image.new("RGB", (4, 4), (index % 256,) * 3)


def picked(count: int, broken: set[int] = frozenset()) -> tuple[list[int], list[int]]:  # type: ignore[assignment]
    images: Any = Images(count, broken)
    chosen = choose_images(images, 4)
    for rows in (chosen.fit, chosen.held_out):
        for row, pixels in rows.items():
            assert pixels.shape == (3, 4, 4)
            assert (pixels == row % 256).all()
    return list(chosen.fit), list(chosen.held_out)


def test_images_are_spread_over_the_set_and_every_third_is_held_out() -> None:
    fit, held_out = picked(1920)
    assert (len(fit), len(held_out)) == (128, 64)
    assert sorted(fit + held_out) == list(range(0, 1920, 10))
    assert held_out == list(range(20, 1920, 30))
    assert picked(7) == ([0, 1, 3, 4, 6], [2, 5])
    assert picked(2) == ([0], [1])


def test_an_undecodable_image_gives_its_place_to_the_next() -> None:
    fit, held_out = picked(1920, {0, 20, 21, *range(40, 50)})
    assert fit[0] == 1
    assert held_out[0] == 22
    assert 40 not in fit + held_out
    assert len(fit + held_out) == 191
    assert picked(4, {1}) == ([0, 2], [3])
    with pytest.raises(RepaError, match="greys has 1 image that can be decoded") as caught:
        picked(3, {0, 2})
    assert "\n" not in str(caught.value)


def test_a_calibration_is_one_spelling_of_its_content() -> None:
    projections = torch.arange(8.0).view(1, 1, 2, 4), torch.ones(1, 1, 2, 4)
    head = {"block": 1, "head": 1, "mean": 1e-7, "p99": 1e-6}
    attention = {"kl": [head], "kl_mean": 1e-7, "kl_worst_head": 1e-7, "images": 2, "bytes_per_image": 8}
    tokens = {
        "cosine_error_mean": 0.1,
        "cosine_error_max": 0.2,
        "repa_loss_change": 0,
        "images": 2,
        "bytes_per_image": 8,
    }
    made = Calibration(
        settings={"b": [1, 2], "a": None},
        images=3,
        fidelity=attention,
        projections=projections,
    )
    data = made.encode()
    turned = Calibration(
        settings={"a": None, "b": [1, 2]},
        images=3,
        fidelity=attention,
        projections=projections,
    )
    assert turned.encode() == data
    assert hashlib.sha256(data).hexdigest() == hashlib.sha256(made.encode()).hexdigest()
    again = Calibration.decode(data)
    assert again == made
    assert again.projections is not None
    assert torch.equal(again.projections[0], projections[0])
    bare = Calibration(settings={}, images=0, fidelity=tokens)
    assert Calibration.decode(bare.encode()).projections is None
    strange = [
        Calibration(settings={}, images=images, fidelity=fidelity).encode()
        for images, fidelity in ((-1, tokens), ("2", tokens), (0, {}), (0, {**tokens, "images": None}))
    ]
    for damaged in (b"", data[:20], b"x" * 40, data[:-1], *strange):
        with pytest.raises(ValueError, match="not a calibration"):
            Calibration.decode(damaged)
