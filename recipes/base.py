"""A recipe, which is a published setting as a function, with where it is from and what it deviates in."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..trainer.config import TrainConfig
from ..trainer.methods.outside import find_method
from ..trainer.typed import from_mapping

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

DATA = "imagenet"
REFERENCES = {256: "VIRTUAL_imagenet256_labeled.npz", 512: "VIRTUAL_imagenet512.npz"}
COCO_REFERENCE = "fid_stats_mscoco256_val.npz"
STABLE_DIFFUSION_VAE = "stabilityai/sd-vae-ft-mse"
_METRICS = "fid,sfid,is,precision,recall"


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """What the cache must hold, as flags of `repa preprocess`.

    Attributes:
        encoders: teachers; none writes latents alone.
        resolution: side of the images in pixels.
        views: as of ``--views``.
        attention: as of ``--attention``; empty stores none.
        vae: the autoencoder.
        channels: of its latents.
        stride: pixels of an image per latent position, along a side.
        imported: layout of another program's latents, as of ``repa cache import --format``; empty encodes.
        data: the images, as of ``--data``.
        named: what the cache is named after; empty is the images.
        captions: as of ``--captions``; empty without.
        text_encoder: as of ``--text-encoder``.
    """

    encoders: tuple[str, ...] = ("dinov2-b",)
    resolution: int = 256
    views: str = "original"
    attention: str = ""
    vae: str = STABLE_DIFFUSION_VAE
    channels: int = 4
    stride: int = 8
    imported: str = ""
    data: str = DATA
    named: str = ""
    captions: str = ""
    text_encoder: str = ""

    @property
    def cache(self) -> str:
        """Folder of the cache, its own for each choice of views, autoencoder and attention, as it has one."""
        of_views = "" if self.views == "original" else f"-{self.views}"
        of_vae = "" if self.vae == STABLE_DIFFUSION_VAE else f"-{self.vae.rpartition('/')[2]}"
        of_attention = f"-attention-{self.attention.replace(',', '-')}" if self.attention else ""
        if self.captions:
            return f"caches/{self.named}"
        return f"caches/{self.named or self.data}-{self.resolution}{of_views}{of_vae}{of_attention}"

    def commands(self) -> tuple[tuple[str, ...], ...]:
        """Return the command lines, word by word."""
        if not self.imported:
            return (self._preprocess(),)
        imported = ("repa", "cache", "import", f"latents-{DATA}", "--format", self.imported, "--data", DATA)
        first = (*imported, "--vae", self.vae, "--cache", self.cache)
        return (first, self._preprocess()) if self.encoders else (first,)

    def _preprocess(self) -> tuple[str, ...]:
        words = ["repa", "preprocess", "--data", self.data, "--cache", self.cache]
        for each in self.encoders or ("none",):
            words += ["--encoder", each]
        if self.resolution != 256:
            words += ["--resolution", str(self.resolution)]
        if self.views != "original":
            words += ["--views", self.views]
        if self.attention:
            words += ["--attention", self.attention]
        if self.vae != STABLE_DIFFUSION_VAE and not self.imported:
            words += ["--vae", self.vae]
        if self.captions:
            words += ["--captions", self.captions, "--text-encoder", self.text_encoder]
        return tuple(words)

    @property
    def reference(self) -> tuple[str, str]:
        """File of the reference of published figures, and the metrics that it is good for."""
        if self.captions:
            return COCO_REFERENCE, "fid"
        return REFERENCES[self.resolution], _METRICS


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the samples of a published number were made, as flags of `repa evaluate`.

    Attributes:
        solver: of the differential equation.
        steps: of the solver.
        shift: of its times.
        guidance: scale of classifier-free guidance; 1 is none.
        interval: times between which it acts.
        channels: of the latent that are guided, all or three.
        labels: drawn at random, or balanced.
        num: samples.
        vae: the autoencoder that decodes, where it is not the one that encoded.
        bank: the cache whose images' captions are shown, of models of text; these have no labels.
    """

    solver: str = "sde"
    steps: int = 250
    shift: float = 1.0
    guidance: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    channels: str = "all"
    labels: str = "random"
    num: int = 50_000
    vae: str = ""
    bank: str = ""

    def words(self) -> tuple[str, ...]:
        """Return the flags, word by word."""
        words = ["--solver", self.solver, "--steps", str(self.steps)]
        words += ["--bank", self.bank] if self.bank else ["--labels", self.labels]
        if self.shift != 1:
            words += ["--shift", f"{self.shift:g}"]
        if self.num != 50_000:
            words += ["--num", str(self.num)]
        if self.guidance != 1:
            words += ["--guidance", f"{self.guidance:g}"]
            if self.interval != (0.0, 1.0):
                words += ["--interval", *(f"{each:g}" for each in self.interval)]
            if self.channels != "all":
                words += ["--guidance-channels", self.channels]
        if self.vae:
            words += ["--vae", self.vae]
        return tuple(words)

    def __str__(self) -> str:
        low, high = self.interval
        where = "" if self.interval == (0.0, 1.0) else f" on [{low:g}, {high:g}]"
        channels = "" if self.channels == "all" else f" of {self.channels} channels"
        guided = "no guidance" if self.guidance == 1 else f"guidance {self.guidance:g}{channels}{where}"
        shifted = "" if self.shift == 1 else f" shifted by {self.shift:g}"
        solved = f"{self.solver} {self.steps} steps{shifted}"
        shown = f"captions of {self.bank}" if self.bank else f"{self.labels} labels"
        return f"{guided}, {solved}, {self.num:,} samples, {shown}"


