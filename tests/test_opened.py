"""A cache in the hands of others: rows by index, batches in the exact order, README's loops as printed."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import repa
import torch
from repa import losses
from repa.data.errors import CacheError, RepaError
from repa.data.format.columns import ColumnSpec
from repa.data.format.factor_layout import FactorLayout
from repa.data.format.factors import pack
from repa.data.reading.latents import chosen_scale, sample_posterior, scale_latent
from repa.data.reading.loader import CacheLoader
from repa.data.reading.reader import CacheReader
from repa.data.testing import SYNTHETIC_COLUMNS, expected_labels, expected_row, synthetic_cache
from torch import nn
from torch.utils.data import DataLoader

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
ROWS = 24
ATTENTION = ColumnSpec(shape=(2, 2, 4, 8), dtype="int8")
COLUMNS = {
    **SYNTHETIC_COLUMNS,
    "demo/q": ATTENTION,
    "demo/k": ATTENTION,
    "demo/q-scale": ColumnSpec(shape=(2, 2, 8), dtype="float32"),
    "demo/k-scale": ColumnSpec(shape=(2, 2, 8), dtype="float32"),
}
MOMENTS, PATCH = "sd-vae/moments", "demo/patch"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 rows, one of them without data, two views, int8 attention, and a teacher that is not written yet."""
    folder = tmp_path_factory.mktemp("opened") / "cache"
    views = ("original", "mirrored")
    synthetic_cache(folder, num_rows=ROWS, columns=COLUMNS, invalid={5: "damaged"}, views=views)
    later = {"later/patch": COLUMNS[PATCH]}
    synthetic_cache(folder, num_rows=ROWS, columns=later, views=views, written=False)
    return folder


def test_rows_are_what_is_stored(path: Path) -> None:
    cache = repa.open(path)
    assert len(cache) == ROWS
    assert set(cache.columns) == set(COLUMNS)  # not the column that is declared and not written
    assert cache.valid_rows.tolist() == [row for row in range(ROWS) if row != 5]
    assert cache.keys[7] == "images/000007.png"
    for index, row in ((7, 7), (-1, ROWS - 1)):
        found = cache[index]
        assert found.pop("label") == expected_labels(ROWS, 3)[row]
        assert found.keys() == COLUMNS.keys()
        for name, values in found.items():
            np.testing.assert_array_equal(values, expected_row(name, row, COLUMNS[name]))


def test_rows_in_the_order_asked_for_and_of_another_view(path: Path) -> None:
    cache = repa.open(str(path))
    rows = np.array([9, 2, 9])
    found = cache.read(rows, PATCH, "label", view="mirrored")
    assert list(found) == [PATCH, "label"]
    assert found["label"].tolist() == expected_labels(ROWS, 3)[rows].tolist()
    for values, row in zip(found[PATCH], rows, strict=True):
        np.testing.assert_array_equal(values, expected_row(PATCH, int(row), COLUMNS[PATCH], view=1))
    assert cache.read([], PATCH)[PATCH].shape == (0, 4, 16)


def test_what_is_not_there(path: Path, tmp_path: Path) -> None:
    cache = repa.open(path)
    with pytest.raises(IndexError):
        cache[ROWS]
    with pytest.raises(IndexError):
        cache[-ROWS - 1]
    for action in (
        lambda: cache[5],
        lambda: cache.read([0], "later/patch"),
        lambda: cache.read([0], "other/patch"),
        lambda: cache.loader("later/patch", batch_size=4),
        lambda: repa.open(tmp_path),
    ):
        with pytest.raises(CacheError):
            action()
    for action, field in (
        (lambda: cache.read([0], PATCH, view="none"), "view"),
        (lambda: cache.attention({}, "demo", block=3), "demo+attention"),
        (lambda: cache.attention({}, "other", block=1), "other+attention"),
        (lambda: cache.loader(PATCH, batch_size=4, start_step=-1), "start_step"),
        (lambda: cache.loader(PATCH, batch_size=4, rank=0), "rank"),
        (lambda: cache.loader(PATCH, batch_size=4, view="none"), "view"),
        (lambda: repa.open("a-{0..3}.tar"), "cache"),
    ):
        with pytest.raises(RepaError) as caught:
            action()
        assert caught.value.remedy
        assert caught.value.field.startswith(field) or field == "rank"


def test_an_opened_cache_travels(path: Path) -> None:
    assert pickle.loads(pickle.dumps(repa.open(path)))[3]["label"] == expected_labels(ROWS, 3)[3]


