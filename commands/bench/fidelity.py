"""What each form of stored attention and tokens changes, and what encoding costs beside the teacher."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import torch

from ...data.errors import RepaError
from ...data.machine import usable_cores
from ...data.units import counted
from ...pipeline.columns.calibration import choose_images
from ...pipeline.columns.choice import choose_form
from ...pipeline.columns.factored import FactoredForm
from ...pipeline.columns.fitting import Passes, attention_fidelity, fit_attention, token_fidelity
from ...pipeline.columns.forms import AttentionForm, attention_form, token_form
from ...pipeline.columns.specs import AttentionSettings
from ...pipeline.columns.truncation import truncated
from ...pipeline.config import check_flags
from ...pipeline.encoders import load_encoder
from ...pipeline.images.names import DEFAULT_DATA, DEMO_DATA
from ...pipeline.images.open import open_source
from ...pipeline.lanes.batches import Batch
from ...pipeline.lanes.lanes import Task, open_lanes
from ...pipeline.shard_loop.devices import MAX_LANES
from ..preprocess import EncodingFlags, make_config
from ..shared.attention import scaled_blocks
from .measured import Measured

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path
    from typing import Any

    from rich.console import Console

    from ...pipeline.columns.calibration import ChosenImages
    from ...pipeline.columns.factored import Form
    from ...pipeline.columns.forms import TokenForm
    from ...pipeline.config import PreprocessConfig
    from ...pipeline.encoders.base import Encoder
    from .measured import BenchSettings

EIGHTHS = (2, 4, 6, 7)
"""The ranks of the form of one basis for all images, in eighths of the width of a head."""
TOLERANCE = 1e-3
TEACHER = "the teacher's forward pass"


def bench_fidelity(settings: BenchSettings, room: Path) -> Iterator[tuple[str, str, list[Measured]]]:
    """Measure what storing attention and tokens changes, with a table for each of the two.

    Images are chosen, forms fitted and measured as `repa preprocess` does it; the factors of each image are
    asked for at the bytes of the ranks of one basis. The rate of a line is that of encoding alone, by one
    thread on a CPU, on features that the pass of the first line has just made.
    """
    bench = _Bench(settings, room)
    stored = {**bench.attention(), **bench.tokens()}
    rates = bench.rates({name: form for name, (form, _) in stored.items()})
    teacher = Measured(name=TEACHER, rates=rates[TEACHER])
    lines = [
        Measured(name=name, rates=rates[name], fidelity=fidelity) for name, (_, fidelity) in stored.items()
    ]
    for what, measure in (("attention", "kl_mean"), ("tokens", "cosine_error_mean")):
        shown = [line for line in lines if measure in line.fidelity]
        yield f"fidelity of {what}: {bench.describe(what == 'attention')}", "images/s", [teacher, *shown]


def print_fidelity(console: Console, title: str, unit: str, lines: list[Measured]) -> None:
    """Print the lines of one table, with the cost of each beside the first, which is the teacher's pass."""
    from rich.table import Table

    from ..shared.terminal import print_figures

    teacher, *forms = lines
    table = Table(title=f"{title}; the teacher's pass {teacher.median:,.1f} {unit}", title_justify="left")
    table.add_column("")
    # of one encoding by one pass: how often it could be made while the teacher looks at the image once
    columns = _COLUMNS["kl_mean" if "kl_mean" in forms[0].fidelity else "cosine_error_mean"]
    for heading in (*columns, "encoding / pass"):
        table.add_column(heading, justify="right")
    for line in forms:
        cells = (text(line.fidelity) for text in columns.values())
        table.add_row(line.name, *cells, f"{teacher.ratio(line):.3f}")
    print_figures(console, table)


