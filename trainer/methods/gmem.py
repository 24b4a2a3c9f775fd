"""GMem conditions on the class token of the image itself (Tang et al., arXiv 2412.08781)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Ge, Lt

from ...data.format.columns import column_name
from ..models.conditioning import CLS, MASK_PROBABILITY, ConditionColumn
from ..models.conditions import build_conditioner
from ..objectives.times import lognormal_times
from .alignment import cosine_similarity
from .base import Requirement, Term
from .repa import Repa, RepaConfig
from .requirements import AlignsFirst, DepthWithin, HasPreset, NeedsColumn, SameGrid

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..models.conditioning import Conditioner
    from ..objectives.times import TimeLaw
    from .base import Phase, Step

COSINE = "cosine"


@dataclass(frozen=True, kw_only=True)
class GmemConfig(RepaConfig):
    """Settings of GMem, which are those of REPA, of the condition and of the cosine term.

    Attributes:
        cosine: weight of 1 − cos(v_θ, v), the cosine over the channels of each pixel (released code: 1).
        mask: how often an element of the class token is dropped in training (released code: 0.4).
        mask_projected: drop elements after the projection, and not before (first released version).
        drop: how often training drops the whole class token, which gives guidance something to lead away
            from (ours: 0.1 does; released code: never).
    """

    cosine: Annotated[float, Ge(0)] = 1.0
    mask: Annotated[float, Ge(0), Lt(1)] = MASK_PROBABILITY
    mask_projected: bool = False
    drop: Annotated[float, Ge(0), Lt(1)] = 0.0


PRESETS: Mapping[str, GmemConfig] = {
    # ours: a third of the depth, as the released 4 of 12 in B
    "T": GmemConfig(depth=2),
    # ours: the released code has no S, which is as deep as B, and no L
    "S": GmemConfig(depth=4),
    "L": GmemConfig(depth=4),
    # released code
    "B": GmemConfig(depth=4),
    "XL": GmemConfig(depth=4),
}


class Gmem(Repa):
    """L = L_v + w·L_cos + λ·L_REPA at times of sigmoid(N(0, 1)), conditioned on the image's own class token.

    The class token of the first teacher is the condition, in every phase and instead of the label, which is
    not used at all; see `ClassTokenConditioner`. L_cos compares the prediction with the objective's target,
    for flow matching the velocity.
    """

    config: GmemConfig
    config_class = GmemConfig
    presets = PRESETS
    named_presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "first-version": {"mask": 0.2, "mask_projected": True},
    }
    kinds = ("patch", CLS)
    own_condition = "class tokens of images"
    needs_target = True
    target_terms = frozenset({COSINE})
    requires: ClassVar[tuple[Requirement, ...]] = (
        NeedsColumn(*kinds),
        HasPreset("depth"),
        AlignsFirst("stop"),
        DepthWithin("depth"),
        SameGrid(patch="depth"),
    )

    def make_conditioner(self, num_classes: int) -> Conditioner | None:
        """Return the projection of the first teacher's class token."""
        column = column_name(self.teachers[0], CLS) if self.teachers else ""
        if column not in self.specs:
            # a missing column is reported before step 0
            return None
        said = ConditionColumn(
            column=column,
            shape=self.specs[column].shape,
            num_classes=num_classes,
            width=self.backbone.width,
            mask=self.config.mask,
            mask_projected=self.config.mask_projected,
            drop=self.config.drop,
        )
        return build_conditioner(said)

    def time_law(self, phase: Phase) -> TimeLaw:
        """Return sigmoid(N(0, 1)) on the linear path, where noise and data are exp N(0, 1) in ratio."""
        del phase
        return lognormal_times

    def losses(self, step: Step) -> dict[str, Term]:
        """Return ``cosine``, and the alignment's terms until τ."""
        prediction = step.student.prediction
        assert prediction is not None, "no phase stops early"
        assert step.target is not None, "the checks have passed"
        similarity = cosine_similarity(prediction.flatten(2).mT, step.target().flatten(2).mT)
        cosine = Term(value=(1 - similarity).mean(), weight=self.config.cosine)
        return {COSINE: cosine, **super().losses(step)}
