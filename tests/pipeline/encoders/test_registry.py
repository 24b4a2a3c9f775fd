"""Teachers outside the table: any ViT of timm, the example of the documentation, and what is refused."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import timm
import torch
from repa.commands.preprocess import PreprocessFlags, make_config, preprocess
from repa.data import outside
from repa.data.errors import RepaError
from repa.data.format.opening import open_manifest
from repa.pipeline.encoders import load_encoder, registry
from repa.pipeline.encoders.registry import find_teacher
from repa.pipeline.encoders.teachers import TEACHERS
from repa.pipeline.encoders.timm_teacher import TimmTeacher
from repa.pipeline.plan import make_plan
from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = Path(__file__).parents[3] / "docs" / "extending" / "teacher.md"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the module that the documentation prints."""
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(example.strip().splitlines()) <= 40
    (tmp_path / "my_teachers.py").write_text(example, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(outside, "_imported", {})
    monkeypatch.setattr(registry, "_found", {})
    importlib.invalidate_caches()
    yield tmp_path
    sys.modules.pop("my_teachers", None)


@pytest.mark.parametrize("name", ["dinov2-b", "dinov2-s-reg", "dinov3-s", "mae-l", "clip-l", "siglip2-b"])
def test_timm_says_of_known_teachers_what_the_table_says(name: str) -> None:
    known = TEACHERS[name]
    found = find_teacher(f"timm:{known.timm_name}")
    assert isinstance(found, TimmTeacher)
    assert found.name == f"timm-{known.timm_name}"
    facts = ("timm_name", "patch_size", "width", "depth", "heads", "prefix_tokens", "normalisation")
    assert [getattr(found, each) for each in facts] == [getattr(known, each) for each in facts]
    assert (found.class_feature, found.patch_feature) == (known.class_feature, "final norm")
    assert find_teacher(found.name) is found


def test_a_name_without_a_tag_is_that_of_timms_own_choice() -> None:
    found = find_teacher("timm:vit_tiny_patch16_224")
    assert found.name == f"timm-vit_tiny_patch16_224.{timm.get_pretrained_cfg('vit_tiny_patch16_224').tag}"


def test_features_are_those_of_timm() -> None:
    teacher = find_teacher("timm:vit_tiny_patch16_224.augreg_in21k")
    encoder = load_encoder(teacher, resolution=64, random_weights=True)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    features = encoder.encode(images, (2,))
    assert features["patch"].shape == (2, 16, 192)
    assert features["q"].shape == (2, 1, 3, 16, 64)
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0).eval()
    with torch.inference_mode():
        tokens = model.forward_features((images / 255 - 0.5) / 0.5)
    assert torch.allclose(features["cls"], tokens[:, 0], atol=1e-5)
    provenance = encoder.provenance(2)
    assert (provenance.model, provenance.mean) == ("vit_tiny_patch16_224.augreg_in21k", (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("name", "cls", "patch"),
    [
        ("vit_tiny_patch16_224.augreg_in21k", "token", "final norm"),
        ("beit_base_patch16_224.in22k_ft_in22k", "mean", "last block"),
        ("vit_base_patch16_siglip_gap_224.v2_webli", "mean", "final norm"),
    ],
)
def test_what_is_taken_as_class_feature(name: str, cls: str, patch: str) -> None:
    found = find_teacher(f"timm:{name}")
    assert isinstance(found, TimmTeacher)
    assert (found.class_feature, found.patch_feature) == (cls, patch)


@pytest.mark.parametrize(
    "name",
    [
        "timm:resnet18",
        "timm:swin_tiny_patch4_window7_224",
        "timm:vit_small_r26_s32_224",
        "timm:flexivit_small",
        "timm:vit_tinny_patch16_224",
        "timm:vit_tiny_patch16_224.no_such_tag",
        "timm:",
        "timm:hf-hub:someone/something",
        "timm:../vit",
        "dinov2",
        "no_such_module_here:Teacher",
    ],
)
def test_what_is_no_teacher_is_one_line(name: str) -> None:
    with pytest.raises(RepaError) as caught:
        find_teacher(name, may_import=True)
    assert caught.value.field == "--encoder"
    assert caught.value.remedy
    assert "\n" not in str(caught.value)


def test_the_example_of_the_documentation(place: Path) -> None:
    weights = place / "w.safetensors"
    facts = find_teacher("my_teachers:PatchNet", may_import=True)
    torch.manual_seed(3)
    save_file(facts.build().state_dict(), weights)  # type: ignore[attr-defined]
    flags = PreprocessFlags(
        data="demo",
        limit=12,
        cache=place / "cache",
        encoders=["demo", "my_teachers:PatchNet"],
        weights=[f"patchnet={weights}"],
        shard_rows=6,
    )
    preprocess(flags)
    manifest = open_manifest(place / "cache")
    assert manifest.columns["patchnet/patch"].shape == (16, 64)
    assert manifest.sources["patchnet"].model == "my_teachers:PatchNet"
    assert not manifest.sources["patchnet"].random_weights
    config = make_config(flags)
    assert (config.encoders, dict(config.outside)) == (
        ("demo", "patchnet"),
        {"patchnet": "my_teachers:PatchNet"},
    )
    assert make_plan(config).rows == 0
    with pytest.raises(RepaError) as caught:
        load_encoder(facts, resolution=64)
    assert caught.value.field == "--weights"


def test_attention_of_a_teacher_without_any(place: Path) -> None:
    flags = PreprocessFlags(
        data="demo", limit=4, cache=place / "c", encoders=["my_teachers:PatchNet"], attention="1"
    )
    with pytest.raises(RepaError) as caught:
        make_plan(make_config(flags))
    assert caught.value.field == "--attention"


def test_a_file_alone_imports_nothing(place: Path) -> None:
    del place
    with pytest.raises(RepaError) as caught:
        find_teacher("my_teachers:PatchNet")
    assert caught.value.field == "--encoder"
    assert "my_teachers" not in sys.modules


@pytest.mark.parametrize(
    "body",
    [
        "name = 'sd-vae'; width = 3",
        "name = 'demo'; width = 3",
        "name = 'A B'; width = 3",
        "name = 'x'; width = 0",
        "name = 'x'",
        "width = 3",
    ],
)
def test_classes_that_cannot_be_teachers(place: Path, body: str) -> None:
    (place / "my_teachers.py").write_text(
        "from repa.pipeline.encoders.base import OwnTeacher\n"
        f"class Mine(OwnTeacher):\n    {body}\n"
        "    def build(self): ...\n"
        "    def features(self, module, pixels): ...\n"
        "class Half(OwnTeacher):\n    name = 'half'\n"
    )
    for name in ("Mine", "Half", "OwnTeacher"):
        with pytest.raises(RepaError):
            find_teacher(f"my_teachers:{name}", may_import=True)


def test_features_of_another_shape_are_refused(place: Path) -> None:
    source = (place / "my_teachers.py").read_text()
    (place / "my_teachers.py").write_text(source.replace("tokens.mean(dim=1)", "tokens"))
    facts = find_teacher("my_teachers:PatchNet", may_import=True)
    encoder = load_encoder(facts, resolution=64, random_weights=True)
    with pytest.raises(RepaError) as caught:
        encoder.encode(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    assert caught.value.field == "--encoder"


def test_an_installed_package_offers_a_teacher(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = place / "mine-1.2.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.2\n")
    (installed / "entry_points.txt").write_text("[repa.encoders]\npatchnet = my_teachers:PatchNet\n")
    monkeypatch.syspath_prepend(str(place))
    assert find_teacher("patchnet").width == 64