def test_reading_rows_imports_no_torch(path: Path) -> None:
    code = (
        f"import sys, repa; light = len(sys.modules); cache = repa.open({str(path)!r})\n"
        f"print(cache[3]['label'], cache); assert 'numpy' in sys.modules\n"
        "assert not {'torch', 'zarr', 'lightning', 'repa.trainer'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr


def batches_of(loader: Iterable[Any]) -> list[dict[str, Tensor]]:
    return [{name: values.clone() for name, values in batch.items()} for batch in loader]


def assert_equal(found: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]]) -> None:
    assert len(found) == len(wanted) > 0
    for one, two in zip(found, wanted, strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_order_is_that_of_training(path: Path) -> None:
    """The same images, views and values as the loader of `repa train`, for every rank and from every step."""
    cache = repa.open(path)
    reader = CacheReader(path, (MOMENTS, PATCH))
    options: dict[str, Any] = {"batch_size": 4, "seed": 3}
    whole = batches_of(cache.loader(MOMENTS, PATCH, steps=8, **options))
    trained = CacheLoader(
        reader, rows=reader.valid_rows, columns_at=lambda step: (MOMENTS, PATCH), last_image=32, **options
    )
    for batch, ours in zip(whole, trained, strict=True):
        assert torch.equal(batch["rows"], ours.rows)
        assert torch.equal(batch["views"], ours.views)
        assert torch.equal(batch["label"], ours.label)
        assert all(torch.equal(batch[name], values) for name, values in ours.columns.items())
    assert {0, 1} == set(torch.cat([batch["views"] for batch in whole]).tolist())
    (mirrored,) = batches_of(cache.loader(PATCH, steps=1, view="mirrored", **options))
    assert torch.equal(mirrored["rows"], whole[0]["rows"])
    for row, values in zip(mirrored["rows"].tolist(), mirrored[PATCH].numpy(), strict=True):
        np.testing.assert_array_equal(values, expected_row(PATCH, row, COLUMNS[PATCH], view=1))
    later = cache.loader(MOMENTS, PATCH, steps=8, start_step=5, **options)
    assert_equal(batches_of(later), whole[5:])
    assert later.step == 8
    halves = [batches_of(cache.loader(MOMENTS, PATCH, steps=8, rank=r, world=2, **options)) for r in (0, 1)]
    for one, two, both in zip(*halves, whole, strict=True):
        assert torch.equal(torch.cat([one["rows"], two["rows"]]), both["rows"])
    only = batches_of(cache.loader(PATCH, steps=8, start_step=6, **options))
    assert [batch["rows"].tolist() for batch in only] == [batch["rows"].tolist() for batch in whole[6:]]
    assert MOMENTS not in only[0]


def test_its_state_goes_on_where_it_stood(path: Path) -> None:
    cache = repa.open(path)
    options: dict[str, Any] = {"batch_size": 4, "steps": 9, "accumulate": 2}
    whole = batches_of(cache.loader(PATCH, **options))
    assert len(whole) == len(cache.loader(PATCH, **options)) == 18
    first = cache.loader(PATCH, **options)
    for number, _ in enumerate(first):
        if number == 6:  # the first micro-batch of step 3
            break
    state = first.state_dict()
    assert (first.step, state) == (3, {"images_seen": 12})
    second = cache.loader(PATCH, **options)
    second.load_state_dict(state)
    assert_equal(batches_of(second), whole[6:])
    with pytest.raises(RepaError) as caught:
        second.load_state_dict({"step": 3})
    assert caught.value.field == "state"


def test_by_a_loader_of_torch(path: Path) -> None:
    cache = repa.open(path)
    loader = cache.loader(PATCH, batch_size=4, steps=5)
    assert_equal(
        batches_of(DataLoader(loader, batch_size=None)),
        batches_of(cache.loader(PATCH, batch_size=4, steps=5)),
    )
    with pytest.raises(RepaError) as caught:
        next(iter(DataLoader(cache.loader(PATCH, batch_size=4), batch_size=None, num_workers=1)))
    assert "num_workers" in str(caught.value)


def test_held_out_rows_are_those_of_training(path: Path) -> None:
    cache = repa.open(path)
    seen = {row for batch in cache.loader(batch_size=3, steps=6, holdout=5) for row in batch["rows"].tolist()}
    assert len(seen) == 18
    assert seen == set(cache.valid_rows.tolist()) - set(cache.valid_rows[[2, 6, 11, 16, 20]].tolist())


def test_latents_and_targets(path: Path) -> None:
    cache = repa.open(path)
    batch = next(iter(cache.loader(MOMENTS, PATCH, "demo/q", "demo/k", batch_size=4)))
    x0 = cache.latent(batch, torch.Generator().manual_seed(1))
    noise = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(x0, scale_latent(sample_posterior(batch[MOMENTS], noise), 0.18215))
    mine = cache.latent(batch, torch.Generator().manual_seed(1), norm="sd")
    assert torch.equal(
        mine,
        scale_latent(sample_posterior(batch[MOMENTS], noise), *chosen_scale(cache.manifest, "sd", where="")),
    )
    with pytest.raises(CacheError):
        cache.latent_scale("channel")  # which this cache was not measured for
    with pytest.raises(RepaError) as caught:
        cache.latent_scale("other")
    assert caught.value.field == "norm"
    assert torch.equal(cache.target(batch, PATCH), batch[PATCH])
    found = cache.attention(batch, "demo", block=2)
    assert found.scale == 8**-0.5
    for name, values in (("demo/q", found.queries), ("demo/k", found.keys)):
        wanted = batch[name][:, 1].double() * batch[f"{name}-scale"][:, 1, :, None].double()
        assert values.shape == (4, 2, 4, 8)
        torch.testing.assert_close(values.double(), wanted)


def test_attention_in_the_packed_form(tmp_path: Path) -> None:
    """Factors come out as the queries and keys that were packed, with one scale for both on the queries."""
    layout = FactorLayout(tokens=5, components=(((1, 1), (2, 0)), ((0, 1), (1, 1))))
    rows = ColumnSpec(shape=(layout.row_bytes,), dtype="uint8")
    columns = {"demo/q": rows, "demo/k": rows}
    columns["demo/q-scale"] = ColumnSpec(shape=(layout.scales,), dtype="float32")
    about = {"blocks": [3, 7], "logit_scale": 0.25, "head_width": 8, "rank": 2, "form": "factored"}
    notes = {"demo+attention": {**about, "keys": "centred", **layout.as_notes}}
    synthetic_cache(tmp_path / "cache", num_rows=8, columns=columns, notes=notes, grid=(5, 1), written=False)
    draws = torch.Generator().manual_seed(0)
    codes = [torch.randint(-7, 8, (2, 3, 2, 5, 2), generator=draws) for _ in layout.components]
    scales = torch.rand(3, layout.scales, generator=draws)
    batch = {
        name: torch.cat([pack(layout, block, both[side]) for block, both in enumerate(codes)], 1)
        for side, name in enumerate(("demo/q", "demo/k"))
    } | {"demo/q-scale": scales}
    found = repa.open(tmp_path / "cache").attention(batch, "demo", block=7)
    assert found.scale == 0.25
    # head 0 has one component, in int4; head 1 has one in int8 and one in int4, after it in the order of int4
    wanted = torch.stack(
        [codes[1][:, :, 0, :, 0], codes[1][:, :, 1, :, 0], codes[1][:, :, 1, :, 1]], 3
    ).float()
    eight, four_of_0, four_of_1 = scales[:, layout.scales_of(1)].unbind(1)
    for head, places, factors in ((0, [0], [four_of_0]), (1, [1, 2], [eight, four_of_1])):
        queries, keys = (wanted[side][:, :, places] for side in (0, 1))
        logits = (queries * torch.stack(factors, 1)[:, None]) @ keys.mT
        torch.testing.assert_close(found.queries[:, head] @ found.keys[:, head].mT, logits)


def test_readme_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The three pieces of README run one after the other on a cache of small rows, and the loss falls."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Use from your own trainer\n")[2]
    pieces = re.findall(r"```python\n(.*?)```", section.partition("\n## ")[0], re.DOTALL)
    assert len(pieces) == 3
    assert all(len(piece.strip().splitlines()) <= 15 for piece in pieces)
    monkeypatch.chdir(tmp_path)
    attention = ColumnSpec(shape=(3, 2, 4, 8), dtype="float16")
    columns = {MOMENTS: COLUMNS[MOMENTS], "dinov2-b/patch": COLUMNS[PATCH]}
    columns |= {"dinov2-b/q": attention, "dinov2-b/k": attention}
    notes = {"dinov2-b+attention": {"blocks": [8, 10, 12]}}
    synthetic_cache(Path("caches/images-256"), num_rows=100, columns=columns, notes=notes)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.out = nn.Linear(16, 12), nn.Linear(12, 16)

        def forward(self, x_t: Tensor, t: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
            assert t.shape == label.shape == (64,)
            tokens = self.inside(x_t.reshape(64, 4, 16))
            return self.out(tokens).reshape(x_t.shape), tokens

    torch.manual_seed(0)
    network, project = Network(), losses.projector(12, 8, 16)
    parameters = [*network.parameters(), *project.parameters()]
    before = [each.detach().clone() for each in parameters]
    # the printed loop has no end, so that step 3 ends it here
    seen: list[int] = []

    class Optimizer(torch.optim.SGD):
        def step(self, *arguments: Any) -> None:  # type: ignore[override]
            super().step(*arguments)
            seen.append(1)
            if len(seen) == 3:
                raise StopIteration

    student = torch.randn(64, 3, 4, 6, requires_grad=True)
    space: dict[str, Any] = {
        "network": network,
        "project": project,
        "optimizer": Optimizer(parameters, lr=0.1),
        "device": "cpu",
        "start": 2,
        "queries": student,
        "keys": torch.randn(64, 3, 4, 6),
    }
    exec(pieces[0], space)
    assert space["tokens"].shape == (3, 4, 16)
    assert space["teacher"].model == "synthetic/dinov2-b"
    with pytest.raises(StopIteration):
        exec(pieces[1], space)
    assert space["loader"].step == 5
    assert all(not torch.equal(one, two) for one, two in zip(before, parameters, strict=True))
    space["loader"].close()
    space["loss"] = torch.zeros(())  # of a step of its own
    exec(pieces[2], space)
    space["loss"].backward()
    assert student.grad is not None
    assert student.grad[:, :2].abs().sum() > 0
    assert student.grad[:, 2].abs().sum() == 0  # the teacher has two heads
