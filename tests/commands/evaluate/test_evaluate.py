"""`repa evaluate` as a function: equal figures by run and by file, interruptions, devices, and refusals."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from repa.commands.evaluate import run as evaluation_run
from repa.commands.evaluate.command import evaluate
from repa.commands.evaluate.flags import EvaluateFlags
from repa.commands.preprocess import PreprocessFlags, preprocess
from repa.commands.shared import features
from repa.commands.shared.features import compute_features
from repa.data.errors import RepaError
from repa.data.reading.reader import CacheReader
from repa.pipeline.encoders import load_encoder
from repa.trainer.config import build
from repa.trainer.evaluation import feature_shards
from repa.trainer.evaluation.feature_shards import FeatureShards
from repa.trainer.evaluation.frechet import frechet_distance
from repa.trainer.evaluation.results import COLUMNS, read_evaluations
from repa.trainer.models.sit import SIT_SIZES, SiTSize
from repa.trainer.run.fit import fit
from repa.trainer.run.metrics import read_metrics
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Iterator

NUM = 40
QUICK = {"num": NUM, "steps": 1, "guidance": 1.5, "seed": 3}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of two steps on a cache of 24 of the demo's images, with its autoencoder and teacher."""
    folder = tmp_path_factory.mktemp("evaluate")
    preprocess(PreprocessFlags(data="demo", limit=24, cache=folder / "cache"), console=quiet())
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIT_SIZES, "T", SiTSize(depth=2, width=48, heads=3))
        values = {
            "cache": str(folder / "cache"),
            "model": "SiT-T/2",
            "method": "none",
            "max_steps": 2,
            "batch_size": 4,
            "lr": 1e-2,
            "ema_decay": 0.5,
            "log_every": 1,
            "preview_every": 0,
            "checkpoint_every": 1,
        }
        fit(build(flags=values), folder / "run", console=quiet())
        yield folder / "run"
    torch.set_num_threads(before)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def evaluated(out: Path, **options: Any) -> tuple[dict[str, float], str]:
    """The figures of the last evaluation, and what was printed."""
    printed = io.StringIO()
    evaluate(EvaluateFlags(out=out, **options), console=Console(file=printed, width=200))
    figures = read_evaluations(out)[-1].figures
    return {figure.metric: figure.value for figure in figures}, printed.getvalue()


def shards_in(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.rglob("*.safetensors"))}


