"""Configuration of an adaptation: everything but its data."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import GloVLMError, check_settings, nearest
from ..methods import FeatureMethod, Method, Recipe

Loss = Literal["prototypes", "infonce", "infonce_published"]


@dataclass(frozen=True)
class AdaptConfig:
    """Adaptation settings: how `adapt` trains.

    Args:
        method_config: Settings of the method (`glovlm methods --json` lists them).
        recipe: Fields of the method's `Recipe` to override (`epochs`, `lr`, `weight_decay`,
            `batch_size`, ...).
        loss: `prototypes` (cross-entropy over class texts), `infonce` (in-batch, same-class pairs
            masked) or `infonce_published` (unmasked); for methods inside the towers.
        cross_validate: Choose the method's settings by leaving out one group of the support at a
            time, where every class has at least 4.
        max_steps: Most optimiser steps; a longer recipe is cut, and the results say so.
        seed: Of initialisation, order, dropout and augmentation.
        augment: Random flips, quarter turns and crops of at least half the area while training.
        accumulate: Parts that each batch is split into, to save memory; same result.
        clip_norm: Largest gradient norm.
        output_dir: Takes the log, the checkpoint and the adapter; `None` writes nothing.
        resume: Go on from the checkpoint there.
        replay: Run blocks that no step changes once rather than at every step; same result.

    Raises:
        GloVLMError: A value is out of range, or the recipe has no such field.
    """

    method_config: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    loss: Loss = "prototypes"
    cross_validate: bool = False
    max_steps: int | None = None
    seed: int = 0
    augment: bool = False
    accumulate: int = 1
    clip_norm: float | None = None
    output_dir: str | Path | None = None
    resume: bool = False
    replay: bool = True

    def __post_init__(self) -> None:
        known = get_args(Loss)
        if self.loss not in known:
            raise GloVLMError(
                f"loss must be one of {', '.join(known)}; found '{self.loss}'."
                f"{nearest(str(self.loss), known)}"
            )
        if self.seed < 0:
            raise GloVLMError(f"seed must be 0 or more; found {self.seed}.")
        if self.accumulate < 1 or (self.accumulate > 1 and self.loss != "prototypes"):
            raise GloVLMError(
                f"accumulate must be 1 or more, and 1 with loss '{self.loss}', whose negatives are "
                f"the whole batch; found {self.accumulate}."
            )
        allowed = [f.name for f in fields(Recipe)]
        for name in self.recipe:
            if name not in allowed:
                raise GloVLMError(
                    f"A recipe has no '{name}' (it has: {', '.join(allowed)})."
                    f"{nearest(name, allowed)}"
                )
        above = {"max_steps": self.max_steps, "clip_norm": self.clip_norm}
        above |= {n: self.recipe[n] for n in ("epochs", "lr", "batch_size") if n in self.recipe}
        for name, value in above.items():
            if value is not None and not value > 0:
                raise GloVLMError(f"{name} must be above 0; found {value}.")
        if self.resume and self.output_dir is None:
            raise GloVLMError("resume goes on from a checkpoint in output_dir: give output_dir.")

    def check_recipe(self, method: Method) -> None:
        """Refuse fields of a recipe for a method that has none."""
        if self.recipe and isinstance(method, FeatureMethod):
            raise GloVLMError(
                f"Method '{method.name}' is solved, not trained in epochs: it has no "
                f"{', '.join(self.recipe)} to set. Leave that out, or see `glovlm methods --json` "
                "for its settings."
            )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "AdaptConfig":
        """Make a config from plain values.

        Raises:
            GloVLMError: A key is unknown; names the nearest.
        """
        check_settings(values, {f.name for f in fields(cls)}, ())
        return cls(**values)
