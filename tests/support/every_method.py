"""Each method of the registry on networks and a cache that suit them all, in four steps of eight images."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from repa.data.format.columns import MOMENTS, ColumnSpec
from repa.data.testing import synthetic_cache
from repa.trainer.config import build
from repa.trainer.methods import METHODS
from repa.trainer.models.sit import SIT_SIZES, SiTSize
from repa.trainer.models.sit_down import SIT_DOWN_SIZES, SiTDownSize
from repa.trainer.objectives.times import TIME_LAWS
from repa.trainer.run.checks import check

if TYPE_CHECKING:
    from pathlib import Path

    import pytest
    from repa.trainer.config import TrainConfig

STOP, STEPS = 2, 4
LATENTS = {MOMENTS: ColumnSpec(shape=(8, 8, 8), dtype="float32")}
ATTENTION = ColumnSpec(shape=(3, 2, 16, 8), dtype="float16")  # three blocks, two heads, 4×4 tokens
COLUMNS = LATENTS | {
    "demo/patch": ColumnSpec(shape=(16, 12), dtype="float16"),
    "demo/cls": ColumnSpec(shape=(12,), dtype="float16"),
    "demo/q": ATTENTION,
    "demo/k": ATTENTION,
}
# the blocks that HASTE's preset for size T names, of a teacher as deep as it says
NOTES = {"demo+attention": {"blocks": [4, 5, 6], "depth": 6, "logit_scale": 0.3, "form": "exact"}}
# settings that make a method small or end its alignment within the run, where it has them
SMALL = {"projector_width": 8, "stop": STOP}
# of one method, so that its phases begin and end within the run
OWN: dict[str, dict[str, Any]] = {"erw": {"warmup_steps": 1, "warmup_depth": 1, "depth": 3}}


def shrink(patch: pytest.MonkeyPatch | None = None) -> None:
    """Make the networks of size T as small as the blocks in the methods' presets let them be.

    Args:
        patch: of the test that ends it; in a process of its own it lasts.
    """
    put = dict.__setitem__ if patch is None else patch.setitem
    put(SIT_SIZES, "T", SiTSize(depth=4, width=24, heads=2))
    put(SIT_DOWN_SIZES, "T", SiTDownSize(outer=2, middle=3, width=24, heads=2, mlp_width=32))


def write_cache(path: Path, *, teacher: bool = True) -> Path:
    """Write 24 rows of latents and, unless told otherwise, everything that a method reads of a teacher."""
    columns, notes = (COLUMNS, NOTES) if teacher else (LATENTS, {})
    synthetic_cache(path, num_rows=24, columns=columns, notes=notes, resolution=64)
    return path


def small_config(method: str, cache: Path, *, model: str = "", **changes: Any) -> TrainConfig:
    """Return the configuration of a method as typed, but for its size.

    Args:
        method: its name.
        cache: of `write_cache`.
        model: the backbone; the method's own of size T by default.
        changes: settings, with ``__`` for the dot.
    """
    kind = METHODS[method]
    known = {item.name for item in fields(kind.config_class)}
    values: dict[str, Any] = {
        "method": method,
        "cache": str(cache),
        "model": model or f"{kind.default_model.rpartition('-')[0]}-T/2",
        "max_steps": STEPS,
        "batch_size": 8,
        "precision": "32-true",
        "compile": "off",
        "log_every": 1,
        "checkpoint_every": 1,
        "keep_last": 9,
        "preview_every": 0,
        "holdout": 8,
        "eval_every": 2,
        "lr": 1e-3,
    }
    small = {key: value for key, value in SMALL.items() if key in known} | OWN.get(method, {})
    values |= {f"method.{key}": value for key, value in small.items()}
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return build(flags=values)


def twin_settings(config: TrainConfig) -> dict[str, Any]:
    """Return what a run of ``none`` needs to see the same as a method: its model, condition and times.

    A method that brings a condition or a registered law of time of its own is compared with ``none`` given
    the same ones by settings.
    """
    method = check(config).method
    assert method is not None
    settings: dict[str, Any] = {"model": config.model}
    conditioner = method.make_conditioner(3)
    if conditioner is not None:
        settings["condition"] = conditioner.column
    laws = [method.time_law(phase) for phase in method.phases()]
    if names := [name for name, each in TIME_LAWS.items() if all(law is each for law in laws)]:
        (settings["times"],) = names
    return settings
