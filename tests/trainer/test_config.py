"""Settings: typed from text, refused with the key, written and read back as they are."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from repa.data.errors import RepaError
from repa.trainer.config import TrainConfig, build, differences, load_yaml
from repa.trainer.methods.base import MethodConfig
from repa.trainer.methods.repa import RepaConfig
from repa.trainer.objectives.flow import FlowConfig
from repa.trainer.typed import coerce

if TYPE_CHECKING:
    from pathlib import Path


def test_defaults_are_those_of_the_paper() -> None:
    config = TrainConfig()
    assert (config.lr, config.betas, config.weight_decay) == (1e-4, (0.9, 0.999), 0.0)
    assert (config.batch_size, config.clip, config.ema_decay) == (256, 1.0, 0.9999)
    assert (config.max_steps, config.objective) == (400_000, FlowConfig(path="linear", times="uniform"))
    assert config.method == RepaConfig()
    assert config.default_run_name == "repa-SiT-B-2"


def test_later_sources_win() -> None:
    base = {"lr": 3e-4, "seed": 4, "method": {"name": "repa", "weight": 0.25, "depth": 3}}
    config = build(base, {"seed": 5, "model": None}, ["method.weight=0.75"])
    assert (config.lr, config.seed, config.model) == (3e-4, 5, "SiT-B/2")
    assert config.method == RepaConfig(weight=0.75, depth=3)


COMMANDS = ("pipe:touch owned", "pipe://touch owned", "{pipe:touch owned;,x}.tar", "{a,{b,pipe:x}}.tar")


@pytest.mark.parametrize("cache", COMMANDS)
def test_a_command_is_run_from_the_command_line_alone(cache: str) -> None:
    with pytest.raises(RepaError) as caught:
        build({"cache": cache}, {"seed": 1}, ["lr=1e-4"])
    assert caught.value.field == "cache"
    assert "--cache" in caught.value.remedy
    assert build({"cache": cache}, {"cache": "other"}).cache == "other"
    assert build({"cache": cache}, {}, ["cache=other"]).cache == "other"
    assert build({"cache": "a"}, {"cache": cache}).cache == cache
    assert build({"cache": "a"}, {}, [f"cache={cache}"]).cache == cache


def test_a_cache_that_is_no_command_may_come_from_a_file() -> None:
    for cache in ("a/pipe:b", "t-{0..3}.tar", "s3://bucket/x", "http://host/{0..2}.tar", "pipes"):
        assert build({"cache": cache}).cache == cache


def test_another_method_forgets_the_settings_of_the_first() -> None:
    base = {"method": {"name": "repa", "weight": 0.25}}
    assert build(base, {"method": "none"}).method == MethodConfig()
    assert build(base, {"method": "repa"}).method == RepaConfig(weight=0.25)
    assert build({"method": "none"}).method_name == "none"


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("lr=2e-4", "lr", 2e-4),
        ("max_steps=4e5", "max_steps", 400_000),
        ("compile=yes", "compile", True),
        ("compile=False", "compile", False),
        ("clip=none", "clip", None),
        ("clip=0.5", "clip", 0.5),
        ("betas=0.9,0.95", "betas", (0.9, 0.95)),
        ("betas=[0.9, 0.95]", "betas", (0.9, 0.95)),
        ("path=cosine", "objective", FlowConfig(path="cosine")),
        ("times=lognormal", "objective", FlowConfig(times="lognormal")),
        ("objective.path=cosine", "objective", FlowConfig(path="cosine")),
        ("objective=flow", "objective", FlowConfig()),
        ("order=blocks", "order", "blocks"),
        ("direct=on", "direct", "on"),
        ("direct=auto", "direct", "auto"),
        ("check_crc=off", "check_crc", False),
        ("cache=a=b", "cache", "a=b"),
    ],
)
def test_assignments_are_typed(text: str, key: str, value: object) -> None:
    found = getattr(build(assignments=[text]), key)
    assert found == value
    assert type(found) is type(value)


def test_assignments_of_sections() -> None:
    config = build(
        assignments=[
            "method.encoders=dinov2-b,mae-l",
            "method.depth=none",
            "trainer.devices=2",
            "trainer.strategy=ddp",
            "trainer.deterministic=true",
        ]
    )
    assert config.method == RepaConfig(encoders=("dinov2-b", "mae-l"))
    assert config.trainer == {"devices": 2, "strategy": "ddp", "deterministic": True}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("lr=abc", ["lr=abc", "number"]),
        ("lr=nan", ["lr=nan", "number"]),
        ("lr=-1", ["lr=-1", "above 0"]),
        ("max_steps=1.5", ["max_steps=1.5", "integer"]),
        ("max_steps=inf", ["max_steps=inf", "integer"]),
        ("max_steps=0", ["max_steps=0", "at least 1"]),
        ("seed=-1", ["seed=-1", "at least 0"]),
        ("compile=maybe", ["compile=maybe", "true or false"]),
        ("precision=bf16", ["precision=bf16", "bf16-mixed"]),
        ("betas=0.9", ["betas=0.9", "(number, number)"]),
        ("betas=0.9,1.5", ["betas", "beta < 1"]),
        ("ema_decay=1", ["ema_decay", "< 1"]),
        ("clip=0", ["clip", "above 0"]),
        ("method.weight=much", ["method.weight=much", "number"]),
        ("wieght=1", ["unknown setting wieght", "method.weight"]),
        ("method.wieght=1", ["unknown setting method.wieght", "method.weight"]),
        ("bach_size=8", ["bach_size", "batch_size"]),
        ("trainer.device=2", ["trainer.device", "trainer.devices"]),
        ("trainer.max_steps=2", ["trainer.max_steps", "set max_steps"]),
        ("foo.bar=1", ["foo.bar"]),
        ("trainer=3", ["trainer=3", "trainer.key=value"]),
        ("lr", ["'lr'", "key=value"]),
        ("method=haste2", ["haste2", "did you mean haste"]),
    ],
)
def test_mistakes_name_key_value_and_remedy(text: str, parts: list[str]) -> None:
    with pytest.raises(RepaError) as caught:
        build(assignments=[text])
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_method_without_settings_says_so() -> None:
    with pytest.raises(RepaError, match=r"method\.weight; there are none"):
        build(flags={"method": "none"}, assignments=["method.weight=1"])


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = build(
        assignments=["method.encoders=a,b", "clip=none", "trainer.devices=[0,1]", "betas=0.8,0.9", "lr=1e-8"]
    )
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml(), encoding="utf-8")
    assert build(load_yaml(file)) == config
    assert next(iter(yaml.safe_load(config.to_yaml())["method"])) == "name"


def test_settings_of_the_objective_as_they_were_called_before() -> None:
    assert build({"path": "cosine", "times": "lognormal"}).objective == FlowConfig(
        path="cosine", times="lognormal"
    )
    # named later, it keeps them; and what the file says goes before the defaults, the flags before both
    assert build({"path": "cosine"}, {"objective": "flow"}).objective == FlowConfig(path="cosine")
    assert build({"path": "cosine"}, {"path": "linear"}).objective == FlowConfig()
    assert build({"objective": "flow", "path": "cosine"}).objective == FlowConfig(path="cosine")
    with pytest.raises(RepaError) as caught:
        build({"objective": "ddpm"})
    assert caught.value.field == "objective"
    with pytest.raises(RepaError, match=r"objective\.path"):
        build(assignments=["path=quadratic"])


@pytest.mark.parametrize(
    ("content", "part"), [("[1, 2]", "mapping"), ("a: [", "not YAML"), (None, "cannot read")]
)
def test_files_that_are_no_configuration(tmp_path: Path, content: str | None, part: str) -> None:
    file = tmp_path / "config.yaml"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(RepaError, match=part):
        load_yaml(file)


@pytest.mark.parametrize("values", [{"method": 3}, {"trainer": [1]}, {"lr": None}, {"max_steps": True}])
def test_yaml_values_of_another_type(values: dict[str, Any]) -> None:
    with pytest.raises(RepaError, match="is not valid: expected"):
        build(values)


def test_on_and_off_of_yaml_are_choices(tmp_path: Path) -> None:
    # YAML 1.1 reads these words as truth values
    file = tmp_path / "config.yaml"
    for word, expected in (("on", "on"), ("off", "off"), ("'on'", "on"), ("auto", "auto")):
        file.write_text(f"direct: {word}\n")
        assert build(load_yaml(file)).direct == expected


def test_configurations_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        TrainConfig().lr = 1.0  # type: ignore[misc]


def test_differences_are_those_that_change_what_is_computed() -> None:
    old = build(assignments=["method.weight=0.5", "lr=1e-4"])
    same = build(
        assignments=[
            "max_steps=9",
            "log_every=7",
            "checkpoint_every=3",
            "trainer.devices=2",
            "threads=5",
            "check_crc=off",
            "direct=on",
            "cache=x",
        ]
    )
    assert differences(old, same) == []
    assert differences(old, build(assignments=["method.weight=0.25", "lr=2e-4"])) == [
        "method.weight (0.5 → 0.25)",
        "lr (0.0001 → 0.0002)",
    ]
    assert differences(old, build(flags={"method": "none"}))[0] == "method.name (repa → none)"


def test_coerce_refuses_truth_values_as_numbers() -> None:
    for kind in (int, float):
        with pytest.raises(RepaError):
            coerce(True, kind, "key")