PLAIN = Sampling()
"""250 stochastic steps without guidance, as SiT, REPA and what follows them report."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A published number.

    Attributes:
        step: of the checkpoint.
        fid: Fréchet inception distance.
        inception_score: where it is published too.
        sampling: how the samples were made; None where the paper leaves some of it out.
        remark: what must be known of it.
    """

    step: int
    fid: float
    inception_score: float | None = None
    sampling: Sampling | None = PLAIN
    remark: str = ""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A published setting.

    Attributes:
        name: what ``--recipe`` takes.
        make: returns the configuration, without a cache.
        paper: its number on arXiv.
        reproduces: which table, row or run of it.
        encoding: what the cache must hold.
        figures: the published numbers.
        deviations: what is published and not done here, or done in another way.
        notes: what the paper leaves open, and what else must be known.
    """

    name: str
    make: Callable[[], TrainConfig]
    paper: str
    reproduces: str
    encoding: Encoding
    figures: tuple[Figure, ...] = ()
    deviations: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return inspect.cleandoc(self.make.__doc__ or "").partition("\n")[0]

    def config(self) -> TrainConfig:
        """Return the configuration, which notes the recipe's name."""
        return replace(self.make(), recipe=self.name)

    def settings(self) -> dict[str, Any]:
        """Return what the recipe sets to another value than the default, as of a configuration file."""
        return settings_of(self.make())

    def train_words(self) -> tuple[str, ...]:
        """Return the command line of the training, word by word."""
        return ("repa", "train", "--recipe", self.name, "--cache", self.encoding.cache)

    def evaluate_words(self) -> tuple[tuple[str, ...], ...]:
        """Return the command line for each figure whose sampling is published, word by word."""
        last = self.config().max_steps
        return tuple(
            (
                *("repa", "evaluate", "--run", f"runs/{self.name}"),
                *(() if each.step == last else ("--step", str(each.step))),
                *("--reference", self.encoding.reference[0], "--metrics", self.encoding.reference[1]),
                *each.sampling.words(),
            )
            for each in self.figures
            if each.sampling is not None
        )


def recipe(
    name: str,
    *,
    paper: str,
    reproduces: str,
    encoding: Encoding,
    figures: tuple[Figure, ...] = (),
    deviations: tuple[str, ...] = (),
    notes: tuple[str, ...] = (),
) -> Callable[[Callable[[], TrainConfig]], Recipe]:
    """Make a recipe of the function below, whose docstring becomes the summary. See `Recipe`."""

    def decorate(make: Callable[[], TrainConfig]) -> Recipe:
        return Recipe(
            name=name,
            make=make,
            paper=paper,
            reproduces=reproduces,
            encoding=encoding,
            figures=figures,
            deviations=deviations,
            notes=notes,
        )

    return decorate


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that differ from the defaults of the same method and preset, and the model.

    Args:
        config: of a run.
    """
    kind = find_method(config.method_name)
    preset = kind.named_presets.get(config.method_preset, {})
    method = from_mapping(kind.config_class, preset, prefix="method.")
    default = TrainConfig(
        method_name=config.method_name, method_preset=config.method_preset, method=method
    ).to_dict()
    values = config.to_dict()
    found = {key: each for key, each in values.items() if key == "model" or each != default[key]}
    found["method"] = _different(values["method"], default["method"], always=("name", "preset"))
    if "objective" in found and values["objective"]["name"] == default["objective"]["name"]:
        found["objective"] = _different(values["objective"], default["objective"])
    return found


def _different(
    values: Mapping[str, Any], default: Mapping[str, Any], *, always: tuple[str, ...] = ()
) -> dict[str, Any]:
    return {key: each for key, each in values.items() if key in always or each != default[key]}
