"""Settings: typed from text, refused with the key, written and read back as they are."""

from __future__ import annotations

import os
from dataclasses import FrozenInstanceError
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from repa.data.errors import RepaError
from repa.trainer.config import TrainConfig, build
from repa.trainer.methods.base import MethodConfig
from repa.trainer.methods.repa import RepaConfig
from repa.trainer.objectives.flow import FlowConfig
from repa.trainer.resuming import ON_RESUME, changes
from repa.trainer.settings_file import MOST_BYTES, load_yaml, parse_yaml
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
        ("compile=yes", "compile", "whole"),
        ("compile=False", "compile", "off"),
        ("compile=blocks", "compile", "blocks"),
        ("activation_checkpointing=2", "activation_checkpointing", 2),
        ("activation_checkpointing=off", "activation_checkpointing", "off"),
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


def test_strategies_are_known_in_any_case() -> None:
    # Lightning takes them so too, and its own FSDP is not ours
    assert build(assignments=["trainer.strategy=FSDP"]).trainer == {"strategy": "fsdp"}


@pytest.mark.parametrize(
    ("text", "field", "part"),
    [
        ("lr=abc", "lr", "number"),
        ("lr=nan", "lr", "number"),
        ("lr=-1", "lr", "above 0"),
        ("max_steps=1.5", "max_steps", "integer"),
        ("max_steps=inf", "max_steps", "integer"),
        ("max_steps=0", "max_steps", "from 1"),
        ("seed=-1", "seed", "from 0"),
        ("threads=1e9", "threads", "1,024"),
        ("compile=maybe", "compile", "blocks, whole, off"),
        ("precision=bf16", "precision", "bf16-mixed"),
        ("betas=0.9", "betas", "(number"),
        ("betas=0.9,1.5", "betas", "below 1"),
        ("ema_decay=1", "ema_decay", "below 1"),
        ("clip=0", "clip", "above 0"),
        ("label_dropout=1.1", "label_dropout", "to 1"),
        ("latent_scale=0", "latent_scale", "above 0"),
        ("lr_schedule=stairs", "lr_schedule", "cosine"),
        ("method.weight=much", "method.weight", "number"),
        ("method.projector_width=0", "method.projector_width", "from 1"),
        ("method.projector_width=-4", "method.projector_width", "from 1"),
        ("method.projector_width=1e12", "method.projector_width", "65,536"),
        ("wieght=1", "wieght", "method.weight"),
        ("method.wieght=1", "method.wieght", "method.weight"),
        ("bach_size=8", "bach_size", "batch_size"),
        ("trainer.device=2", "trainer.device", "trainer.devices"),
        ("trainer.devices=[", "trainer.devices", "YAML"),
        ("trainer.devices=*a", "trainer.devices", "YAML"),
        ("trainer.devices=" + "[" * 5000 + "]" * 5000, "trainer.devices", "nested"),
        ("trainer.detect_anomaly=maybe", "trainer.detect_anomaly", "true or false"),
        ("trainer.max_steps=2", "trainer.max_steps", "set max_steps"),
        ("foo.bar=1", "foo.bar", ""),
        ("trainer=3", "trainer", "trainer.key=value"),
        ("lr", "--set", "key=value"),
        ("method=haste2", "--method", "did you mean haste"),
        ("lr=1" + "0" * 400, "lr", "number"),
        ("seed=1" + "0" * 5000, "seed", "integer"),
        ("cache=a\0b", "cache", "text"),
        ("\x1b[31m=1", "\\x1b[31m", ""),
    ],
)
def test_mistakes_name_key_value_and_remedy(text: str, field: str, part: str) -> None:
    with pytest.raises(RepaError) as caught:
        build(assignments=[text])
    assert caught.value.field == field
    assert part in caught.value.remedy or part in caught.value.what
    assert caught.value.remedy
    assert str(caught.value).isprintable()


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
        build({"objective": "edm"})
    assert caught.value.field == "objective"
    with pytest.raises(RepaError, match=r"objective\.path"):
        build(assignments=["path=quadratic"])


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"[1, 2]",
        b"a: [",
        b"\xff\xfe",
        b"[" * 5000 + b"]" * 5000,
        b"seed: 1" + b"0" * 5000,
        b"a: &a [*a]",
        b"a: &a [1]\n" + b"".join(b"%c: &%c [*%c, *%c]\n" % (n + 1, n + 1, n, n) for n in range(97, 110)),
        b"day: 2001-02-30",
        b"!!python/object/apply:os.getcwd []",
        b"#" * (MOST_BYTES + 1),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "config.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(RepaError) as caught:
        load_yaml(file)
    assert caught.value.field == "--config"
    assert caught.value.remedy
    assert str(caught.value).isprintable()


