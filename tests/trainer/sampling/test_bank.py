"""Banks of class tokens: numbers of the released code, files, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from repa.data.errors import CacheError, RepaError
from repa.data.format.columns import ColumnSpec
from repa.data.reading.reader import CacheReader
from repa.data.testing import SYNTHETIC_COLUMNS, synthetic_cache
from repa.trainer.models.conditioning import ClassTokenConditioner
from repa.trainer.models.sit import SiT, SiTConfig
from repa.trainer.objectives.flow import Flow, FlowConfig
from repa.trainer.sampling import bank_file
from repa.trainer.sampling.bank import CacheBank, FactoredBank, WholeBank, open_cache_bank
from repa.trainer.sampling.bank_draws import MIXTURES, default_alphas, mixed, rows_of_noise
from repa.trainer.sampling.bank_factors import basis_of
from repa.trainer.sampling.bank_file import read_bank, rows_read, write_bank
from repa.trainer.sampling.sampler import sample
from repa.trainer.sampling.settings import SamplerConfig
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_tensors

FLOW = Flow(FlowConfig())


def silent(count: int) -> None:
    del count


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, torch.Tensor]:
    with np.load(shared / "golden" / "gmem.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file}


@pytest.fixture(scope="module")
def backbone(shared: Path) -> SiT:
    config = SiTConfig(depth=4, width=48, heads=4, patch_size=2, input_size=16)
    network = SiT(config, ClassTokenConditioner("t/cls", 24, 48)).double().eval()
    state = load_tensors(shared / "golden" / "gmem.safetensors")
    others = ("projectors.", "lightningdit.")
    network.load_state_dict({key: value for key, value in state.items() if not key.startswith(others)})
    return network


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sde_heun", {"solver": "sde-heun", "steps": 7}),
        ("sde_heun_cfg", {"solver": "sde-heun", "steps": 7, "guidance": 7.75, "interval": (0.0, 0.11)}),
        ("ode_euler", {"solver": "euler", "steps": 6, "shift": 0.3}),
    ],
)
def test_golden_samples(
    golden: dict[str, torch.Tensor], backbone: SiT, name: str, settings: dict[str, Any]
) -> None:
    times: list[float] = []
    forward = backbone.forward

    def counted(x: torch.Tensor, t: torch.Tensor, *others: Any) -> Any:
        times.append(t[0].item())
        return forward(x, t, *others)

    conditioner = backbone.y_embedder
    assert isinstance(conditioner, ClassTokenConditioner)
    backbone.forward = counted  # type: ignore[method-assign]
    try:
        samples = sample(
            backbone,
            FLOW,
            golden["sample_noise"],
            conditioner.whole(golden["bank"][golden["sample_rows"]]),
            SamplerConfig(**settings),
            noises=golden["sde_noise"],
        )
    finally:
        del backbone.forward  # type: ignore[method-assign]
    torch.testing.assert_close(samples, golden[name], rtol=0, atol=1e-9)
    wanted = golden["ode_t"][:-1] if name == "ode_euler" else golden["sde_t"]
    torch.testing.assert_close(torch.tensor(times, dtype=torch.float64), wanted, rtol=0, atol=1e-12)


def test_golden_decomposition(golden: dict[str, torch.Tensor]) -> None:
    bank = golden["bank"].numpy()
    rank = int(golden["svd_rank"])
    close = np.testing.assert_allclose
    for slab_rows in (len(bank), 3, 1):
        slabs = [bank[first : first + slab_rows] for first in range(0, len(bank), slab_rows)]
        basis = basis_of(lambda slabs=slabs: slabs, rank)  # type: ignore[misc]
        close(basis.singular_values, golden["svd_singular_values"], rtol=0, atol=1e-9)
        close(basis.decoded(basis.encoded(bank)), golden["svd_decoded"], rtol=0, atol=1e-9)
    new = golden["svd_new"].numpy()[None]
    close(basis.decoded(basis.encoded(new))[0], golden["svd_new_decoded"], rtol=0, atol=1e-9)
    i, j = golden["interpolate_pair"].tolist()
    # the released bank's alpha is the share of the first
    share = 1 - float(golden["interpolate_alpha"])
    rows = basis.encoded(bank)
    close((1 - share) * bank[i] + share * bank[j], golden["interpolated_full"], rtol=0, atol=1e-9)
    mixture = (1 - share) * rows[i] + share * rows[j]
    close(basis.decoded(mixture[None])[0], golden["interpolated_svd"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", MIXTURES)
def test_golden_mixtures(golden: dict[str, torch.Tensor], kind: str) -> None:
    first, second = golden["path_ends"]
    released = torch.full((6,), 0.5, dtype=torch.float64)
    alphas = released if kind in ("concat", "mask") else golden["path_alphas"]
    coins = torch.where(golden["path_mask_takes_first"], 0.75, 0.25).double()
    found = mixed(kind, first, second, alphas, coins)
    torch.testing.assert_close(found, golden[f"path_{kind}"], rtol=0, atol=1e-9)
    assert set(default_alphas(kind)) == set(alphas.tolist())


def test_golden_rows_of_the_noise(golden: dict[str, torch.Tensor]) -> None:
    assert torch.equal(rows_of_noise(golden["rows_noise"], golden["freq"]), golden["rows_from_noise"])


@given(
    kind=st.sampled_from(MIXTURES),
    seed=st.integers(0, 100),
    scale=st.floats(0.01, 100),
    width=st.integers(2, 9),
)
def test_alpha_is_the_share_of_the_second(kind: str, seed: int, scale: float, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, width, generator=generator, dtype=torch.float64)
    coins = torch.rand(2, width, generator=generator, dtype=torch.float64)
    found = mixed(kind, scale * a, b, torch.tensor([0.0, 1.0]), coins)
    torch.testing.assert_close(found, torch.stack([a / a.norm(), b / b.norm()]))


@given(alpha=st.floats(0, 1), kind=st.sampled_from(MIXTURES))
def test_a_mixture_of_a_vector_with_itself_is_the_vector(alpha: float, kind: str) -> None:
    a = torch.tensor([3.0, -4.0, 0.0], dtype=torch.float64)
    found = mixed(kind, a, a, torch.tensor([alpha]), torch.full((1, 3), 0.5, dtype=torch.float64))
    torch.testing.assert_close(found[0], a / 5)


def test_rows_by_noise_are_as_frequent_as_their_weights() -> None:
    noise = torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([1.0, 0.0, 3.0])
    shares = torch.bincount(rows_of_noise(noise, weights), minlength=3) / len(noise)
    torch.testing.assert_close(shares, weights / 4, rtol=0, atol=0.01)
    assert rows_of_noise(torch.full((1, 4), 1e3), weights).tolist() == [2]


def test_rows_are_drawn_uniformly_with_replacement() -> None:
    class Few:
        def __len__(self) -> int:
            return 4

        def vectors(self, rows: torch.Tensor) -> torch.Tensor:
            return torch.eye(4)[rows]

    conditioner = ClassTokenConditioner("t/cls", 4, 3)
    with pytest.raises(RepaError) as caught:
        conditioner.sampling(2, torch.Generator())
    assert caught.value.field == "--bank"
    conditioner.bank = Few()
    drawn = conditioner.sampling(8_000, torch.Generator().manual_seed(0)).argmax(dim=1)
    torch.testing.assert_close(torch.bincount(drawn) / 8_000, torch.full((4,), 0.25), rtol=0, atol=0.02)


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 rows of which two have no image."""
    path = tmp_path_factory.mktemp("bank") / "cache"
    synthetic_cache(path, num_rows=40, invalid={0: "damaged", 5: "damaged"})
    return path


