"""Configuration of an adaptation: everything but its data."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import GloVLMError, nearest
from ..settings import SEEDS, Settings, declarations, read_values, setting

if TYPE_CHECKING:
    from ..methods import Method

Loss = Literal["prototypes", "infonce", "infonce_published"]
Outline = Literal["ignore", "centre", "blank", "pool", "blank+pool"]  # model.outlines.OUTLINES


@dataclass(frozen=True, kw_only=True)
class LearningSettings(Settings):
    """Settings that a run hands to its adaptation as they are: declared once, for both."""

    loss: Loss = setting(
        "prototypes",
        help="Training loss: cross-entropy over class texts, in-batch InfoNCE with same-class "
        "pairs masked, or unmasked; for methods inside the towers.",
        group="Method",
    )
    cross_validate: bool = setting(
        False,
        help="Choose the method's settings by leaving out one group of the support at a time, "
        "where every class has at least 4.",
        group="Method",
    )
    max_steps: int | None = setting(
        None,
        help="Most optimiser steps; a longer recipe is cut, and the results say so.",
        group="Training",
        above=0,
        most=10**9,
        unset="the recipe's own",
    )
    seed: int = setting(
        0,
        help="Of split, draw, initialisation, order, dropout and augmentation.",
        group="Labels",
        least=0,
        most=SEEDS,
    )
    augment: bool = setting(
        False,
        help="Random flips, quarter turns and crops of at least half the area while training.",
        group="Training",
    )
    views: int = setting(
        0,
        help="Augmented views of each labelled image, each encoded once, that methods on frozen "
        "features learn from in its place; published: gda and tip_adapter 10, zs_lp and clap 20.",
        group="Training",
        least=0,
        most=10_000,
    )
    centre: Literal["none", "stain"] = setting(
        "none",
        help="Centre features within each stain by the mean of all its images, labelled or not; "
        "for methods on features. The results are then transductive.",
        group="Method",
    )
    accumulate: int = setting(
        1,
        help="Parts that each batch is split into, to save memory; same result.",
        group="Training",
        least=1,
        most=10**6,
    )
    clip_norm: float | None = setting(
        None, help="Largest gradient norm.", group="Training", above=0, unset="no limit"
    )
    outline: Outline = setting(
        "ignore",
        help="What the model sees of an outlined image: all of it, the inside on grey (blank), the "
        "mean of the patch tokens inside (pool), both, or a circle in the middle where nothing is "
        "outlined (centre).",
        group="Data",
    )
    outline_of: Literal["capsule", "tuft"] | None = setting(
        None,
        help="What the outlines go around.",
        group="Data",
        unset="what the images state",
    )
    draft: bool = setting(
        False,
        help="Decode a JPEG far larger than the model's input at a half, a quarter or an eighth of "
        "its size: faster, and its features differ a little from those of the whole.",
        group="Data",
    )

    def check(self) -> None:
        """Rules of the adaptation over several settings."""
        if self.accumulate > 1 and self.loss != "prototypes":
            raise GloVLMError(
                f"accumulate must be 1 with loss '{self.loss}', whose negatives are the whole "
                f"batch; found {self.accumulate}."
            )
        if self.draft and (self.outline != "ignore" or self.views > 1 or self.augment):
            other = "outline" if self.outline != "ignore" else "views or augment"
            raise GloVLMError(
                f"draft decodes an image no larger than the model's input needs, and {other} "
                "takes a part of the image: leave draft out, or that."
            )


@dataclass(frozen=True)
class AdaptConfig(LearningSettings):
    """Adaptation settings: how `adapt` trains.

    Raises:
        GloVLMError: A value is out of range, or the recipe has no such field.
    """

    method_config: Mapping[str, Any] = setting(
        factory=dict,
        help="Settings of the method (`glovlm methods --json` lists them).",
        group="Method",
    )
    recipe: Mapping[str, Any] = setting(
        factory=dict,
        help="Fields of the method's `Recipe` to override (`epochs`, `lr`, `weight_decay`, "
        "`batch_size`, ...).",
        group="Training",
    )
    output_dir: str | Path | None = setting(
        None,
        help="Takes the log, the checkpoint and the adapter.",
        group="Output",
        unset="nothing is written",
    )
    resume: bool = setting(False, help="Go on from the checkpoint there.", group="Output")
    replay: bool = setting(
        True,
        help="Run blocks that no step changes once rather than at every step; same result.",
        group="Training",
    )

    def check(self) -> None:
        """Rules over several settings."""
        from ..methods import Recipe

        super().check()
        allowed = declarations(Recipe)
        for name in self.recipe:
            if name not in allowed:
                raise GloVLMError(
                    f"A recipe has no '{name}' (it has: {', '.join(allowed)})."
                    f"{nearest(name, allowed)}"
                )
        self._put("recipe", read_values(Recipe, self.recipe))
        if self.resume and self.output_dir is None:
            raise GloVLMError("resume goes on from a checkpoint in output_dir: give output_dir.")

    def check_method(self, method: "Method") -> None:
        """Refuse fields of a recipe, and centres of stains, for a method that takes none."""
        from ..methods import FeatureMethod, TowerMethod

        if self.centre != "none" and (isinstance(method, TowerMethod) or method.on_pooled):
            raise GloVLMError(
                f"Method '{method.name}' trains what makes the features, so no centre of a stain "
                "would stay one: leave --centre out, or use a method on features (linear_probe, "
                "gda, tip_adapter_f)."
            )
        if self.centre != "none" and method.name == "zero_shot":
            raise GloVLMError(
                "Method 'zero_shot' learns from no image, and centring would shift each class's "
                "score by one number in all images of a stain: a prior correction that nobody "
                "declared. Leave --centre out, or use a method that learns from labelled images "
                "(tip_adapter)."
            )

        if self.recipe and isinstance(method, FeatureMethod):
            raise GloVLMError(
                f"Method '{method.name}' is solved, not trained in epochs: it has no "
                f"{', '.join(self.recipe)} to set. Leave that out, or see `glovlm methods --json` "
                "for its settings."
            )