@pytest.fixture(scope="module")
def whole(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an evaluation that nothing disturbed, its samples kept."""
    out = tmp_path_factory.mktemp("whole")
    evaluated(out, run=run, metrics="fd,precision,kid_all", keep_samples=True, **QUICK)
    return out


def kept(whole: Path) -> Path:
    (found,) = whole.rglob("samples.npz")
    return found


def test_a_file_has_the_figures_of_its_run_to_the_last_digit(run: Path, whole: Path, tmp_path: Path) -> None:
    cache = str(run.parent / "cache")
    of_file, printed = evaluated(
        tmp_path, samples=kept(whole), reference=cache, metrics="fd,precision,kid_all"
    )
    assert of_file == {figure.metric: figure.value for figure in read_evaluations(whole)[-1].figures}
    assert set(of_file) == {"fd/demo", "precision/demo", "recall/demo", "kid_all/demo"}
    assert "not comparable with published FD-DINOv2" in printed
    assert "40 samples span at most 39" in printed


def test_the_figure_is_that_of_images_encoded_alone(run: Path, whole: Path) -> None:
    """The distance of the samples' class vectors to the cache's column, by the teacher itself."""
    with np.load(kept(whole)) as arrays:
        images = torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2).contiguous()
    vectors = load_encoder("demo", resolution=64).encode(images)["cls"].numpy()
    with CacheReader(run.parent / "cache", ("demo/cls",)) as reader:
        real = np.empty((24, vectors.shape[1]), np.float16)
        reader.read_rows(reader.valid_rows, ("demo/cls",), {"demo/cls": real.reshape(24, -1)})
    found = {figure.metric: figure for figure in read_evaluations(whole)[-1].figures}
    assert found["fd/demo"].value == pytest.approx(frechet_distance(vectors, real), rel=1e-5)
    assert (found["fd/demo"].n, found["fd/demo"].m, found["fd/demo"].k) == (NUM, 24, None)
    assert (found["precision/demo"].m, found["precision/demo"].k) == (24, 3)


def test_a_rank_without_a_gpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "GROUP_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RepaError) as caught:
        evaluation_run.run_evaluation(EvaluateFlags(out=tmp_path, samples=tmp_path), quiet())
    assert caught.value.field == "--devices"


def test_devices_and_threads_change_no_byte(
    run: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dealt: list[tuple[tuple[int, ...], int]] = []

    def in_turn(do: Any, jobs: Any, report: Any, *, what: str) -> None:
        assert (do, what) == (compute_features, "evaluation")
        for job in reversed(jobs):
            dealt.append((job.batches, job.threads))
            do(job, report)

    monkeypatch.setattr(evaluation_run, "in_processes", in_turn)
    monkeypatch.setattr(evaluation_run, "check_devices", lambda *_: None)
    monkeypatch.setattr(evaluation_run, "usable_cores", lambda: 6)
    evaluated(tmp_path, run=run, devices=2, **QUICK)
    assert dealt == [((32,), 3), ((0,), 3)]
    assert shards_in(tmp_path) == shards_in(whole)


def test_each_rank_of_torchrun_makes_its_share(
    run: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
    for rank in (1, 0):
        for name, value in zip(names, (rank, 2, rank, 2, 0), strict=True):
            monkeypatch.setenv(name, str(value))
        if rank:
            evaluate(EvaluateFlags(out=tmp_path, run=run, **QUICK), console=quiet())
            assert list(shards_in(tmp_path)) == ["00000032.safetensors"]
            assert not read_evaluations(tmp_path)
        else:
            found, _ = evaluated(tmp_path, run=run, **QUICK)
    assert shards_in(tmp_path) == shards_in(whole)
    assert found["fd/demo"] == read_evaluations(whole)[-1].figures[0].value


class Killed(BaseException):
    """Stands for SIGKILL."""


def test_a_killed_evaluation_goes_on_to_the_same_bytes(
    run: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    write = FeatureShards.write

    def counted(self: FeatureShards, first: int, *rest: Any) -> None:
        if first and not written[1:]:
            raise Killed
        write(self, first, *rest)
        written.append(first)

    monkeypatch.setattr(FeatureShards, "write", counted)
    monkeypatch.setattr(evaluation_run, "usable_cores", lambda: 1)
    with pytest.raises(Killed):
        evaluate(EvaluateFlags(out=tmp_path, run=run, **QUICK), console=quiet())
    assert list(shards_in(tmp_path)) == ["00000000.safetensors"]
    monkeypatch.setattr(FeatureShards, "write", lambda *each: (written.append(each[1]), write(*each)))
    _, printed = evaluated(tmp_path, run=run, **QUICK)
    assert written == [0, 32]
    assert "32 of 40 images are measured already" in printed
    assert shards_in(tmp_path) == shards_in(whole)
    # a shard that was damaged since is computed again, and another metric needs no sample more
    (damaged,) = tmp_path.rglob("00000000.safetensors")
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    evaluated(tmp_path, run=run, metrics="vendi", **QUICK)
    assert written == [0, 32, 0]
    evaluated(tmp_path, run=run, metrics="vendi", **QUICK)
    assert written == [0, 32, 0]
    assert shards_in(tmp_path) == shards_in(whole)


def test_what_is_written_says_all_that_figures_depend_on(run: Path, whole: Path, tmp_path: Path) -> None:
    document = json.loads((whole / "evaluation.json").read_text())["evaluations"]
    assert len(document) == 1
    with (whole / "evaluation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [row["metric"] for row in rows] == [each["metric"] for each in document[0]["figures"]]
    first = rows[0]
    assert (first["N"], first["M"], first["seed"], first["labels"]) == ("40", "24", "3", "balanced")
    assert (first["solver"], first["steps"], first["guidance"], first["interval"]) == (
        "euler",
        "1",
        "1.5",
        "0-1",
    )
    assert (first["weights"], first["step"], first["images_seen"]) == ("ema", "2", "8")
    assert float(first["device_hours"]) > 0
    assert float(first["value"]) == document[0]["figures"][0]["value"]
    for name in ("decoder_sha256", "network_sha256", "reference_sha256", "samples_sha256"):
        assert len(first[name]) == 64
    # another number of samples is another evaluation, the same again replaces itself
    for num in (4, 3, 3):
        evaluated(tmp_path, run=run, **{**QUICK, "num": num})
    assert [each.samples.num for each in read_evaluations(tmp_path)] == [4, 3]


def test_steps_labels_and_weights_choose_other_samples(run: Path, tmp_path: Path) -> None:
    few = {**QUICK, "num": 6}
    newest, _ = evaluated(tmp_path / "newest", run=run, **few)
    for number, options in enumerate(({"step": 1}, {"labels": "random"}, {"weights": "model"})):
        found, _ = evaluated(tmp_path / str(number), run=run, **{**few, **options})
        assert found["fd/demo"] != newest["fd/demo"], options
    by_file, _ = evaluated(tmp_path / "file", checkpoint=run / "checkpoints" / "step-00000002.ckpt", **few)
    assert by_file == newest


def test_a_folder_of_images_is_a_reference(run: Path, whole: Path, tmp_path: Path) -> None:
    """Its images are encoded as they are, so samples that are the reference have a distance of 0."""
    with np.load(kept(whole)) as arrays:
        for number, image in enumerate(arrays["arr_0"]):
            (tmp_path / "images").mkdir(exist_ok=True)
            Image.fromarray(image).save(tmp_path / "images" / f"{number:03d}.png")
    found, printed = evaluated(
        tmp_path / "out",
        samples=tmp_path / "images",
        reference=str(tmp_path / "images"),
        metrics="fd/demo,coverage/demo,kid_all/demo",
        bootstrap=2,
    )
    assert found["fd/demo"] == pytest.approx(0, abs=1e-6)
    assert found["coverage/demo"] == 1
    assert "coverage/demo" in printed
    figures = {figure.metric: figure for figure in read_evaluations(tmp_path / "out")[-1].figures}
    spread = figures["fd/demo"].spread
    assert spread is not None
    assert spread > 0


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def noise(*shape: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def bad_samples(folder: Path, name: str) -> dict[str, Any]:
    """Flags of samples that are refused."""
    file = folder / "x.npz"
    if name == "absent":
        return {"samples": folder / "absent.npz"}
    if name == "not an archive":
        file.write_bytes(b"PK no")
        return {"samples": file}
    if name == "one twice":
        images = noise(8, 64, 64, 3)
        images[5] = images[2]
        return {"samples": npz(file, arr_0=images)}
    if name == "broken png":
        (folder / "a.png").write_bytes(b"\x89PNG\r\n")
        return {"samples": folder}
    if name == "two sizes":
        for number, side in enumerate((64, 32)):
            Image.fromarray(noise(side, side, 3)).save(folder / f"{number}.png")
        return {"samples": folder}
    if name == "grey png":
        Image.fromarray(noise(64, 64)).save(folder / "a.png")
        return {"samples": folder}
    if name == "empty folder":
        return {"samples": folder}
    if name == "pickled":
        np.savez(file, arr_0=np.array([{}, {}], dtype=object))
        return {"samples": file}
    arrays = {
        "fewer": noise(8, 64, 64, 3),
        "grey": noise(8, 64, 64),
        "grey channel": noise(8, 64, 64, 1),
        "floats": noise(8, 64, 64, 3) / 255,
        "channels first": noise(8, 3, 64, 64),
        "not square": noise(8, 64, 32, 3),
        "other size": noise(8, 32, 32, 3),
        "one image": noise(1, 64, 64, 3),
    }
    options: dict[str, Any] = {"num": 9} if name == "fewer" else {}
    return {"samples": npz(file, arr_0=arrays[name]), **options}


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("absent", "--samples"),
        ("not an archive", "--samples"),
        ("one twice", "--samples"),
        ("broken png", "--samples"),
        ("two sizes", "--samples"),
        ("grey png", "--samples"),
        ("empty folder", "--samples"),
        ("pickled", ""),
        ("fewer", "--samples"),
        ("grey", "--samples"),
        ("grey channel", "--samples"),
        ("floats", "--samples"),
        ("channels first", "--samples"),
        ("not square", "--samples"),
        ("other size", "--reference"),
        ("one image", "--num"),
    ],
)
def test_bad_samples_are_refused(run: Path, tmp_path: Path, name: str, field: str) -> None:
    (tmp_path / "in").mkdir()
    flags = bad_samples(tmp_path / "in", name)
    with pytest.raises(RepaError) as caught:
        evaluated(tmp_path / "out", reference=str(run.parent / "cache"), **flags)
    assert caught.value.field == field
    assert caught.value.remedy
    assert len(caught.value.lines) == 1
    assert not (tmp_path / "out" / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({}, "--run"),
        ({"run": Path("a"), "checkpoint": Path("b")}, "--ckpt"),
        ({"step": 3}, "--step"),
        ({"step": 1, "checkpoint": Path("b")}, "--step"),
        ({"samples": Path("a"), "guidance": 2.0}, "--guidance"),
        ({"samples": Path("a"), "keep_samples": True}, "--keep-samples"),
        ({"labels": "sorted"}, "--labels"),
        ({"metrics": "fidd"}, "--metrics"),
        ({"metrics": "fid"}, "--reference"),
        ({"metrics": "fid/demo"}, "--metrics"),
        ({"metrics": "kid"}, "--metrics"),
        ({"metrics": "fd/"}, "--metrics"),
        ({"metrics": ","}, "--metrics"),
        ({"metrics": "fd/dinov2-b"}, "--reference"),
        ({"reference": "nowhere"}, "--reference"),
        ({"inception": Path("x.pth")}, "--inception"),
        ({"encoder_weights": ["mae-l=x.pth"]}, "--encoder-weights"),
        ({"encoder_weights": ["mae-l"]}, "--encoder-weights"),
        ({"bootstrap": 1}, "--bootstrap"),
        ({"num": 1}, "--num"),
    ],
)
def test_flags_that_ask_for_nothing_sound(
    run: Path, tmp_path: Path, options: dict[str, Any], field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("computed although the flags are wrong")

    monkeypatch.setattr(evaluation_run, "compute_features", never)
    named = {} if {"checkpoint", "samples"} & set(options) or field == "--run" else {"run": run}
    with pytest.raises(RepaError) as caught:
        evaluated(tmp_path, **{**named, "num": NUM, **options} if "samples" not in options else options)
    assert caught.value.field == field
    assert caught.value.remedy
    assert not list(tmp_path.iterdir())


def test_features_that_are_not_finite_are_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = features.EncoderFeatures.features

    def broken(self: Any, images: torch.Tensor) -> dict[str, torch.Tensor]:
        found = encode(self, images).copy()
        found["pool"] = found["pool"].clone()
        found["pool"][3, 1] = float("inf")
        return found

    monkeypatch.setattr(features.EncoderFeatures, "features", broken)
    file = npz(tmp_path / "x.npz", arr_0=noise(8, 64, 64, 3))
    with pytest.raises(RepaError) as caught:
        evaluated(tmp_path / "out", samples=file, reference=str(run.parent / "cache"))
    assert "image 3" in caught.value.what


def test_other_weights_than_the_caches_are_refused(run: Path, tmp_path: Path) -> None:
    from repa.pipeline.demo import TEACHER_WEIGHTS
    from safetensors.torch import load_file, save_file

    state = load_file(TEACHER_WEIGHTS)
    name = next(iter(state))
    state[name] = state[name] + 1
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(RepaError) as caught:
        evaluated(tmp_path, run=run, encoder_weights=[f"demo={tmp_path / 'other.safetensors'}"], **QUICK)
    assert caught.value.field == "--encoder-weights"


def test_warnings(run: Path, tmp_path: Path) -> None:
    """JPEG files are measured with a word, and so is what stands class by class for ADM's splits."""
    for number in range(4):
        (tmp_path / "in" / str(number // 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(64, 64, 3) + np.uint8(number)).save(
            tmp_path / "in" / str(number // 2) / f"{number}.jpg"
        )
    _, printed = evaluated(
        tmp_path / "out", samples=tmp_path / "in", reference=str(run.parent / "cache"), metrics="fd"
    )
    assert "4 of the samples are JPEG files" in printed
    assert feature_shards.BATCH == 32


def trained(run: Path, folder: Path, *settings: str, weights: list[str] | None = None) -> Any:
    """The metrics of a run of two steps with evaluations, and the folder it is in."""
    from repa.commands.train import TrainFlags, train

    small = ("log_every=1", "preview_every=0", "checkpoint_every=1", "ema_decay=0.5", "precision=32-true")
    flags = TrainFlags(
        cache=str(run.parent / "cache"),
        run=folder,
        method="none",
        model="SiT-T/2",
        max_steps=2,
        batch_size=4,
        lr=1e-2,
        assignments=[*small, "evaluate_every=2", "evaluate_steps=1", *settings],
        weights=weights,
    )
    train(flags, console=quiet())
    return read_metrics(folder / "metrics.csv")


def test_the_same_figure_while_training(run: Path, tmp_path: Path) -> None:
    settings = ("evaluate_num=34", "evaluate_guidance=1.5", "evaluate_shift=0.5")
    rows = trained(run, tmp_path / "run", *settings)
    assert "fd/demo@34" not in rows[0]
    found, _ = evaluated(
        tmp_path / "out", run=tmp_path / "run", **{**QUICK, "num": 34, "seed": 0, "shift": 0.5}
    )
    assert rows[1]["fd/demo@34"] == pytest.approx(found["fd/demo"], rel=1e-8)  # nine digits are kept


def test_evaluations_that_cannot_be_are_refused_before_a_step(run: Path, tmp_path: Path) -> None:
    for settings, field in (
        (("evaluate_metrics=fid",), "evaluate_metrics"),
        (("evaluate_metrics=fd/mae-l",), "evaluate_metrics"),
        (("evaluate_metrics=kid", "evaluate_num=10"), "evaluate_metrics"),
        (("evaluate_num=1",), "evaluate_num"),
    ):
        with pytest.raises(RepaError) as caught:
            trained(run, tmp_path / "run", *settings)
        assert caught.value.field == field
    with pytest.raises(RepaError) as caught:
        trained(run, tmp_path / "run", weights=["demo=nowhere.safetensors"])
    assert not (tmp_path / "run").exists()


def test_training_goes_on_where_samples_have_no_figure(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("repa.trainer.run.evaluations.repeated", lambda _: (0, 1))
    rows = trained(run, tmp_path / "run", "evaluate_num=4")
    assert [row["step"] for row in rows] == [1, 2]
    assert "fd/demo@4" not in rows[1]