def test_a_cache_is_a_bank(cached: Path) -> None:
    bank = open_cache_bank(cached, "demo/cls")
    with CacheReader(cached, ("demo/cls",)) as reader:
        valid = reader.valid_rows
        values = np.empty((38, *reader.manifest.columns["demo/cls"].shape), np.float16)
        reader.read_rows(valid, ("demo/cls",), {"demo/cls": values})
    assert len(bank) == 38
    asked = torch.tensor([37, 0, 4, 4])
    assert torch.equal(bank.vectors(asked), torch.from_numpy(values).float()[asked])
    assert [bank.position_of(row) for row in (1, 4, 6)] == [0, 3, 4]
    for row in (0, 5, 40, 10**19):
        with pytest.raises(RepaError) as caught:
            bank.position_of(row)
        assert caught.value.field == "--like"


def test_a_whole_file_says_and_holds_what_the_cache_does(cached: Path, tmp_path: Path) -> None:
    bank = open_cache_bank(cached, "")
    written = write_bank(tmp_path / "a" / "bank.safetensors", bank, None, silent)
    again = read_bank(tmp_path / "a" / "bank.safetensors")
    assert isinstance(again, WholeBank)
    assert again.said == written.said == bank.said
    assert again.said.digest == bank.said.digest
    assert "rounded" not in bank.said.document()
    every = torch.arange(38)
    assert torch.equal(again.vectors(every), bank.vectors(every))
    assert np.array_equal(again.rows, bank.rows)
    assert [each.name for each in (tmp_path / "a").iterdir()] == ["bank.safetensors"]