def test_a_pipe_is_no_configuration(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RepaError) as caught:
        load_yaml(tmp_path / "pipe")
    assert caught.value.field == "--config"


@given(st.text(max_size=80))
def test_any_text_is_settings_or_one_line(text: str) -> None:
    message = ""
    try:
        values = parse_yaml(text, where="it", remedy="mend it", field="--config")
        build(values if isinstance(values, dict) else {"model": values})
    except RepaError as error:
        message = str(error)
    assert message == "" or message.isprintable()


@given(st.sampled_from(sorted(ON_RESUME)), st.text(max_size=12) | st.integers() | st.floats() | st.none())
def test_any_value_is_typed_or_one_line(key: str, value: Any) -> None:
    refused = None
    try:
        config = build(flags={key: value})
    except RepaError as error:
        refused = error
    if refused is None:
        assert build(config.to_dict()) == config
    else:
        assert refused.field
        assert str(refused).isprintable()


@pytest.mark.parametrize(
    "values",
    [
        {"method": 3},
        {"trainer": [1]},
        {"lr": None},
        {"max_steps": True},
        {"lr": 10**400},
        {"seed": 10**5000},
        {"betas": [True, 0.5]},
        {"model": ["SiT-B/2"]},
        {"cache": "a\0b"},
        {"method": {"name": ["a"]}},
    ],
)
def test_yaml_values_of_another_type(values: dict[str, Any]) -> None:
    with pytest.raises(RepaError) as caught:
        build(values)
    assert caught.value.field == next(iter(values))


def test_on_and_off_of_yaml_are_choices(tmp_path: Path) -> None:
    # YAML 1.1 reads these words as truth values
    file = tmp_path / "config.yaml"
    for word, expected in (("on", "on"), ("off", "off"), ("'on'", "on"), ("auto", "auto")):
        file.write_text(f"direct: {word}\n")
        assert build(load_yaml(file)).direct == expected


def test_configurations_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        TrainConfig().lr = 1.0  # type: ignore[misc]


def test_every_setting_says_what_a_resumed_run_does_with_it() -> None:
    assert ON_RESUME.keys() == TrainConfig().to_dict().keys()


def test_changes_are_taken_recorded_or_refused() -> None:
    old = build(assignments=["method.weight=0.5", "lr=1e-4"]).to_dict()
    free = ["max_steps=9", "log_every=7", "checkpoint_every=3", "trainer.devices=2", "threads=5", "direct=on"]
    assert changes(old, build(assignments=[*free, "check_crc=off", "cache=x"])) == []
    recorded = changes(old, build(assignments=["lr=2e-4", "clip=none", "lr_warmup=3"]))
    assert [(each.key, each.before, each.now) for each in recorded] == [
        ("lr", 1e-4, 2e-4),
        ("lr_warmup", 0, 3),
        ("clip", 1.0, None),
    ]
    for assignment in ("method.weight=0.25", "seed=1", "model=SiT-S/2", "batch_size=8", "latent_scale=2"):
        with pytest.raises(RepaError) as caught:
            changes(old, build(assignments=[assignment, "lr=1"]))
        assert caught.value.field == assignment.partition("=")[0]
    with pytest.raises(RepaError) as caught:
        changes(old, build(flags={"method": "none"}))
    assert caught.value.field == "method.name"


def test_a_run_of_before_a_setting_had_its_default() -> None:
    old = build().to_dict()
    del old["label_dropout"], old["lr_schedule"]
    assert changes(old, build()) == []
    assert [each.key for each in changes(old, build(assignments=["label_dropout=0.2"]))] == ["label_dropout"]


def test_the_end_is_recorded_where_the_learning_rate_falls_towards_it() -> None:
    old = build(assignments=["lr_schedule=cosine", "max_steps=10"]).to_dict()
    longer = build(assignments=["lr_schedule=cosine", "max_steps=20"])
    assert [(each.key, each.before, each.now) for each in changes(old, longer)] == [("max_steps", 10, 20)]


def test_coerce_refuses_truth_values_as_numbers() -> None:
    for kind in (int, float):
        with pytest.raises(RepaError):
            coerce(True, kind, "key")