def _number(key: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda fidelity: f"{fidelity[key]:.2g}"


def _cosine(key: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda fidelity: f"{fidelity[key]:.6f}"


def _bytes(fidelity: Mapping[str, Any]) -> str:
    return f"{fidelity['bytes_per_image']:,}"


# by what only one kind of fidelity has
_COLUMNS: Mapping[str, Mapping[str, Callable[[Mapping[str, Any]], str]]] = {
    "kl_mean": {
        "bytes": _bytes,
        "KL mean": _number("kl_mean"),
        "worst head": _number("kl_worst_head"),
        "99 % of rows": lambda fidelity: f"{max(head['p99'] for head in fidelity['kl']):.2g}",
        "cosine, initial": _cosine("gradient_cosine_initial"),
        "cosine, near": _cosine("gradient_cosine_near"),
        "loss, initial": _number("loss_change_initial"),
        "loss, near": _number("loss_change_near"),
    },
    "cosine_error_mean": {
        "bytes": _bytes,
        "1 − cosine, mean": _number("cosine_error_mean"),
        "largest": _number("cosine_error_max"),
        "REPA loss": _number("repa_loss_change"),
    },
}


class _Bench:
    """A teacher, and images to fit to and to measure on."""

    def __init__(self, settings: BenchSettings, room: Path) -> None:
        self._settings = settings
        self._config = _config_of(settings, room)
        [self._name] = self._config.encoders
        check_flags(self._config)
        images = open_source(self._config.data, limit=self._config.limit, may_import=True)
        self._chosen: ChosenImages = choose_images(images, self._config.resolution)
        self._device = "cuda:0" if torch.cuda.is_available() else "cpu"
        self._encoder: Encoder = load_encoder(
            self._config.teacher(self._name),
            resolution=self._config.resolution,
            device=self._device,
            weights=self._config.weights.get(self._name),
            random_weights=self._config.random_weights,
        )
        self._unmet = ""

    def describe(self, attention: bool) -> str:
        """Say what was measured, for the title of a table."""
        encoder, chosen = self._encoder, self._chosen
        drawn = ", random weights" if encoder.provenance(1).random_weights else ""
        size = f"{encoder.name}{drawn}, {self._config.resolution}²"
        measured = f"measured on {counted(len(chosen.held_out), 'image')}"
        if not attention:
            return f"{size}; {measured}"
        blocks = f"block{'s' if len(self._blocks) > 1 else ''} {', '.join(map(str, self._blocks))}"
        heads = counted(encoder.heads, "head")
        return f"{size}, {blocks} of {heads}; fitted to {len(chosen.fit)}, {measured}{self._unmet}"

    def attention(self) -> dict[str, tuple[Form, Mapping[str, Any]]]:
        """Measure every form of queries and keys, name → form and what it changes."""
        with self._passes() as passes:
            whole = [
                attention_form(self._encoder, AttentionSettings(blocks=self._blocks, dtype=dtype), None)
                for dtype in ("float16", "int8")
            ]
            balanced = fit_attention(self._encoder, self._blocks, self._chosen.fit, passes)
            cut = [
                attention_form(
                    self._encoder,
                    AttentionSettings(blocks=self._blocks, dtype="int8", rank=rank),
                    truncated(balanced, rank),
                )
                for rank in dict.fromkeys(max(1, self._encoder.head_width * each // 8) for each in EIGHTHS)
            ]
            forms: list[Form] = [*whole, *cut]
            fidelities = attention_fidelity(self._encoder, forms, self._chosen.held_out, passes)
            names = (
                "float16, whole",
                "int8, whole",
                *(f"one basis, int8, rank {form.rank}" for form in cut),
            )
            found: dict[str, tuple[Form, Mapping[str, Any]]] = {
                name: (form, fidelity) for name, form, fidelity in zip(names, forms, fidelities, strict=True)
            }
            for _, fidelity in list(found.values())[len(whole) :]:
                most = fidelity["bytes_per_image"]
                found[f"factors, --attention-bytes {most}"] = self._factors(passes, attention_bytes=most)
            try:
                found[f"factors, --attention-kl {TOLERANCE:g}"] = self._factors(
                    passes, attention_kl=TOLERANCE
                )
            except RepaError as error:
                if error.field != "--attention-kl":
                    raise
                self._unmet = f"; none meets --attention-kl {TOLERANCE:g}"
        return found

    def tokens(self) -> dict[str, tuple[TokenForm, Mapping[str, Any]]]:
        """Measure the forms of tokens that round, name → form and what it changes."""
        found: dict[str, tuple[TokenForm, Mapping[str, Any]]] = {}
        with self._passes() as passes:
            for dtype in ("float16", "int8"):
                form = token_form(self._encoder, dtype, None)
                fidelity = token_fidelity(self._encoder, form, self._chosen.held_out, passes)
                found[f"{dtype} tokens"] = (form, fidelity)
        return found

    def rates(self, forms: Mapping[str, Form | TokenForm]) -> dict[str, tuple[float, ...]]:
        """Measure images per second of the teacher's pass and of each encoding, in turn, in each round."""
        blocks, features = self._blocks, dict[str, torch.Tensor]()

        def look(images: torch.Tensor) -> dict[str, torch.Tensor]:
            features.update(self._encoder.encode(images, blocks))
            return {}

        def encode(form: Form | TokenForm, images: torch.Tensor) -> dict[str, torch.Tensor]:
            del images
            form.encode(features)
            return {}

        tasks = [Task(model=TEACHER, sources=(), compute=look)]
        tasks += [
            Task(model=name, sources=(), compute=partial(encode, self._at_hand(form)))
            for name, form in forms.items()
        ]
        images = dict(islice(self._chosen.held_out.items(), self._settings.batch_size))
        batch = Batch(shard=0, rows=list(images), images=list(images.values()))
        found: dict[str, list[float]] = {task.model: [] for task in tasks}
        with open_lanes(self._device, 1) as lanes:
            for number in range(self._settings.rounds + 1):
                seconds = lanes.submit(batch, tasks).result().seconds
                # the first round, in which much is done for the first time, does not count
                for name in found if number else ():
                    found[name].append(len(images) / seconds[name])
        return {name: tuple(values) for name, values in found.items()}

    def _at_hand(self, form: Form | TokenForm) -> Form | TokenForm:
        """Return the form with its tensors where they are used, as `repa preprocess` has them."""
        if isinstance(form, FactoredForm):
            return replace(form, basis=form.basis.to(self._device))
        if isinstance(form, AttentionForm) and form.projections is not None:
            to_query, to_key = (each.to(self._device) for each in form.projections)
            return replace(form, projections=(to_query, to_key))
        return form

    def _factors(self, passes: Passes, **asked: Any) -> tuple[Form, Mapping[str, Any]]:
        settings = replace(self._config, **asked).attention_settings(self._name)
        assert settings is not None, "the configuration names blocks"
        return choose_form(self._encoder, settings, self._chosen, passes)

    @property
    def _blocks(self) -> tuple[int, ...]:
        return self._config.attention[self._name]

    @contextmanager
    def _passes(self) -> Iterator[Passes]:
        with open_lanes(self._device, min(MAX_LANES, usable_cores())) as lanes:
            yield Passes(lanes, self._settings.batch_size)


def _config_of(settings: BenchSettings, room: Path) -> PreprocessConfig:
    """Make what `repa preprocess` would be asked for with the same flags."""
    demo = settings.encoder == DEMO_DATA
    blocks = settings.attention or ",".join(map(str, scaled_blocks(settings.encoder)))
    return make_config(
        EncodingFlags(
            data=settings.data or (DEMO_DATA if demo else DEFAULT_DATA),
            cache=str(room / "unused"),
            encoders=[settings.encoder],
            resolution=settings.resolution,
            limit=settings.images,
            batch_size=settings.batch_size,
            weights=list(settings.weights),
            random_weights=settings.random_weights,
            attention=blocks,
        )
    )