@pytest.mark.parametrize("rank", [None, 5])
def test_a_file_is_the_same_however_many_rows_are_in_memory(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int | None
) -> None:
    bank = open_cache_bank(cached, "demo/cls")
    write_bank(tmp_path / "whole", bank, rank, silent)
    held, read = [], []
    vectors = CacheBank.vectors

    def counted(self: CacheBank, rows: torch.Tensor) -> torch.Tensor:
        held.append(len(rows))
        return vectors(self, rows)

    monkeypatch.setattr(CacheBank, "vectors", counted)
    monkeypatch.setattr(bank_file, "SLAB_ROWS", 7)
    write_bank(tmp_path / "parts", bank, rank, read.append)
    assert max(held) == 7
    assert sum(held) == sum(read) == rows_read(bank, rank) == 38 * (1 if rank is None else 2)
    one, two = (load_file(tmp_path / name) for name in ("whole", "parts"))
    for name, array in one.items():
        np.testing.assert_allclose(two[name], array, rtol=1e-3 if name == "coefficients" else 1e-5, atol=1e-6)
    assert rank is not None or (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes()


def test_a_copy_that_was_rounded_is_another_bank(tmp_path: Path) -> None:
    spec = ColumnSpec(shape=(4,), dtype="float32")
    synthetic_cache(tmp_path / "cache", num_rows=6, columns={**SYNTHETIC_COLUMNS, "demo/cls": spec})
    bank = open_cache_bank(tmp_path / "cache", "demo/cls")
    write_bank(tmp_path / "bank", bank, None, silent)
    copy = read_bank(tmp_path / "bank")
    every = torch.arange(6)
    assert not torch.equal(copy.vectors(every), bank.vectors(every))
    assert torch.equal(copy.vectors(every), bank.vectors(every).half().float())
    assert copy.said == replace(bank.said, rounded=True)
    assert copy.said.digest != bank.said.digest


def test_a_factored_file_says_how_far_it_is(cached: Path, tmp_path: Path) -> None:
    bank = open_cache_bank(cached, "demo/cls")
    every = torch.arange(38)
    exact = bank.vectors(every).double()
    errors = []
    for rank in (2, 8, 16):
        write_bank(tmp_path / "bank.safetensors", bank, rank, silent)
        again = read_bank(tmp_path / "bank.safetensors")
        assert isinstance(again, FactoredBank)
        found = again.vectors(every).double()
        said = again.said.factored
        assert said is not None
        assert said.rank == rank
        cosines = 1 - torch.cosine_similarity(exact, found)
        assert said.cosine_mean == pytest.approx(cosines.mean().item(), abs=1e-6)
        assert said.cosine_most == pytest.approx(cosines.max().item(), abs=1e-6)
        around = (exact - exact.mean(dim=0)).norm()
        assert said.relative == pytest.approx(((exact - found).norm() / around).item(), abs=1e-5)
        assert again.said.digest != bank.said.digest
        errors.append(said.relative)
    assert errors[0] > errors[1] > errors[2]
    # all 16 channels: what is left is the rounding of float16
    assert errors[2] < 1e-3


def test_a_direction_without_rows_has_no_coefficient() -> None:
    values = np.zeros((5, 3))
    values[:, 0] = range(5)
    basis = basis_of(lambda: [values], 3)
    coefficients = basis.encoded(values)
    assert np.isfinite(coefficients).all()
    np.testing.assert_allclose(basis.decoded(coefficients), values, atol=1e-12)


def test_a_second_view_is_another_bank(tmp_path: Path) -> None:
    synthetic_cache(tmp_path / "cache", num_rows=6, views=("original", "flip"))
    one, two = (open_cache_bank(tmp_path / "cache", "demo/cls", view) for view in ("", "flip"))
    assert (one.said.view, two.said.view) == ("original", "flip")
    assert not torch.equal(one.vectors(torch.arange(6)), two.vectors(torch.arange(6)))
    with pytest.raises(RepaError) as caught:
        open_cache_bank(tmp_path / "cache", "demo/cls", "mirrored")
    assert caught.value.field == "--view"


def test_which_column_must_be_said_where_there_are_several(tmp_path: Path) -> None:
    spec = ColumnSpec(shape=(4,), dtype="float16")
    synthetic_cache(tmp_path / "two", num_rows=6, columns={**SYNTHETIC_COLUMNS, "other/cls": spec})
    moments = {name: each for name, each in SYNTHETIC_COLUMNS.items() if name.endswith("moments")}
    synthetic_cache(tmp_path / "none", num_rows=6, columns=moments)
    for name in ("two", "none"):
        with pytest.raises(RepaError) as caught:
            open_cache_bank(tmp_path / name, "")
        assert caught.value.field == "--encoder"
    assert open_cache_bank(tmp_path / "two", "other/cls").width == 4
    with pytest.raises(CacheError):
        open_cache_bank(tmp_path / "two", "third/cls")


@pytest.mark.parametrize("rank", [None, 2])
def test_what_float16_cannot_hold_is_refused(tmp_path: Path, rank: int | None) -> None:
    spec = ColumnSpec(shape=(4,), dtype="float32")
    synthetic_cache(tmp_path / "cache", num_rows=6, columns={**SYNTHETIC_COLUMNS, "demo/cls": spec})
    bank = open_cache_bank(tmp_path / "cache", "demo/cls")

    class Large(CacheBank):
        def _vectors(self, rows: Any) -> Any:
            found = super()._vectors(rows)
            found[rows == 3] = 1e6
            return found

    bank.__class__ = Large
    with pytest.raises(RepaError) as caught:
        write_bank(tmp_path / "out" / "bank", bank, rank, silent)
    assert caught.value.field == "demo/cls"
    assert "row 3" in caught.value.what
    assert not list((tmp_path / "out").glob("*"))


@pytest.fixture
def written(cached: Path, tmp_path: Path) -> Path:
    bank = open_cache_bank(cached, "demo/cls")
    write_bank(tmp_path / "bank.safetensors", bank, 4, silent)
    return tmp_path / "bank.safetensors"


def damaged(file: Path, arrays: dict[str, Any] | None = None, **said: Any) -> Path:
    """Write a file again with other arrays or other words; None takes one out."""
    from safetensors import safe_open

    with safe_open(file, framework="np") as opened:
        document = json.loads(opened.metadata()["repa_bank"])
    kept = {**load_file(file), **(arrays or {})}
    document |= said
    kept = {name: value for name, value in kept.items() if value is not None}
    save_file(kept, file, metadata={"repa_bank": json.dumps(document)})
    return file


@pytest.mark.parametrize(
    "change",
    [
        {"arrays": {"mean": None}},
        {"arrays": {"mean": np.zeros(3, np.float32)}},
        {"arrays": {"basis": np.zeros((16, 5), np.float32)}},
        {"arrays": {"coefficients": np.zeros((38, 4), np.float32)}},
        {"arrays": {"more": np.zeros(1)}},
        {"arrays": {"rows": np.arange(37)}},
        {"arrays": {"rows": np.zeros(38, np.int64)}},
        {"arrays": {"rows": np.arange(38) - 1}},
        {"arrays": {"rows": np.arange(38.0)}},
        {"count": 37},
        {"count": 0},
        {"count": "38"},
        {"version": 2},
        {"factored": None},
        {"factored": {"rank": 4}},
        {"teacher": {}},
        {"column": ""},
    ],
)
def test_a_damaged_file_is_refused(written: Path, change: dict[str, Any]) -> None:
    read_bank(damaged(written))
    with pytest.raises(RepaError) as caught:
        read_bank(damaged(written, **change))
    assert caught.value.remedy


def test_a_file_of_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no bank")
    save_file({"vectors": np.zeros((2, 2), np.float16)}, tmp_path / "arrays")
    for name in ("text", "arrays"):
        with pytest.raises(RepaError) as caught:
            read_bank(tmp_path / name)
        assert caught.value.field == "--bank"
    with pytest.raises(RepaError):
        read_bank(tmp_path / "none")
